"""From rows to the packed tensors of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from compute_service.rows import sampling_of
from compute_service.sampling import SampleRow
from compute_service.step import StepError
from kernels.batch import PagedBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

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
class _Span:
    """Tokens `[start, end)` of a row, in one step."""

    number: int
    row: Row
    start: int
    end: int


def pack_step(step: Step, rows: RowStore, block_size: int, device: torch.device) -> PackedStep:
    """Pack `step`: rows with one token first, as the decode kernel wants them.

    Raises:
        StepError: when a row does not know the tokens it should run, or its table does not cover them.
    """
    spans = _spans(step, rows, block_size)
    spans.sort(key=lambda span: span.end - span.start > 1)
    lengths = np.array([span.end - span.start for span in spans], dtype=np.int32)
    query_start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tables = _block_tables(spans)
    positions = np.concatenate([np.arange(span.start, span.end) for span in spans])
    owners = np.repeat(np.arange(len(spans)), lengths)
    slots = tables[owners, positions // block_size].astype(np.int64) * block_size
    token_ids = np.concatenate([span.row.token_ids.values[span.start : span.end] for span in spans])
    last = {span.number: int(query_start[index + 1]) - 1 for index, span in enumerate(spans)}
    outputs = _Outputs(step, rows, last)
    return PackedStep(
        token_ids=_tensor(token_ids.astype(np.int64), device),
        position_ids=_tensor(positions.astype(np.int64), device),
        batch=PagedBatch(
            block_tables=_tensor(tables, device),
            query_start=_tensor(query_start, device),
            context_lens=_tensor(np.array([span.end for span in spans], dtype=np.int32), device),
            slot_mapping=_tensor(slots + positions % block_size, device),
            num_decodes=int((lengths == 1).sum()),
            max_query_len=int(lengths.max()),
            max_context_len=max(span.end for span in spans),
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


def _spans(step: Step, rows: RowStore, block_size: int) -> list[_Span]:
    spans = []
    for number, start, num_tokens in zip(step.rows, step.starts, step.num_tokens, strict=True):
        row = rows[number]
        span = _Span(number, row, start, start + num_tokens)
        if num_tokens < 1 or start < 0 or span.end > len(row.token_ids):
            known = len(row.token_ids)
            message = f"row {number} cannot run [{start}, {span.end}): {known} tokens are known"
            raise StepError(message)
        if span.end > len(row.block_table) * block_size:
            message = f"row {number}: its table does not cover position {span.end - 1}"
            raise StepError(message)
        spans.append(span)
    if not spans:
        message = "the step runs no row"
        raise StepError(message)
    return spans


def _block_tables(spans: Sequence[_Span]) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    width = max(len(span.row.block_table) for span in spans)
    tables = np.zeros((len(spans), width), dtype=np.int32)
    for index, span in enumerate(spans):
        tables[index, : len(span.row.block_table)] = span.row.block_table.values
    return tables


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
        prompt_token_ids=known[: row.num_prompt_tokens].astype(np.int64),
        output_token_ids=known[row.num_prompt_tokens :].astype(np.int64),
        num_output_tokens=len(known) - row.num_prompt_tokens,
    )


def _tensor(
    values: np.ndarray[tuple[int, ...], np.dtype[np.generic]], device: torch.device
) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)
