"""What the engine remembers of each row: a cache of what it was told, and of what it sampled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from compute_service.step import StepError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from compute_service.sampling import RowSampling
    from compute_service.step import ForkRow, NewRow, Step

_KEPT_OUTPUTS = 2  # steps whose outputs a later step may name


class GrowingArray:
    """An int32 array that doubles: tokens and table entries are appended one by one."""

    __slots__ = ("_data", "_length")

    def __init__(self, values: NDArray[np.int32]) -> None:
        self._data = np.array(values, dtype=np.int32)
        self._length = len(values)

    def __len__(self) -> int:
        """Values held."""
        return self._length

    @property
    def values(self) -> NDArray[np.int32]:
        """All values, as a view."""
        return self._data[: self._length]

    def append(self, value: int) -> None:
        """Add one value."""
        if self._length == len(self._data):
            grown = np.empty(max(16, 2 * self._length), dtype=np.int32)
            grown[: self._length] = self._data
            self._data = grown
        self._data[self._length] = value
        self._length += 1


@dataclass(slots=True)
class Row:
    """One sequence as the engine knows it."""

    incarnation: int
    block_table: GrowingArray
    token_ids: GrowingArray  # every known token
    num_prompt_tokens: int
    sampling: RowSampling


class RowStore:
    """Rows by number, and the outputs of the last steps."""

    def __init__(self) -> None:
        self._rows: dict[int, Row] = {}
        self._outputs: dict[int, tuple[int, ...]] = {}  # step -> sampled token ids

    def __getitem__(self, row: int) -> Row:
        """The row; raises StepError when it is unknown."""
        found = self._rows.get(row)
        if found is None:
            message = f"row {row} is unknown"
            raise StepError(message)
        return found

    def clear(self) -> None:
        """Forget everything."""
        self._rows.clear()
        self._outputs.clear()

    def apply(self, step: Step) -> None:
        """Take in all that `step` tells, in the order that the contract names; raises StepError."""
        if step.reset:
            self.clear()
        for row in step.drop_rows:
            self._rows.pop(row, None)
        for new in step.new_rows:
            self._rows[new.row] = _row(new)
        for fork in step.forks:
            self._rows[fork.dst_row] = self._fork(fork)
        for row, block_id in step.appends:
            self[row].block_table.append(block_id)
        for row, index, block_id in step.remaps:
            self._remap(row, index, block_id)
        ends = dict(zip(step.rows, _ends(step), strict=True))
        for row, number, output in step.pending:
            self._resolve(row, self._output(number, output), ends.get(row, 0))

    def _fork(self, fork: ForkRow) -> Row:
        parent = self[fork.src_row]
        if len(parent.token_ids) < fork.num_tokens:
            message = f"row {fork.src_row} has fewer than {fork.num_tokens} tokens to share"
            raise StepError(message)
        child = Row(
            fork.dst_incarnation,
            GrowingArray(fork.block_table),
            GrowingArray(parent.token_ids.values[: fork.num_tokens]),
            parent.num_prompt_tokens,
            parent.sampling,
        )
        child.token_ids.append(self._output(fork.source_step, fork.source_output))
        return child

    def _remap(self, row: int, index: int, block_id: int) -> None:
        table = self[row].block_table.values
        if not 0 <= index < len(table):
            message = f"row {row} has no table entry {index}"
            raise StepError(message)
        table[index] = block_id

    def _resolve(self, row: int, token_id: int, end: int) -> None:
        """Make the output the last of the tokens `[0, end)` of its row; a row's own output is there already."""
        token_ids = self[row].token_ids
        if len(token_ids) == end - 1:
            token_ids.append(token_id)
        elif len(token_ids) != end or token_ids.values[-1] != token_id:
            message = f"row {row}: the pending token is not its last one before {end}"
            raise StepError(message)

    def _output(self, step: int, output: int) -> int:
        outputs = self._outputs.get(step, ())
        if not 0 <= output < len(outputs):
            message = f"output {output} of step {step} is not known any more"
            raise StepError(message)
        return outputs[output]

    def keep_outputs(self, step: Step, token_ids: tuple[int, ...]) -> None:
        """Append each sampled token to its row, and keep them for the steps that follow.

        A row that is sampled several times keeps the first: the others are fetched by forks.
        """
        seen: set[int] = set()
        for (row, _), token_id in zip(step.outputs, token_ids, strict=True):
            if row not in seen:
                self[row].token_ids.append(token_id)
            seen.add(row)
        self._outputs[step.number] = token_ids
        for number in sorted(self._outputs)[:-_KEPT_OUTPUTS]:
            del self._outputs[number]


def _ends(step: Step) -> list[int]:
    return [start + count for start, count in zip(step.starts, step.num_tokens, strict=True)]


def _row(new: NewRow) -> Row:
    return Row(
        new.incarnation,
        GrowingArray(new.block_table),
        GrowingArray(new.token_ids),
        new.num_prompt_tokens,
        new.sampling,
    )


def sampling_of(row: Row, sample_index: int) -> RowSampling:
    """The row's settings for one of its samples."""
    if row.sampling.sample_index == sample_index:
        return row.sampling
    return replace(row.sampling, sample_index=sample_index)
