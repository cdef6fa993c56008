"""The nouns of one step, as the engine knows them. They mirror `quire.compute.v1`; the servicer converts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from compute_service.sampling import RowSampling, SampledToken


class StepError(Exception):
    """A step cannot be run as it was sent: an unknown row, unknown tokens, a table that does not reach."""


@dataclass(frozen=True, slots=True)
class NewRow:
    """A row, whole."""

    row: int
    incarnation: int
    block_table: NDArray[np.int32]
    token_ids: NDArray[np.int32]
    num_prompt_tokens: int
    sampling: RowSampling


@dataclass(frozen=True, slots=True)
class ForkRow:
    """A row that continues another one."""

    src_row: int
    dst_row: int
    dst_incarnation: int
    block_table: NDArray[np.int32]
    num_tokens: int  # shared
    source_step: int
    source_output: int


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass and what has to be told before it."""

    generation: int
    number: int
    epoch: int
    reset: bool
    drop_rows: tuple[int, ...]
    new_rows: tuple[NewRow, ...]
    forks: tuple[ForkRow, ...]
    appends: tuple[tuple[int, int], ...]  # (row, block)
    remaps: tuple[tuple[int, int, int], ...]  # (row, index, block)
    copies: tuple[tuple[int, int], ...]  # (src, dst)
    rows: tuple[int, ...]
    starts: tuple[int, ...]
    num_tokens: tuple[int, ...]
    # Rows whose last input token is an output of an earlier step: (row, step, output).
    pending: tuple[tuple[int, int, int], ...]
    outputs: tuple[tuple[int, int], ...]  # (row, sample index)


@dataclass(frozen=True, slots=True)
class StepDone:
    """A step that ran."""

    generation: int
    number: int
    tokens: tuple[SampledToken, ...]  # in the order of `Step.outputs`
    incarnations: tuple[int, ...]
    device_us: int
    queued_us: int


@dataclass(frozen=True, slots=True)
class StepFailed:
    """A step that did not run to its end."""

    generation: int
    number: int
    epoch: int
    message: str
