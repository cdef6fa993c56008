"""Which blocks a flush forgets: decided once, for the whole pool at one moment, then made in parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from memory_service.block_hash import HASH_BYTES, PUBLIC_SALT, BlockHash
from memory_service.prefix_index import INDEXED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memory_service.demand import IntArray
    from memory_service.ledger import Ledger

    Ids = NDArray[np.intp]

_NOBODY: Final = 0  # the block in front is gone
_ROOT: Final = -1  # there is none in front


@dataclass(slots=True)
class FlushPlan:
    """Blocks that are to be forgotten, with what they held when that was decided."""

    block_ids: Ids
    generations: IntArray
    num_done: int = 0

    @property
    def is_done(self) -> bool:
        """Whether all have had their turn."""
        return self.num_done >= len(self.block_ids)


def plan_flush(ledger: Ledger, tenant: str, token_ids: IntArray) -> FlushPlan:
    """What of `tenant` begins with `token_ids`; all of it for none. What all share is nobody's to forget."""
    chosen = own = _own_blocks(ledger, tenant)
    if len(token_ids) and len(own):
        chosen = _Tree(ledger, tenant, own).beginning_with(token_ids)
    generations = np.frombuffer(ledger.pool.generations, np.int32)[chosen]
    return FlushPlan(chosen, generations)


def next_part(ledger: Ledger, plan: FlushPlan, count: int) -> list[int]:
    """The next blocks of a plan that still hold what they held, at most `count`."""
    pool = ledger.pool
    part = slice(plan.num_done, plan.num_done + count)
    plan.num_done += count
    return [
        block_id
        for block_id, generation in zip(
            plan.block_ids[part].tolist(), plan.generations[part].tolist(), strict=True
        )
        if pool.generations[block_id] == generation and pool.index.is_indexed(block_id)
    ]


def _own_blocks(ledger: Ledger, tenant: str) -> Ids:
    pool, found = ledger.pool, ledger.pool.tenants.get(tenant)
    is_own = np.zeros(pool.last_home_id + 1, dtype=np.bool_)
    is_own[[home.home_id for home in found.homes.values()] if found else []] = True
    is_chosen = is_own[pool.home_ids]
    is_chosen &= np.frombuffer(pool.index.states, np.uint8) == INDEXED
    # A tenant's retention may hold what all share.
    is_chosen[[pool.index.find(key) for key in ledger.retentions.public_keys]] = False
    return np.flatnonzero(is_chosen)


class _Tree:
    """The blocks of a tenant, and what all share in front of them, each with the block in front of it."""

    def __init__(self, ledger: Ledger, tenant: str, own: Ids) -> None:
        self._ledger = ledger
        self._index = ledger.pool.index
        self._salts = (ledger.pool.tenant_as_is(tenant).salt, PUBLIC_SALT)
        self._own = own
        self._parents = np.full(ledger.pool.num_blocks, _NOBODY, dtype=np.int32)
        self._blocks = self._grow(own)

    def _grow(self, blocks: Ids) -> Ids:
        """Find what is in front of `blocks`, in front of that, and so on; all of them, ascending."""
        is_known = np.zeros(len(self._parents), dtype=np.bool_)
        while len(blocks):
            is_known[blocks] = True
            self._parents[blocks] = parents = self._in_front_of(blocks)
            is_new = np.zeros(len(self._parents), dtype=np.bool_)
            is_new[parents[parents > _NOBODY]] = True
            blocks = np.flatnonzero(is_new & ~is_known)
        return np.flatnonzero(is_known)

    def _in_front_of(self, blocks: Ids) -> Ids:
        parents = np.full(len(blocks), _NOBODY, dtype=np.intp)
        for salt in self._salts:
            unknown = np.flatnonzero(parents == _NOBODY)
            parents[unknown] = self._find_parents(blocks[unknown], salt)
        return parents

    def _find_parents(self, blocks: Ids, salt: bytes) -> Ids:
        arrays, hasher = self._index.arrays(), self._ledger.hasher
        # A lineage is the parent's key under a mask, and the mask is the lineage of nothing.
        mask = np.frombuffer(hasher.lineage(BlockHash(bytes(HASH_BYTES)), salt), "<u4")
        keys = arrays.lineages[blocks] ^ mask
        found = arrays.find(keys)
        found[(keys == np.frombuffer(hasher.root, "<u4")).all(axis=1)] = _ROOT
        return found

    def beginning_with(self, token_ids: IntArray) -> Ids:
        """The tenant's blocks behind `token_ids`, and those of whose beginning nothing is known any more."""
        num_full = len(token_ids) // self._ledger.block_size * self._ledger.block_size
        last, rest = self._run(token_ids[:num_full]), token_ids[num_full:]
        does = np.zeros(len(self._parents), dtype=np.bool_)
        does[self._followers(last, rest) if len(rest) else last] = True
        # Somebody who computes what is missing in front of them would hit them again.
        does[self._blocks] |= self._parents[self._blocks] == _NOBODY
        if does.any():
            does[self._blocks] = self._or_behind(does[self._blocks])
        begins: Ids = self._own[does[self._own]]
        return begins

    def _run(self, token_ids: IntArray) -> list[int]:
        """The blocks that hold the last of `token_ids`, under whatever salts; the root for no tokens."""
        size, hasher = self._ledger.block_size, self._ledger.hasher
        keys = [hasher.root]
        for begin in range(0, len(token_ids), size):
            packed = token_ids[begin : begin + size].tobytes()
            after = [hasher.key(key, packed, salt) for key in keys for salt in self._salts]
            keys = [key for key in after if self._index.find(key)]
        return [self._index.find(key) for key in keys] if len(token_ids) else [_ROOT]

    def _followers(self, parents: list[int], rest: IntArray) -> Ids:
        """Blocks right behind one of `parents` whose first tokens are `rest`."""
        found = self._blocks[np.isin(self._parents[self._blocks], parents)]
        begins: Ids = found[(self._index.token_ids[found, : len(rest)] == rest).all(axis=1)]
        return begins

    def _or_behind(self, does: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Of each block whether it, or any block in front of it, is one that does."""
        # Places in the list of blocks, behind whose end nothing does.
        nowhere = len(self._blocks)
        places = np.full(len(self._parents), nowhere, dtype=np.int32)
        places[self._blocks] = np.arange(nowhere, dtype=np.int32)
        ahead = np.append(
            places[np.maximum(self._parents[self._blocks], _NOBODY)], np.int32(nowhere)
        )
        does = np.append(does, False)
        while (ahead != nowhere).any():
            does |= does[ahead]
            ahead = ahead[ahead]  # twice as far
        return does[:-1]
