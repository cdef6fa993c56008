"""Whether a demand keeps the contract: checked whole, before anything of it is applied."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import numpy as np

from quire.errors import BrokenContract

if TYPE_CHECKING:
    from memory_service.demand import IntArray, StepDemand
    from memory_service.sequence_table import SequenceTable

_MAX_TOKENS = 1 << 24  # of a row in a step: far above any, far below an overflow


class DemandCheck:
    """Checks the demands of one session; follows which rows will be live as the demand is applied."""

    def __init__(self, table: SequenceTable, block_size: int) -> None:
        self._table = table
        self._block_size = block_size
        self._ended: set[int] = set()
        self._begun: dict[int, int] = {}  # row -> acknowledged tokens it begins with
        self._begun_slots: dict[int, int] = {}  # row -> slots of the table it begins with
        self._computed = table.num_computed

    def check(self, demand: StepDemand) -> None:
        """Raise `BrokenContract` when a part of `demand` cannot be meant."""
        self._check_commits(demand)
        self._check_releases(demand)
        self._check_forks(demand)
        self._check_extends(demand)
        self._check_admits(demand)

    def _is_live(self, row: int) -> bool:
        return row in self._begun or (row in self._table and row not in self._ended)

    def _check_live(self, row: int) -> None:
        if not self._is_live(row):
            self._fail(f"no sequence lives in row {row}", row)

    def _check_unused(self, row: int) -> None:
        if not 0 <= row < self._table.max_num_rows:
            self._fail(f"row {row} is not among the session's {self._table.max_num_rows}", row)
        if self._is_live(row):
            self._fail(f"a sequence lives in row {row} already", row)

    def _check_commits(self, demand: StepDemand) -> None:
        rows, counts = demand.commit_rows, demand.commit_num_computed_tokens
        self._check_rows(rows, counts)
        old = self._table.num_computed[rows]
        size = self._block_size
        for row in rows[(counts < old) | (counts > self._table.num_blocks[rows] * size)]:
            self._fail(f"row {row} commits tokens that it gave up or has no slots for", int(row))
        num_ids = int((counts // size - old // size).sum()) * size
        if num_ids != len(demand.commit_token_ids):
            self._fail(f"{num_ids} token ids are committed, {len(demand.commit_token_ids)} named")
        self._computed = self._table.num_computed.copy()
        self._computed[rows] = counts

    def _check_rows(self, rows: IntArray, *parallel: IntArray) -> None:
        if any(len(found) != len(rows) for found in parallel):
            self._fail("parallel arrays of different lengths")
        if len(np.unique(rows)) != len(rows):
            self._fail("a row is named twice")
        for row in rows.tolist():
            self._check_live(row)

    def _check_releases(self, demand: StepDemand) -> None:
        for row in demand.releases:
            self._check_live(row)
            self._ended.add(row)

    def _check_forks(self, demand: StepDemand) -> None:
        for fork in demand.forks:
            self._check_live(fork.src_row)
            self._check_unused(fork.dst_row)
            if fork.src_row in self._begun:
                self._fail(f"row {fork.src_row} is forked in the step that makes it", fork.src_row)
            slots = int(self._table.num_blocks[fork.src_row]) * self._block_size
            if not 1 <= fork.num_tokens <= slots:
                self._fail(f"row {fork.src_row} has no {fork.num_tokens} tokens to share")
            computed = int(self._computed[fork.src_row])
            num_blocks = -(-fork.num_tokens // self._block_size)
            self._begun_slots[fork.dst_row] = num_blocks * self._block_size
            self._begun[fork.dst_row] = min(computed, fork.num_tokens)

    def _check_extends(self, demand: StepDemand) -> None:
        rows = demand.extend_rows
        self._check_rows(rows, demand.extend_starts, demand.extend_num_tokens)
        for row, start, count in zip(
            rows.tolist(),
            demand.extend_starts.tolist(),
            demand.extend_num_tokens.tolist(),
            strict=True,
        ):
            computed = self._begun.get(row, int(self._computed[row]))
            if not computed <= start <= self._num_slots(row) or not 1 <= count <= _MAX_TOKENS:
                self._fail(f"row {row} runs {count} tokens from {start}; {computed} are done", row)

    def _num_slots(self, row: int) -> int:
        return self._begun_slots.get(row, int(self._table.num_blocks[row]) * self._block_size)

    def _check_admits(self, demand: StepDemand) -> None:
        if demand.watermark_blocks < 0:
            self._fail(f"a watermark of {demand.watermark_blocks} blocks")
        for admit in demand.admits:
            self._check_unused(admit.row)
            self._begun[admit.row] = 0
            if not len(admit.token_ids) or admit.num_sequences < 1:
                self._fail(f"row {admit.row} is admitted without tokens or sequences", admit.row)

    def _fail(self, message: str, row: int | None = None) -> NoReturn:
        raise BrokenContract(message, metadata={} if row is None else {"row": row})
