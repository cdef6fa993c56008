"""Who comes in: prefix hits, and whether the rest fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from memory_service.demand import Admission, RefusalReason, Shortage
from memory_service.ledger import NewSequence
from memory_service.record import AdmissionRecord

if TYPE_CHECKING:
    from memory_service.demand import Admit, StepAnswer, StepDemand
    from memory_service.ledger import Ledger
    from memory_service.prefix_lookup import PrefixHit, PrefixLookup
    from memory_service.session_books import SessionBooks
    from memory_service.tenants import Tenant


@dataclass(frozen=True, slots=True)
class _Need:
    """Blocks that an admission takes."""

    num_taken: int  # fewer are available afterwards
    num_charged: int  # more count against the tenant, or cannot be evicted for it
    num_own: int  # would count against the tenant if it had nothing else


class Admitter:
    """Admits new sequences into a pool."""

    def __init__(self, ledger: Ledger, lookup: PrefixLookup) -> None:
        self._ledger = ledger
        self._lookup = lookup

    def admit_all(
        self, books: SessionBooks, demand: StepDemand, answer: StepAnswer, *, is_empty: bool
    ) -> list[AdmissionRecord]:
        """Admit in order; who is refused for lack of blocks keeps out all behind it.

        A tenant at its quota keeps out only its own. `is_empty` says that no sequence lives in the whole pool.
        """
        records: list[AdmissionRecord] = []
        budget = demand.admit_token_budget
        # Running sequences lack blocks: nobody new comes in, or nobody of their tenants.
        is_full = any(found.reason is RefusalReason.NO_BLOCKS for found in answer.shortages)
        barred = {found.tenant for found in answer.shortages}
        for admit in demand.admits:
            # Alone in the pool nobody is served by waiting.
            left_over = 0 if is_empty and not records else demand.watermark_blocks
            outcome: AdmissionRecord | Shortage
            if is_full:
                outcome = self._shortage(admit, RefusalReason.NO_BLOCKS)
            elif admit.tenant in barred:
                outcome = self._shortage(admit, RefusalReason.OVER_QUOTA)
            else:
                outcome = self._admit(books, demand.step, admit, budget, left_over, answer)
            if isinstance(outcome, AdmissionRecord):
                records.append(outcome)
                budget -= answer.admissions[-1].num_scheduled_tokens
                continue
            is_full = outcome.reason is RefusalReason.NO_BLOCKS
            if outcome.reason is RefusalReason.OVER_QUOTA:
                barred.add(admit.tenant)
            answer.refuse(admit.row, outcome)
        return records

    def _admit(
        self,
        books: SessionBooks,
        step: int,
        admit: Admit,
        budget: int,
        left_over: int,
        answer: StepAnswer,
    ) -> AdmissionRecord | Shortage:
        if budget < 1:
            return self._shortage(admit, RefusalReason.TOKEN_BUDGET)
        tenant = self._ledger.pool.tenant_as_is(admit.tenant)
        hit = self._lookup.find(admit.token_ids, tenant.salt)
        if hit.missing_keys and self._ledger.pool.index.is_in_progress(hit.missing_keys[0]):
            return self._shortage(admit, RefusalReason.PREFIX_IN_PROGRESS)
        shortage = self._find_shortage(admit, tenant, hit, left_over)
        if shortage is not None and hit.partial_block:
            # The source of a copy takes a block besides the copy: who needs every block does without.
            hit = hit.without_copy()
            shortage = self._find_shortage(admit, tenant, hit, left_over)
        return shortage or self._start(books, step, admit, hit, budget, answer)

    def _find_shortage(
        self, admit: Admit, tenant: Tenant, hit: PrefixHit, left_over: int
    ) -> Shortage | None:
        """Whether all known tokens, and the siblings' first copies, would find blocks and leave `left_over`."""
        pool = self._ledger.pool
        need = self._need(admit, tenant, hit)
        if tenant.hard_blocks is not None:
            allowed = tenant.hard_blocks - tenant.num_blocks + tenant.num_cached
            if need.num_charged > allowed:
                is_hopeless = need.num_own > tenant.hard_blocks
                reason = (
                    RefusalReason.LARGER_THAN_QUOTA if is_hopeless else RefusalReason.OVER_QUOTA
                )
                return self._shortage(admit, reason, need.num_charged, max(0, allowed))
        if need.num_taken + left_over > pool.num_available:
            available = max(0, pool.num_available - left_over)
            return self._shortage(admit, RefusalReason.NO_BLOCKS, need.num_taken, available)
        return None

    def _need(self, admit: Admit, tenant: Tenant, hit: PrefixHit) -> _Need:
        pool = self._ledger.pool
        num_total = -(-len(admit.token_ids) // self._ledger.block_size) + admit.num_sequences - 1
        num_new = num_total - len(hit.block_ids)
        held = [*hit.block_ids, hit.partial_block] if hit.partial_block else hit.block_ids
        unheld = pool.num_unheld(held)
        if tenant.hard_blocks is None:
            return _Need(num_new + unheld, 0, 0)
        homes = {home.home_id for home in tenant.homes.values()}
        own = [block_id for block_id in held if int(pool.home_ids[block_id]) in homes]
        return _Need(num_new + unheld, num_new + pool.num_unheld(own), num_new + len(own))

    def _start(
        self,
        books: SessionBooks,
        step: int,
        admit: Admit,
        hit: PrefixHit,
        budget: int,
        answer: StepAnswer,
    ) -> AdmissionRecord:
        size, num_tokens = self._ledger.block_size, len(admit.token_ids)
        num_cached = hit.num_tokens(size)
        num_scheduled = min(num_tokens - num_cached, budget)
        new = NewSequence(
            admit.row,
            admit.incarnation,
            admit.sequence_id,
            admit.request_id,
            admit.tenant,
            num_tokens,
            num_cached,
            hit.block_ids,
            -(-(num_cached + num_scheduled) // size) - len(hit.block_ids),
            hit.partial_block,
            hit.missing_keys,
        )
        record = new.record(self._ledger.admit(books, step, new), b"".join(hit.missing_keys))
        books.table.num_reserved[admit.row] = num_cached + num_scheduled
        if hit.partial_block:
            target = int(record.block_table[len(hit.block_ids)])
            answer.copies.append((hit.partial_block, target))
        answer.admissions.append(
            Admission(admit.row, num_cached, num_scheduled, record.block_table)
        )
        return record

    def _shortage(
        self, admit: Admit, reason: RefusalReason, num_needed: int = 0, num_available: int = 0
    ) -> Shortage:
        return Shortage(
            admit.sequence_id, admit.request_id, admit.tenant, reason, num_needed, num_available
        )
