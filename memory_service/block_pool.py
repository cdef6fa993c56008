"""Blocks: who is free, who is cached, who is used."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

import numpy as np

from memory_service.eviction import EvictionQueue
from memory_service.prefix_index import PrefixIndex
from memory_service.tenants import Home, Tenant

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from memory_service.block_hash import BlockHash

NULL_BLOCK: Final = 0


class EvictionCause(Enum):
    """Why this block and no other."""

    LEAST_RECENTLY_USED = 1
    OWN_SHARE = 2  # the tenant that needed a block is over its share, and gave one of its own
    OTHERS_SHARE = 3  # its tenant is over its share


@dataclass(frozen=True, slots=True)
class Eviction:
    """A cached block was given to somebody else."""

    block_id: int
    generation: int  # of the content that was lost
    key: BlockHash
    tenant: str
    priority: int
    last_used: float  # seconds since the epoch
    for_tenant: str
    cause: EvictionCause


class BlockPool:
    """Reference counts, pins, the free list and the cached blocks in order of eviction. Every operation is O(1).

    A block other than the null block is in one of three states:
      free     nobody holds it and it holds nothing of worth
      cached   nobody holds it, but its content is in the prefix index
      used     tables hold it (`ref_count`), or copies not yet acknowledged read it (`pins`)

    A block whose reference count falls to zero becomes the last of its home to be evicted, so the order in which a
    table is released is the order of eviction: callers release tails first. Single numbers are read and written through
    `array`, which is four times faster at that than numpy; the public arrays are views of the same memory.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self._refs = array("i", bytes(4 * num_blocks))
        self._pins = array("i", bytes(4 * num_blocks))
        self._home_of = array("i", bytes(4 * num_blocks))  # 0: free
        self.ref_counts = np.frombuffer(self._refs, np.int32)
        self.pins = np.frombuffer(self._pins, np.int32)
        self.home_ids = np.frombuffer(self._home_of, np.int32)
        self._sealed = bytearray(num_blocks)
        self.sealed = np.frombuffer(self._sealed, np.bool_)
        self.generations = array("i", bytes(4 * num_blocks))
        self.last_used = array("d", bytes(8 * num_blocks))
        self.index = PrefixIndex(num_blocks, block_size)
        self.queue = EvictionQueue(num_blocks)
        self.free = array("i", range(num_blocks - 1, NULL_BLOCK, -1))
        self.homes: dict[int, Home] = {}
        self.last_home_id = 0
        self.tenants: dict[str, Tenant] = {}
        self._bounded: dict[str, Tenant] = {}
        self._over_share: dict[str, Tenant] = {}
        self._maybe_idle: dict[str, Tenant] = {}
        self.now = 0.0  # seconds since the epoch, set by whoever changes the pool
        self.num_evictions = 0
        self.num_retained = 0  # blocks of homes with a priority
        self.evictions: list[Eviction] = []  # of the change that is being made, or was made last
        self.touched: list[int] = []  # blocks whose state or count it changed, some several times

    @property
    def num_free(self) -> int:
        """Free blocks."""
        return len(self.free)

    @property
    def num_cached(self) -> int:
        """Cached blocks."""
        return self.queue.num_cached

    @property
    def num_available(self) -> int:
        """Blocks that can be given out, quotas aside."""
        return len(self.free) + self.queue.num_cached

    def num_available_to(self, tenant: Tenant) -> int:
        """Blocks that `allocate` can give to `tenant`."""
        if tenant.hard_blocks is None:
            return self.num_available
        allowed = tenant.hard_blocks - tenant.num_blocks + tenant.num_cached
        return min(self.num_available, max(0, allowed))

    @property
    def has_quotas(self) -> bool:
        """Whether any tenant is bounded."""
        return bool(self._bounded)

    def free_blocks(self) -> Iterator[int]:
        """Ids of the free blocks."""
        return iter(self.free)

    def cached_blocks(self) -> Iterator[int]:
        """Ids of the cached blocks, home by home, within a home the next to be evicted first."""
        for home in self.homes.values():
            yield from self.queue.blocks(home)

    def home_of(self, block_id: int) -> Home | None:
        """Where the block counts and would lie while cached; None for a free one."""
        return self.homes.get(self._home_of[block_id])

    # Tenants and homes

    def tenant(self, name: str) -> Tenant:
        """The tenant of this name, made when nobody spoke of it before."""
        found = self.tenants.get(name)
        if found is None:
            found = self.tenants[name] = Tenant(name)
            self.add_home(found)
        return found

    def tenant_as_is(self, name: str) -> Tenant:
        """The tenant of this name to look at; asking makes nobody known."""
        return self.tenants.get(name) or Tenant(name)

    def add_home(self, tenant: Tenant, retention_id: int = 0, priority: int = 0) -> Home:
        """A new home of `tenant`."""
        self.last_home_id += 1
        home = Home(self.last_home_id, tenant, retention_id, priority)
        self.put_home(home)
        return home

    def put_home(self, home: Home) -> None:
        """Let blocks count in `home` from now on."""
        self.homes[home.home_id] = home.tenant.homes[home.retention_id] = home
        self.queue.add_home(home)
        self.num_retained += home.num_blocks if home.priority else 0

    def drop_home(self, home: Home) -> None:
        """Forget a home in which no block counts."""
        assert not home.num_blocks
        del self.homes[home.home_id]
        del home.tenant.homes[home.retention_id]
        self.queue.drop_home(home)

    def set_quota(self, tenant: Tenant, soft_blocks: int | None, hard_blocks: int | None) -> None:
        """Bound `tenant` from now on; None is no bound."""
        tenant.soft_blocks, tenant.hard_blocks = soft_blocks, hard_blocks
        self._bounded[tenant.name] = tenant
        if not tenant.is_bounded:
            del self._bounded[tenant.name]
        self._note_count(tenant)

    def _note_count(self, tenant: Tenant) -> None:
        if tenant.is_over_share:
            self._over_share[tenant.name] = tenant
        else:
            self._over_share.pop(tenant.name, None)

    def note_idle(self, tenant: Tenant) -> None:
        """`tenant` may have nothing left: `forget_idle_tenants` looks."""
        self._maybe_idle[tenant.name] = tenant

    def forget_idle_tenants(self) -> None:
        """Forget the tenants of whom nothing has to be remembered."""
        for tenant in self._maybe_idle.values():
            if not tenant.is_needed:
                self.drop_home(tenant.homes[0])
                del self.tenants[tenant.name]
        self._maybe_idle.clear()

    def move_home(self, block_id: int, home: Home) -> None:
        """Let a used or cached block count in `home`; a cached one becomes its last to be evicted."""
        old = self.homes[self._home_of[block_id]]
        if self._is_cached(block_id):
            self.queue.remove(block_id, old)
            self.queue.push(block_id, home)
        self._leave(old)
        self._enter(block_id, home)

    def _enter(self, block_id: int, home: Home) -> None:
        self._home_of[block_id] = home.home_id
        tenant = home.tenant
        home.num_blocks += 1
        tenant.num_blocks += 1
        if home.priority:
            self.num_retained += 1
        if self._bounded:
            self._note_count(tenant)

    def _leave(self, home: Home) -> None:
        tenant = home.tenant
        home.num_blocks -= 1
        tenant.num_blocks -= 1
        if home.priority:
            self.num_retained -= 1
        if self._bounded:
            self._note_count(tenant)
        if not tenant.num_blocks:
            self.note_idle(tenant)
        # A retention that is over lives on only for the order of its blocks.
        if home.retention_id and not home.num_blocks and not home.priority:
            self.drop_home(home)

    def end_priority(self, home: Home) -> None:
        """A retention is over: the blocks of `home` are evicted in their turn, and keep their order among each other."""
        self.num_retained -= home.num_blocks
        home.priority = 0
        if home.num_blocks:
            self.queue.enter(home)
        else:
            self.drop_home(home)
        self.note_idle(home.tenant)

    # Blocks

    def begin_change(self, now: float) -> None:
        """Another change is made, at `now`."""
        self.now = now
        self.evictions.clear()
        self.touched.clear()

    def _is_cached(self, block_id: int) -> bool:
        is_held = self._refs[block_id] or self._pins[block_id]
        return not is_held and self.index.is_indexed(block_id)

    def allocate(self, tenant: Tenant) -> int:
        """A block with reference count 1 that counts against `tenant`: a free one, else a cached one.

        Only called while `num_available_to(tenant)` is above zero.
        """
        is_short = not self.free or (tenant.hard_blocks is not None and tenant.is_at_limit)
        block_id = self._evict(tenant) if is_short else self.free.pop()
        self.touched.append(block_id)
        self._refs[block_id] = 1
        self._sealed[block_id] = False
        self.index.clear(block_id)
        self.generations[block_id] += 1
        self.last_used[block_id] = self.now
        self._enter(block_id, tenant.homes[0])
        return block_id

    def _evict(self, tenant: Tenant) -> int:
        home, cause = self._choose(tenant)
        block_id = home.head
        self._note_eviction(block_id, home, tenant, cause)
        self.queue.remove(block_id, home)
        self.index.forget(block_id)
        self._leave(home)
        self.num_evictions += 1
        return block_id

    def _choose(self, tenant: Tenant) -> tuple[Home, EvictionCause]:
        """A tenant over its share gives its own; then others over theirs; then whoever was idle for longest."""
        if tenant.is_over_share or tenant.is_at_limit:
            own = self.queue.first_of([tenant])
            if own is not None:
                return own, EvictionCause.OWN_SHARE
        others = self.queue.first_of(self._over_share.values())
        if others is not None:
            return others, EvictionCause.OTHERS_SHARE
        return self.queue.first(), EvictionCause.LEAST_RECENTLY_USED

    def _note_eviction(
        self, block_id: int, home: Home, tenant: Tenant, cause: EvictionCause
    ) -> None:
        key = self.index.key_of(block_id)
        assert key is not None
        self.evictions.append(
            Eviction(
                block_id,
                self.generations[block_id],
                key,
                home.tenant.name,
                home.priority,
                self.last_used[block_id],
                tenant.name,
                cause,
            )
        )

    def acquire(self, block_id: int) -> None:
        """One more table holds the block, which is used or cached."""
        if self._is_cached(block_id):
            self.queue.remove(block_id, self.homes[self._home_of[block_id]])
        self.touched.append(block_id)
        self._refs[block_id] += 1
        self.last_used[block_id] = self.now

    def release(self, block_id: int) -> None:
        """One table less holds the block."""
        assert self._refs[block_id] > 0
        self.touched.append(block_id)
        self._refs[block_id] -= 1
        self._settle(block_id)

    def pin(self, block_id: int) -> None:
        """A copy will read the block."""
        if self._is_cached(block_id):
            self.queue.remove(block_id, self.homes[self._home_of[block_id]])
        self.touched.append(block_id)
        self._pins[block_id] += 1
        self.last_used[block_id] = self.now

    def unpin(self, block_id: int) -> None:
        """The copy was made, or will never be."""
        assert self._pins[block_id] > 0
        self.touched.append(block_id)
        self._pins[block_id] -= 1
        self._settle(block_id)

    def _settle(self, block_id: int) -> None:
        if self._refs[block_id] or self._pins[block_id]:
            return
        self.last_used[block_id] = self.now
        if self.index.is_indexed(block_id):
            self.queue.push(block_id, self.homes[self._home_of[block_id]])
        else:
            self._set_free(block_id)

    def _set_free(self, block_id: int) -> None:
        home = self.homes[self._home_of[block_id]]
        self._home_of[block_id] = 0
        self._leave(home)
        self.free.append(block_id)

    def forget(self, block_id: int) -> None:
        """The block cannot be hit any more; a cached one is free."""
        if self._is_cached(block_id):
            self.touched.append(block_id)
            self.queue.remove(block_id, self.homes[self._home_of[block_id]])
            self.index.forget(block_id)
            self._set_free(block_id)
        else:
            self.index.forget(block_id)

    def num_unheld(self, block_ids: Iterable[int]) -> int:
        """How many of `block_ids` are cached: acquiring them makes fewer available."""
        return sum(self._is_cached(block_id) for block_id in block_ids)
