"""What tenants and operators ask of the cache: blocks kept longer, blocks forgotten, prefixes shared by all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from memory_service.block_hash import BlockHash
    from memory_service.block_pool import BlockPool
    from memory_service.sequence_table import Sequence
    from memory_service.tenants import Home, Tenant

MAX_RETENTIONS: Final = 1024
MAX_RETENTIONS_OF_ONE: Final = 64  # tenant
MAX_PUBLISHED: Final = 1024


@dataclass(slots=True, eq=False)
class Retention:
    """Blocks that are evicted after others."""

    retention_id: int
    home: Home
    expires_at: float | None  # seconds since the epoch


@dataclass(slots=True)
class Retentions:
    """Retentions and published prefixes of one pool.

    A retained block counts in a home of its retention, whose priority decides when it is evicted. It stays evictable:
    when nothing else is left it goes, so that no retention can wedge the pool. At most half of the pool is retained, and
    at most half of a tenant's hard quota.
    """

    pool: BlockPool
    by_id: dict[int, Retention] = field(default_factory=dict)
    last_id: int = 0
    published: dict[int, tuple[BlockHash, ...]] = field(default_factory=dict)
    last_prefix_id: int = 0
    public_keys: dict[BlockHash, int] = field(default_factory=dict)  # -> published prefixes with it

    def room(self, tenant: Tenant) -> int:
        """Blocks that `tenant` may retain besides those that it does."""
        room = self.pool.num_blocks // 2 - self.pool.num_retained
        if tenant.hard_blocks is not None:
            own = sum(home.num_blocks for home in tenant.homes.values() if home.priority)
            room = min(room, tenant.hard_blocks // 2 - own)
        return max(0, room)

    def begin(
        self, retention_id: int, tenant_name: str, priority: int, expires_at: float | None
    ) -> Retention:
        """A retention begins."""
        home = self.pool.add_home(self.pool.tenant(tenant_name), retention_id, priority)
        self.last_id = max(self.last_id, retention_id)
        return self.put(retention_id, home, expires_at)

    def put(self, retention_id: int, home: Home, expires_at: float | None) -> Retention:
        """The retention whose home is `home`."""
        found = self.by_id[retention_id] = Retention(retention_id, home, expires_at)
        return found

    def take(self, retention: Retention, block_ids: Iterable[int]) -> None:
        """These blocks belong to `retention` from now on."""
        for block_id in block_ids:
            self.pool.move_home(block_id, retention.home)

    def may_take(self, block_id: int, priority: int) -> bool:
        """Whether a retention of `priority` gets the block: it is not free, and no higher one has it."""
        home = self.pool.home_of(block_id)
        return home is not None and home.priority <= priority

    def cover(self, sequence: Sequence, retention: Retention) -> None:
        """The blocks that `sequence` seals from now on belong to `retention`."""
        sequence.retention = retention.home

    def sealed(self, home: Home, block_id: int) -> None:
        """A retained sequence sealed a block."""
        if home.priority and self.room(home.tenant) > 0:
            self.pool.move_home(block_id, home)

    def end(self, retention_id: int) -> None:
        """A retention is over: its blocks keep their order among each other, and are evicted in their turn."""
        self.pool.end_priority(self.by_id.pop(retention_id).home)
        self.pool.forget_idle_tenants()

    def expired(self, now: float) -> list[int]:
        """Ids of the retentions whose time is over."""
        return [
            found.retention_id
            for found in self.by_id.values()
            if found.expires_at is not None and found.expires_at <= now
        ]

    # Published prefixes

    def publish(self, prefix_id: int, keys: tuple[BlockHash, ...]) -> None:
        """All tenants share blocks of these keys from now on."""
        self.published[prefix_id] = keys
        self.last_prefix_id = max(self.last_prefix_id, prefix_id)
        for key in keys:
            self.public_keys[key] = self.public_keys.get(key, 0) + 1

    def withdraw(self, prefix_id: int) -> None:
        """A prefix is not shared any more."""
        for key in self.published.pop(prefix_id):
            self.public_keys[key] -= 1
            if not self.public_keys[key]:
                del self.public_keys[key]
