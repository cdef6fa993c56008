"""Requests without a client: what they were sent is kept."""

from __future__ import annotations

import zlib
from array import array
from typing import TYPE_CHECKING

from router.request import Finish, Request
from router.sampling_params import SamplingParams, StoppingCriteria
from router.text_output import TextOutput

if TYPE_CHECKING:
    from quire.errors import QuireError


NUM_SAMPLED_TOKENS = 95  # all below POISON


class SilentDecoder:
    """Text is not what these tests look at."""

    def step(self, token_id: int) -> str:
        return "x"

    def steps(self, token_ids: list[int]) -> tuple[str, int]:
        return "x" * len(token_ids), len(token_ids)

    def flush(self) -> str:
        return ""


class CollectingSink:
    """Keeps every event of a request."""

    def __init__(self) -> None:
        self.token_ids: dict[int, list[int]] = {}
        self.finishes: dict[int, Finish] = {}
        self.errors: list[QuireError] = []

    def output(self, sample_index: int, output: TextOutput) -> None:
        assert sample_index not in self.finishes
        if (delta := output.take()) is not None:
            self.token_ids.setdefault(sample_index, []).extend(delta.token_ids)

    def finished(self, finish: Finish) -> None:
        assert finish.sample_index not in self.finishes
        self.finishes[finish.sample_index] = finish

    def failed(self, error: QuireError) -> None:
        self.errors.append(error)


def make_request(
    request_id: str,
    prompt: list[int],
    max_tokens: int = 5,
    num_samples: int = 1,
    priority: int = 0,
    tenant: str = "",
) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=array("i", prompt),
        sampling=SamplingParams(num_samples=num_samples),
        stopping=StoppingCriteria(),
        seed=0,
        max_tokens=max_tokens,
        end_token_ids=frozenset(),
        eos_token_ids=frozenset(),
        priority=priority,
        sink=CollectingSink(),
        new_output=lambda token_ids: TextOutput(
            token_ids, SilentDecoder(), (), include_stop_string=False
        ),
        tenant=tenant,
    )


def sink_of(request: Request) -> CollectingSink:
    assert isinstance(request.sink, CollectingSink)
    return request.sink


def next_token(token_ids: tuple[int, ...], sample_index: int) -> int:
    """What the simulated model samples: a pure function of everything before."""
    return zlib.crc32(repr((token_ids, sample_index)).encode()) % NUM_SAMPLED_TOKENS


def expected_tokens(request: Request, sample_index: int) -> list[int]:
    """The output without any neighbour, batch or fault."""
    token_ids = tuple(request.prompt_token_ids)
    for _ in range(request.max_tokens):
        token_ids += (next_token(token_ids, sample_index),)
    return list(token_ids[len(request.prompt_token_ids) :])
