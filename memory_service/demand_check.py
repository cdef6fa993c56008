"""Whether a demand keeps the contract: checked whole, before anything of it is applied."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import numpy as np

from memory_service.tenants import MAX_TENANT_CHARS, PUBLIC_TENANT
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
        self._is_live = table.is_live
        self._num_computed = table.num_computed
        self._num_blocks = table.num_blocks

    def check(self, demand: StepDemand) -> None:
        """Raise `BrokenContract` when a part of `demand` cannot be meant."""
        self._num_computed = self._num_computed.copy()
        if demand.releases or demand.forks or demand.admits:
            self._is_live = self._is_live.copy()
            self._num_blocks = self._num_blocks.copy()
        self._check_commits(demand)
        self._check_releases(demand)
        self._check_forks(demand)
        self._check_extends(demand)
        self._check_admits(demand)

    def _check_range(self, row: int) -> None:
        if not 0 <= row < self._table.max_num_rows:
            self._fail(f"row {row} is not among the session's {self._table.max_num_rows}", row)

    def _check_live(self, row: int) -> None:
        self._check_range(row)
        if not self._is_live[row]:
            self._fail(f"no sequence lives in row {row}", row)

    def _check_unused(self, row: int) -> None:
        self._check_range(row)
        if self._is_live[row]:
            self._fail(f"a sequence lives in row {row} already", row)

    def _check_rows(self, rows: IntArray, *parallel: IntArray) -> None:
        if any(len(found) != len(rows) for found in parallel):
            self._fail("parallel arrays of different lengths")
        if not len(rows):
            return
        if rows.min() < 0 or rows.max() >= self._table.max_num_rows:
            self._check_range(int(rows.min()))
            self._check_range(int(rows.max()))
        if not self._is_live[rows].all():
            self._check_live(int(rows[~self._is_live[rows]][0]))
        is_named = np.zeros(self._table.max_num_rows, dtype=np.bool_)
        is_named[rows] = True
        if np.count_nonzero(is_named) != len(rows):
            self._fail("a row is named twice")

    def _check_commits(self, demand: StepDemand) -> None:
        rows, counts = demand.commit_rows, demand.commit_num_computed_tokens
        self._check_rows(rows, counts)
        old = self._num_computed[rows]
        size = self._block_size
        wrong = (counts < old) | (counts > self._num_blocks[rows] * size)
        if wrong.any():
            row = int(rows[wrong][0])
            self._fail(f"row {row} commits tokens that it gave up or has no slots for", row)
        num_ids = int((counts // size - old // size).sum()) * size
        if num_ids != len(demand.commit_token_ids):
            self._fail(f"{num_ids} token ids are committed, {len(demand.commit_token_ids)} named")
        self._num_computed[rows] = counts

    def _check_releases(self, demand: StepDemand) -> None:
        if demand.release_reasons and len(demand.release_reasons) != len(demand.releases):
            self._fail("parallel arrays of different lengths")
        for row in demand.releases:
            self._check_live(row)
            self._is_live[row] = False

    def _check_forks(self, demand: StepDemand) -> None:
        begun: dict[int, tuple[int, int]] = {}  # row -> computed tokens, blocks
        for fork in demand.forks:
            self._check_live(fork.src_row)
            self._check_unused(fork.dst_row)
            if fork.src_row in begun:
                self._fail(f"row {fork.src_row} is forked in the step that makes it", fork.src_row)
            if not 1 <= fork.num_tokens <= self._num_blocks[fork.src_row] * self._block_size:
                self._fail(f"row {fork.src_row} has no {fork.num_tokens} tokens to share")
            computed = min(int(self._num_computed[fork.src_row]), fork.num_tokens)
            begun[fork.dst_row] = (computed, -(-fork.num_tokens // self._block_size))
            self._is_live[fork.dst_row] = True
        for row, (computed, num_blocks) in begun.items():
            self._num_computed[row], self._num_blocks[row] = computed, num_blocks

    def _check_extends(self, demand: StepDemand) -> None:
        rows, starts, counts = demand.extend_rows, demand.extend_starts, demand.extend_num_tokens
        self._check_rows(rows, starts, counts)
        computed = self._num_computed[rows]
        wrong = (starts < computed) | (starts > self._num_blocks[rows] * self._block_size)
        wrong |= (counts < 1) | (counts > _MAX_TOKENS)
        if wrong.any():
            row, start, count, done = (
                int(found[wrong][0]) for found in (rows, starts, counts, computed)
            )
            self._fail(f"row {row} runs {count} tokens from {start}; {done} are done", row)

    def _check_admits(self, demand: StepDemand) -> None:
        if demand.watermark_blocks < 0:
            self._fail(f"a watermark of {demand.watermark_blocks} blocks")
        for admit in demand.admits:
            self._check_unused(admit.row)
            self._is_live[admit.row] = True
            if not len(admit.token_ids) or admit.num_sequences < 1:
                self._fail(f"row {admit.row} is admitted without tokens or sequences", admit.row)
            if admit.num_sequences > self._table.max_num_rows:
                self._fail(f"row {admit.row} is admitted with more sequences than there are rows")
            if len(admit.tenant) > MAX_TENANT_CHARS or admit.tenant == PUBLIC_TENANT:
                self._fail(f"row {admit.row} has a tenant of no possible name", admit.row)

    def _fail(self, message: str, row: int | None = None) -> NoReturn:
        raise BrokenContract(message, metadata={} if row is None else {"row": row})
