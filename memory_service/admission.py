"""Who comes in: prefix hits, and whether the rest fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from memory_service.demand import Admission, RefusalReason
from memory_service.sequence_table import Sequence

if TYPE_CHECKING:
    from collections.abc import Callable

    from memory_service.block_hash import BlockHash, BlockHasher
    from memory_service.block_pool import BlockPool
    from memory_service.demand import Admit, IntArray, StepAnswer, StepDemand
    from memory_service.sequence_table import SequenceTable


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The part of a sequence that the cache has."""

    block_ids: list[int]
    missing_keys: list[BlockHash]  # of the full blocks behind it


class Admitter:
    """Admits new sequences into a pool."""

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        hasher: BlockHasher,
        clock: Callable[[], float],
        *,
        prefix_cache_enabled: bool,
    ) -> None:
        self.num_query_tokens = 0
        self.num_hit_tokens = 0
        self._pool = pool
        self._block_size = block_size
        self._hasher = hasher
        self._clock = clock
        self._prefix_cache_enabled = prefix_cache_enabled

    def admit_all(
        self, table: SequenceTable, demand: StepDemand, answer: StepAnswer, *, is_empty: bool
    ) -> None:
        """Admit in order; who is refused for lack of blocks keeps out all behind it.

        `is_empty` says that no sequence lives in the whole pool.
        """
        budget = demand.admit_token_budget
        is_full = bool(answer.refusals)  # a running sequence lacks blocks: nobody new comes in
        for admit in demand.admits:
            # Alone in the pool nobody is served by waiting.
            is_alone = is_empty and not answer.admissions
            left_over = 0 if is_alone else demand.watermark_blocks
            reason = (
                RefusalReason.NO_BLOCKS
                if is_full
                else self._admit(table, admit, budget, left_over, answer)
            )
            if reason is None:
                budget -= answer.admissions[-1].num_scheduled_tokens
            else:
                is_full = reason is RefusalReason.NO_BLOCKS
                answer.refusals.append((admit.row, reason))

    def _admit(
        self,
        table: SequenceTable,
        admit: Admit,
        budget: int,
        left_over: int,
        answer: StepAnswer,
    ) -> RefusalReason | None:
        if budget < 1:
            return RefusalReason.TOKEN_BUDGET
        hit = self._find_prefix(admit.token_ids)
        if hit.missing_keys and self._pool.index.is_in_progress(hit.missing_keys[0]):
            return RefusalReason.PREFIX_IN_PROGRESS
        if not self._fits(admit, hit, left_over):
            return RefusalReason.NO_BLOCKS
        answer.admissions.append(self._start(table, admit, hit, budget))
        return None

    def _find_prefix(self, token_ids: IntArray) -> PrefixHit:
        """Leading full blocks in the cache; at least one token is left to run."""
        if not self._prefix_cache_enabled:
            return PrefixHit([], [])
        keys = list(self._hasher.chain(None, token_ids[:-1], self._block_size))
        block_ids: list[int] = []
        for key in keys:
            block_id = self._pool.index.find(key)
            if block_id is None:
                break
            block_ids.append(block_id)
        return PrefixHit(block_ids, keys[len(block_ids) :])

    def _fits(self, admit: Admit, hit: PrefixHit, left_over: int) -> bool:
        """Whether all known tokens, and the siblings' first copies, would find blocks and leave `left_over`."""
        num_blocks = -(-len(admit.token_ids) // self._block_size) + admit.num_sequences - 1
        needed = num_blocks - len(hit.block_ids) + self._pool.num_unheld(hit.block_ids)
        return needed + left_over <= self._pool.num_available

    def _start(self, table: SequenceTable, admit: Admit, hit: PrefixHit, budget: int) -> Admission:
        num_tokens = len(admit.token_ids)
        num_cached = len(hit.block_ids) * self._block_size
        num_scheduled = min(num_tokens - num_cached, budget)
        for block_id in hit.block_ids:
            self._pool.acquire(block_id)
        num_new = -(-(num_cached + num_scheduled) // self._block_size) - len(hit.block_ids)
        new_ids = [self._pool.allocate() for _ in range(num_new)]
        block_table = np.array(hit.block_ids + new_ids, dtype=np.int32)
        keys = [key for block in hit.block_ids if (key := self._pool.index.key_of(block))]
        sequence = Sequence(
            admit.sequence_id,
            admit.request_id,
            admit.incarnation,
            num_cached,
            self._clock(),
            keys=keys,
            expected_keys=hit.missing_keys,
        )
        self._pool.index.begin(hit.missing_keys)
        table.add(admit.row, sequence, block_table, num_cached)
        self.num_query_tokens += num_tokens
        self.num_hit_tokens += num_cached
        return Admission(admit.row, num_cached, num_scheduled, block_table)
