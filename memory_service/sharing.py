"""How tenants share the pool: quotas, retention, flushes, published prefixes. Wishes are met whole, in part, or not."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import TYPE_CHECKING, Final

import numpy as np

from memory_service.block_hash import PUBLIC_SALT, tenant_salt
from memory_service.flushing import next_part, plan_flush
from memory_service.record import (
    Flushed,
    PrefixPublished,
    PrefixWithdrawn,
    QuotaSet,
    Retained,
    RetentionEnded,
)
from memory_service.retention import MAX_PUBLISHED, MAX_RETENTIONS, MAX_RETENTIONS_OF_ONE

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from memory_service.demand import IntArray
    from memory_service.flushing import FlushPlan
    from memory_service.ledger import Ledger
    from memory_service.prefix_lookup import PrefixLookup
    from memory_service.record import Change
    from memory_service.tenants import Tenant

FLUSH_CHUNK: Final = 1024  # blocks that one part of a flush forgets


class Verdict(Enum):
    """How a wish was met."""

    ACCEPTED = 1
    CLIPPED = 2
    REJECTED = 3


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a wish."""

    verdict: Verdict
    reason: str = ""  # why not whole
    made_id: int = 0  # of the retention or the published prefix
    num_blocks: int = 0  # or tokens, for a published prefix


@dataclass(frozen=True, slots=True)
class FlushOutcome:
    """What one flush forgot."""

    num_freed: int = 0
    num_used: int = 0
    is_done: bool = True  # False: there may be more


class Sharing:
    """Changes that no request needs. Each is made within `changing` and told with `tell`."""

    def __init__(
        self,
        ledger: Ledger,
        lookup: PrefixLookup,
        changing: Callable[[], AbstractContextManager[None]],
        tell: Callable[[Change], None],
    ) -> None:
        self._ledger = ledger
        self._lookup = lookup
        self._changing = changing
        self._tell = tell

    def salt(self, tenant: str) -> bytes:
        """What separates the keys of `tenant`, be it known or not."""
        return tenant_salt(tenant)

    # Quotas

    def set_quota(self, tenant: str, soft_blocks: int | None, hard_blocks: int | None) -> None:
        """Bound a tenant from the next answer on; None is no bound."""
        with self._changing():
            apply_quota(self._ledger, tenant, soft_blocks, hard_blocks)
            self._tell(QuotaSet(tenant, soft_blocks, hard_blocks))

    # Retention

    def retain_prefix(
        self, tenant: str, token_ids: IntArray, priority: int, expires_at: float | None
    ) -> Outcome:
        """Retain the leading full blocks of `token_ids` that are there."""
        keys = self._lookup.keys(token_ids, self.salt(tenant))
        found: list[int] = []
        for key in keys:
            block_id = self._ledger.pool.index.find(key)
            if not block_id:
                break
            found.append(block_id)
        if not found:
            return Outcome(Verdict.REJECTED, "no full block of these tokens is cached")
        missing = len(keys) - len(found)
        reason = f"{missing} of {len(keys)} blocks are not cached" if missing else ""
        return self._retain(tenant, found, priority, expires_at, reason)

    def retain_sequence(
        self, tenant: str, sequence_id: str, priority: int, expires_at: float | None
    ) -> Outcome:
        """Retain what a live sequence of `tenant` has sealed, and what it will seal."""
        for session_key, books in self._ledger.sessions.items():
            for row, sequence in books.table.items():
                if (sequence.sequence_id, sequence.tenant.name) == (sequence_id, tenant):
                    num_full = int(books.table.num_computed[row]) // self._ledger.block_size
                    found = books.table.block_table(row)[:num_full].tolist()
                    where = (session_key, row)
                    return self._retain(tenant, found, priority, expires_at, "", where)
        return Outcome(Verdict.REJECTED, f"no sequence {sequence_id!r} of this tenant lives")

    def _retain(
        self,
        tenant_name: str,
        block_ids: list[int],
        priority: int,
        expires_at: float | None,
        reason: str,
        where: tuple[int, int] = (0, 0),
    ) -> Outcome:
        retentions = self._ledger.retentions
        if len(retentions.by_id) >= MAX_RETENTIONS:
            return Outcome(Verdict.REJECTED, f"there are {MAX_RETENTIONS} retentions already")
        num_own = sum(found.home.tenant.name == tenant_name for found in retentions.by_id.values())
        if num_own >= MAX_RETENTIONS_OF_ONE:
            reason = f"this tenant has {MAX_RETENTIONS_OF_ONE} retentions already"
            return Outcome(Verdict.REJECTED, reason)
        tenant = self._ledger.pool.tenant_as_is(tenant_name)
        room = retentions.room(tenant)
        may_take = [found for found in block_ids if retentions.may_take(found, priority)]
        if len(may_take) < len(block_ids):
            reason = "retentions of a higher priority hold some of the blocks"
        payable = self._within_quota(tenant, may_take)
        if len(payable) < len(may_take):
            reason = "the hard quota allows no more blocks that all share so far"
            may_take = payable
        if len(may_take) > room:
            reason = f"only {room} more blocks may be retained: half of the pool, half of a quota"
        taken = np.array(may_take[:room], dtype=np.int32)
        if block_ids and not len(taken):
            return Outcome(Verdict.REJECTED, reason)
        change = Retained(retentions.last_id + 1, tenant_name, priority, expires_at, taken, *where)
        with self._changing():
            apply_retained(self._ledger, change)
            self._tell(change)
        verdict = Verdict.CLIPPED if reason else Verdict.ACCEPTED
        return Outcome(verdict, reason, change.retention_id, len(taken))

    def _within_quota(self, tenant: Tenant, block_ids: list[int]) -> list[int]:
        """Those that the tenant pays for already, and as many of the others as its hard quota leaves room for."""
        if tenant.hard_blocks is None:
            return block_ids
        homes = (self._ledger.pool.home_of(block_id) for block_id in block_ids)
        is_new = [home is None or home.tenant is not tenant for home in homes]
        room = max(0, tenant.hard_blocks - tenant.num_blocks)
        return [
            block_id
            for block_id, new, before in zip(block_ids, is_new, accumulate(is_new), strict=True)
            if not new or before <= room
        ]

    def release(self, tenant: str, retention_id: int) -> Outcome:
        """End a retention of `tenant`."""
        found = self._ledger.retentions.by_id.get(retention_id)
        if found is None or found.home.tenant.name != tenant:
            return Outcome(Verdict.REJECTED, "this tenant has no such retention")
        self._end(retention_id)
        return Outcome(Verdict.ACCEPTED)

    def expire(self, now: float) -> int:
        """End the retentions whose time is over; how many."""
        expired = self._ledger.retentions.expired(now)
        for retention_id in expired:
            self._end(retention_id)
        return len(expired)

    def _end(self, retention_id: int) -> None:
        with self._changing():
            self._ledger.retentions.end(retention_id)
            self._tell(RetentionEnded(retention_id))

    # Flush

    def plan_flush(self, tenant: str, token_ids: IntArray) -> FlushPlan:
        """What is forgotten of `tenant`: all, or what begins with `token_ids`. Changes nothing."""
        return plan_flush(self._ledger, tenant, token_ids)

    def flush_part(self, plan: FlushPlan) -> FlushOutcome:
        """Forget the next `FLUSH_CHUNK` blocks of a plan; what was sealed since it was made is not among them."""
        chosen = next_part(self._ledger, plan, FLUSH_CHUNK)
        if not chosen:
            return FlushOutcome(is_done=plan.is_done)
        num_free = self._ledger.pool.num_free
        with self._changing():
            apply_flush(self._ledger, chosen)
            self._tell(Flushed(np.array(chosen, dtype=np.int32)))
        num_freed = self._ledger.pool.num_free - num_free
        return FlushOutcome(num_freed, len(chosen) - num_freed, plan.is_done)

    # Published prefixes

    def publish(self, token_ids: IntArray) -> Outcome:
        """Let all tenants share the full blocks of `token_ids`."""
        ledger, retentions = self._ledger, self._ledger.retentions
        chain = ledger.hasher.chain(
            ledger.hasher.root, token_ids.tobytes(), ledger.block_size, PUBLIC_SALT
        )
        keys = tuple(chain)
        if not keys:
            return Outcome(Verdict.REJECTED, "the tokens do not fill a block")
        num_tokens = len(keys) * ledger.block_size
        rest = len(token_ids) - num_tokens
        reason = f"the last {rest} tokens do not fill a block" if rest else ""
        verdict = Verdict.CLIPPED if rest else Verdict.ACCEPTED
        for prefix_id, published in retentions.published.items():
            if published == keys:
                return Outcome(verdict, reason, prefix_id, num_tokens)
        if len(retentions.published) >= MAX_PUBLISHED:
            return Outcome(Verdict.REJECTED, f"{MAX_PUBLISHED} prefixes are published already")
        num_keys = sum(map(len, retentions.published.values())) + len(keys)
        if num_keys > ledger.pool.num_blocks:
            return Outcome(Verdict.REJECTED, "published prefixes would be longer than the pool")
        change = PrefixPublished(retentions.last_prefix_id + 1, keys)
        with self._changing():
            retentions.publish(change.prefix_id, keys)
            self._lookup.prefixes_changed()
            self._tell(change)
        return Outcome(verdict, reason, change.prefix_id, num_tokens)

    def withdraw(self, prefix_id: int) -> Outcome:
        """End the sharing of a prefix."""
        if prefix_id not in self._ledger.retentions.published:
            return Outcome(Verdict.REJECTED, "no published prefix has this id")
        with self._changing():
            self._ledger.retentions.withdraw(prefix_id)
            self._lookup.prefixes_changed()
            self._tell(PrefixWithdrawn(prefix_id))
        return Outcome(Verdict.ACCEPTED)


# What a fold repeats


def apply_quota(
    ledger: Ledger, tenant_name: str, soft_blocks: int | None, hard_blocks: int | None
) -> Tenant:
    """Bound a tenant; the tenant."""
    tenant = ledger.pool.tenant(tenant_name)
    ledger.pool.set_quota(tenant, soft_blocks, hard_blocks)
    ledger.pool.note_idle(tenant)
    ledger.pool.forget_idle_tenants()
    return tenant


def apply_retained(ledger: Ledger, change: Retained) -> None:
    """Begin a retention."""
    retentions = ledger.retentions
    retention = retentions.begin(
        change.retention_id, change.tenant, change.priority, change.expires_at
    )
    retentions.take(retention, change.block_ids.tolist())
    if change.session_key:
        retentions.cover(ledger.sessions[change.session_key].table[change.row], retention)
    ledger.pool.forget_idle_tenants()


def apply_flush(ledger: Ledger, block_ids: list[int]) -> None:
    """Forget blocks."""
    for block_id in block_ids:
        ledger.pool.forget(block_id)
    ledger.pool.forget_idle_tenants()
