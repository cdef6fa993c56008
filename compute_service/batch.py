"""From rows to the packed tensors of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compute_service.rows import sampling_of
from compute_service.sampling import SampleRow
from compute_service.step import StepError
from kernels.batch import PagedBatch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from compute_service.rows import Row, RowStore
    from compute_service.step import Step


@dataclass(frozen=True, slots=True)
class PackedStep:
    """The tensors of one forward pass over T packed tokens."""

    token_ids: Tensor  # int64 [T]
    position_ids: Tensor  # int64 [T]
    batch: PagedBatch
    output_rows: Tensor  # int64 [n]: packed positions whose logits are wanted
    sample_rows: tuple[SampleRow, ...]  # in the order of the step's outputs


@dataclass(frozen=True, slots=True)
class _Spans:
    """Tokens `[starts, ends)` of rows in one step, an element a row."""

    numbers: list[int]
    rows: list[Row]
    starts: NDArray[np.int32]
    ends: NDArray[np.int32]

    @classmethod
    def of(cls, step: Step, rows: RowStore) -> _Spans:
        """Rows that run one token come first, as the decode kernel wants them."""
        starts, counts = np.array(step.starts, np.int32), np.array(step.num_tokens, np.int32)
        order = np.argsort(counts > 1, kind="stable")
        numbers = [step.rows[index] for index in order]
        starts = starts[order]
        return cls(numbers, [rows[number] for number in numbers], starts, starts + counts[order])

    def check(self, block_size: int) -> None:
        """Raises StepError when a row does not know its tokens, or its table does not cover them."""
        if not self.numbers:
            raise StepError("the step runs no row")
        known = np.array([len(row.token_ids) for row in self.rows])
        covered = block_size * np.array([len(row.block_table) for row in self.rows])
        starts, ends = self.starts, self.ends
        for index in ((starts < 0) | (ends <= starts) | (ends > known)).nonzero()[0]:
            span = f"[{starts[index]}, {ends[index]})"
            message = (
                f"row {self.numbers[index]} cannot run {span}: {known[index]} tokens are known"
            )
            raise StepError(message)
        for index in (ends > covered).nonzero()[0]:
            number, last = self.numbers[index], ends[index] - 1
            raise StepError(f"row {number}: its table does not cover position {last}")

    def token_ids(self) -> NDArray[np.int64]:
        """All tokens, packed."""
        each = zip(self.rows, self.starts.tolist(), self.ends.tolist(), strict=True)
        found = [row.token_ids.values[start:end] for row, start, end in each]
        return np.concatenate(found, dtype=np.int64)

    def block_tables(self) -> NDArray[np.int32]:
        """A table a row, with zeros behind its end."""
        found = [row.block_table.values for row in self.rows]
        tables = np.zeros((len(found), max(map(len, found))), dtype=np.int32)
        for index, table in enumerate(found):
            tables[index, : len(table)] = table
        return tables


def pack_step(step: Step, rows: RowStore, block_size: int, device: torch.device) -> PackedStep:
    """Pack `step`: rows with one token first.

    Raises:
        StepError: when a row does not know the tokens it should run, or its table does not cover them.
    """
    spans = _Spans.of(step, rows)
    spans.check(block_size)
    lengths = spans.ends - spans.starts
    query_start = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=query_start[1:])
    owners = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(query_start[-1]) + (spans.starts - query_start[:-1])[owners]
    tables = spans.block_tables()
    slots = tables[owners, positions // block_size].astype(np.int64) * block_size
    last = dict(zip(spans.numbers, (query_start[1:] - 1).tolist(), strict=True))
    outputs = _Outputs(step, rows, last)
    return PackedStep(
        token_ids=_tensor(spans.token_ids(), device),
        position_ids=_tensor(positions, device),
        batch=PagedBatch(
            block_tables=_tensor(tables, device),
            query_start=_tensor(query_start, device),
            context_lens=_tensor(spans.ends, device),
            slot_mapping=_tensor(slots + positions % block_size, device),
            num_decodes=int((lengths == 1).sum()),
            max_query_len=int(lengths.max()),
            max_context_len=int(spans.ends.max()),
        ),
        output_rows=_tensor(np.array(outputs.packed, dtype=np.int64), device),
        sample_rows=tuple(outputs.sample_rows),
    )


def null_batch(device: torch.device) -> PagedBatch:
    """A decode and a chunk of two tokens, all in the null block."""
    return PagedBatch(
        block_tables=torch.zeros(2, 1, dtype=torch.int32, device=device),
        query_start=torch.tensor([0, 1, 3], dtype=torch.int32, device=device),
        context_lens=torch.tensor([1, 2], dtype=torch.int32, device=device),
        slot_mapping=torch.zeros(3, dtype=torch.int64, device=device),
        num_decodes=1,
        max_query_len=2,
        max_context_len=2,
    )


class _Outputs:
    """Logit rows wanted once each, and the samples drawn from them."""

    def __init__(self, step: Step, rows: RowStore, last: dict[int, int]) -> None:
        self.packed: list[int] = []
        self.sample_rows: list[SampleRow] = []
        logits_rows: dict[int, int] = {}
        for number, sample_index in step.outputs:
            if number not in last:
                message = f"row {number} is sampled but does not run"
                raise StepError(message)
            if number not in logits_rows:
                logits_rows[number] = len(self.packed)
                self.packed.append(last[number])
            self.sample_rows.append(_sample_row(rows[number], sample_index, logits_rows[number]))


def _sample_row(row: Row, sample_index: int, logits_row: int) -> SampleRow:
    known = row.token_ids.values
    return SampleRow(
        logits_row=logits_row,
        sampling=sampling_of(row, sample_index),
        position=len(known),
        prompt_token_ids=known[: row.num_prompt_tokens],
        output_token_ids=known[row.num_prompt_tokens :],
        num_output_tokens=len(known) - row.num_prompt_tokens,
    )


def _tensor(values: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)
