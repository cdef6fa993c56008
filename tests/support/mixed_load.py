"""Requests of every kind at once, on a pool so small that they preempt each other; what clients, metrics and log tell.

The model cannot compute one of its tokens, so that a request can fail.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import torch
from processes import assert_pool_is_idle, running_quire
from safetensors.torch import load_file, save_file
from scraping import Scrape, scrape_all
from tiny_checkpoints import make_checkpoint

from protos.memory.v1 import inspection_pb2
from protos.router.v1 import router_pb2 as pb
from quire.rpc_status import from_rpc_error

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from processes import Quire

POISON = 298  # its embedding is not a number
POISONED_PROMPT = (5, POISON, 6)
FAVOURITE = 40  # what a biased request samples, and stops at
MARKER = "Sphinx of black quartz"  # begins every text prompt
FLAGS = (
    *("--memory-budget", "210KiB", "--max-model-len", "300", "--max-num-seqs", "8"),
    *("--dtype", "float32", "--metrics-compat", "vllm"),
    *("--log-format", "json", "--log-level", "debug"),
)
CALL_IDS = {"x-request-id": "frontend-7", "traceparent": "00-4bf92f35-00f067aa-01"}


@dataclass
class Evidence:
    """What is known once the load is over."""

    log_file: Path
    scrapes: list[dict[str, Scrape]] = field(default_factory=list)  # from before to after
    finished: dict[str, list[pb.Finished]] = field(default_factory=dict)  # samples, by request id
    cancelled: set[str] = field(default_factory=set)  # by their client, which then knows no more
    failed: set[str] = field(default_factory=set)
    rejected: Counter[str] = field(default_factory=Counter)  # by reason
    pool: Any = None  # of the inspection API, at the end
    addresses: dict[str, str] = field(default_factory=dict)

    @property
    def last(self) -> dict[str, Scrape]:
        return self.scrapes[-1]

    def log(self) -> list[dict[str, Any]]:
        """The records; each must be one line of JSON."""
        return [json.loads(line) for line in self.log_file.read_text().splitlines()]

    def records(self, event: str) -> list[dict[str, Any]]:
        return [record for record in self.log() if record["event"] == event]


def request(name: str, num_tokens: int = 60, **fields: Any) -> pb.GenerateRequest:
    sampling = {"logit_bias": [pb.LogitBias(token_id=POISON, bias=-100)], **fields}
    return pb.GenerateRequest(
        request_id=name,
        text=f"{MARKER} {name}",
        sampling=pb.SamplingParams(**sampling),
        stopping=pb.StoppingCriteria(max_tokens=num_tokens, ignore_eos=True),
    )


def requests_that_end() -> list[pb.GenerateRequest]:
    """To their length, at a stop token, with several samples; the same prompt twice."""
    # Before min_tokens its favourite is out of reach, and it would sample anything.
    biases = [pb.LogitBias(token_id=FAVOURITE, bias=100), pb.LogitBias(token_id=POISON, bias=-100)]
    stopping = request("stops", logit_bias=biases)
    stopping.stopping.stop_token_ids.append(FAVOURITE)
    stopping.stopping.min_tokens = 5
    again = request("again", 3)
    again.text = f"{MARKER} length-0"
    several = request("several", 20, num_samples=3)
    return [*(request(f"length-{index}") for index in range(7)), stopping, again, several]


class Load:
    """Runs the requests against a system and notes what their clients saw."""

    def __init__(self, quire: Quire, evidence: Evidence) -> None:
        self._quire = quire
        self._found = evidence

    def jobs(self) -> list[Callable[[], None]]:
        ends = [lambda message=found: self._complete(message) for found in requests_that_end()]
        return [*ends, self._abort, self._go_away, self._fail, self._be_rejected]

    def _complete(self, message: pb.GenerateRequest) -> None:
        answer = self._quire.router.Complete(
            pb.CompleteRequest(request=message), timeout=60, metadata=tuple(CALL_IDS.items())
        )
        self._found.finished[answer.request_id] = [found.finished for found in answer.completions]

    def _abort(self) -> None:
        """Two samples, ended by somebody else; meanwhile their id is taken."""
        message = request("aborted", 250, num_samples=2)
        events = self._quire.router.Generate(message, timeout=60)
        while not next(events).delta.token_ids:
            pass
        self._expect_rejection(message)
        self._quire.router.Abort(pb.AbortRequest(request_id="aborted"))
        self._found.finished["aborted"] = [
            event.finished for event in events if event.HasField("finished")
        ]

    def _go_away(self) -> None:
        events = self._quire.router.Generate(request("left", 250), timeout=60)
        while not next(events).delta.token_ids:
            pass
        events.cancel()
        self._found.cancelled.add("left")

    def _fail(self) -> None:
        message = request("poisoned")
        message.tokens.ids.extend(POISONED_PROMPT)
        if self._error_of(message) == "STEP_FAILED":
            self._found.failed.add("poisoned")

    def _be_rejected(self) -> None:
        self._expect_rejection(request("wrong", top_p=3))
        self._expect_rejection(request("long", 300))
        large = request("large", 50, num_samples=8)
        large.text = large.text.ljust(247, "x")
        self._expect_rejection(large)
        conversation = pb.Conversation(messages=[pb.Message(role="user", content=MARKER)])
        self._expect_rejection(pb.GenerateRequest(conversation=conversation))

    def _expect_rejection(self, message: pb.GenerateRequest) -> None:
        self._found.rejected[self._error_of(message)] += 1

    def _error_of(self, message: pb.GenerateRequest) -> str:
        with pytest.raises(grpc.RpcError) as caught:
            self._quire.router.Complete(pb.CompleteRequest(request=message), timeout=60)
        return str(from_rpc_error(caught.value).reason)


def run_mixed_load(folder: Path) -> Evidence:
    """Start a system, load it, end it; its log is whole then, the stop included."""
    evidence = Evidence(folder / "log")
    with running_quire(_poisoned_model(folder / "model"), *FLAGS, log=evidence.log_file) as quire:
        evidence.addresses = quire.addresses
        is_over = threading.Event()
        with ThreadPoolExecutor(20) as pool:
            evidence.scrapes.append(scrape_all(quire.addresses))
            scraper = pool.submit(_scrape_until, is_over, quire.addresses, evidence.scrapes)
            try:
                jobs = [pool.submit(job) for job in Load(quire, evidence).jobs()]
                for job in jobs:
                    job.result(90)
            finally:
                is_over.set()
            scraper.result(20)
        assert_pool_is_idle(quire)
        evidence.scrapes.append(scrape_all(quire.addresses))
        evidence.pool = quire.inspection.GetPool(inspection_pb2.GetPoolRequest())
    return evidence


def _scrape_until(
    is_over: threading.Event, addresses: dict[str, str], scrapes: list[dict[str, Scrape]]
) -> None:
    while not is_over.is_set():
        scrapes.append(scrape_all(addresses))
        time.sleep(0.03)


def _poisoned_model(folder: Path) -> Path:
    make_checkpoint(folder, "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
