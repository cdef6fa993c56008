"""A device that leaves the processors alone: a step takes a fixed time, its tokens come from a text.

It takes the place of the forward pass and of the drawing of tokens, which a GPU does itself. Everything else of the
compute service is left to the host as it is: rows, packing, tensors, and reading the tokens back.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
from tokenizers import Tokenizer

import compute_service.engine
import compute_service.process
from compute_service.forward import ForwardPass
from compute_service.sampling import SampledToken
from quire import demo_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from compute_service.sampling import SampleRow
    from kernels.batch import PagedBatch
    from kernels.launcher import Kernels


class SimulatedForward(ForwardPass):
    """Stands in for the model: the token behind position p of any sequence is that of a text at p."""

    def __init__(
        self,
        model: nn.Module,
        kernels: Kernels,
        caches: Sequence[tuple[Tensor, Tensor]],
        *,
        step_s: float,
    ) -> None:
        super().__init__(model, kernels, caches)
        self._step_s = step_s
        self._text = _text()

    def __call__(
        self,
        token_ids: Tensor,  # noqa: ARG002 -- as ForwardPass
        position_ids: Tensor,
        batch: PagedBatch,  # noqa: ARG002
        output_rows: Tensor,
    ) -> Tensor:
        """The sampled tokens in place of logits, int64 `[n, 1]`; takes `step_s` seconds, the GIL released."""
        time.sleep(self._step_s)
        return self._text[(position_ids[output_rows] + 1) % len(self._text)].unsqueeze(1)


@contextmanager
def simulated_device(step_s: float) -> Iterator[None]:
    """The engines that are made meanwhile run on it, `step_s` seconds a step."""

    def make_forward(
        model: nn.Module, kernels: Kernels, caches: Sequence[tuple[Tensor, Tensor]]
    ) -> SimulatedForward:
        return SimulatedForward(model, kernels, caches, step_s=step_s)

    with (
        patch.object(compute_service.process, "ForwardPass", make_forward),
        patch.object(compute_service.engine, "sample", _read_back),
        patch.object(compute_service.engine, "warm_up", _compile_nothing),
    ):
        yield


def _read_back(sampled: Tensor, rows: Sequence[SampleRow]) -> list[SampledToken]:
    """What the host does with tokens that the device drew, int64 `[n, 1]`."""
    token_ids = sampled[:, 0].tolist()
    return [SampledToken(token_ids[row.logits_row], None, ()) for row in rows]


def _compile_nothing(_sampled: Tensor) -> None:
    """No kernel of the host draws tokens."""


def _text() -> Tensor:
    """Tokens of a text that the demo model's tokenizer knows: whole words, as a model would give them."""
    tokenizer = Tokenizer.from_file(str(demo_model.path() / "tokenizer.json"))
    text = (demo_model.path().parent / "__init__.py").read_text()
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
