"""Whether every block in the prefix index is found there, and nothing else is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memory_service.block_hash import HASH_BYTES, PUBLIC_SALT, BlockHash
from memory_service.prefix_index import INDEXED, MAX_CHAIN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from memory_service.block_manager import BlockManager
    from memory_service.prefix_index import IndexArrays


def _indexed(arrays: IndexArrays, begin: int, end: int) -> NDArray[np.intp]:
    found: NDArray[np.intp] = begin + np.flatnonzero(arrays.states[begin:end] == INDEXED)
    return found


def check_own_keys(manager: BlockManager, begin: int, end: int) -> Iterator[str]:
    """Each indexed block of the range is what a look-up of its key finds."""
    arrays = manager.pool.index.arrays()
    wanted = _indexed(arrays, begin, end)
    found = arrays.find(arrays.keys[wanted])
    for block_id in wanted[found != wanted].tolist():
        yield f"block {block_id} does not answer for its own key"


def check_chains(manager: BlockManager, begin: int, end: int) -> Iterator[str]:
    """Whatever a look-up can come upon in the slots of the range is indexed and belongs there."""
    arrays = manager.pool.index.arrays()
    blocks = arrays.heads[begin:end].astype(np.intp)
    slots = begin + np.arange(len(blocks))
    for _ in range(MAX_CHAIN):
        blocks, slots = blocks[blocks != 0], slots[blocks != 0]
        if not len(blocks):
            return
        is_right = (arrays.states[blocks] == INDEXED) & (arrays.slots(blocks) == slots)
        for block_id in blocks[~is_right].tolist():
            yield f"block {block_id} is found in the prefix index and does not belong there"
        blocks = arrays.chain[blocks].astype(np.intp)
    for slot in slots.tolist():
        yield f"a look-up in slot {slot} of the prefix index runs in a circle"


def check_lineages(manager: BlockManager, begin: int, end: int) -> Iterator[str]:
    """Each indexed block of the range is linked with those of its lineage before and behind it."""
    arrays = manager.pool.index.arrays()
    blocks = _indexed(arrays, begin, end)
    behind, before = arrays.next[blocks], arrays.previous[blocks]
    is_first = arrays.first[arrays.lineage_slots(blocks)] == blocks
    is_linked = np.where(before != 0, arrays.next[before] == blocks, is_first)
    is_linked &= (behind == 0) | (arrays.previous[behind] == blocks)
    for block_id in blocks[~is_linked].tolist():
        yield f"block {block_id} is not linked with those that follow the same block"


def check_keys(manager: BlockManager, begin: int, end: int) -> Iterator[str]:
    """The key of each indexed block of the range is that of its tokens and of what precedes them, for its tenant."""
    pool, hasher = manager.pool, manager.ledger.hasher
    index = pool.index
    for block_id in _indexed(index.arrays(), begin, end).tolist():
        home, where = (
            pool.home_of(block_id),
            slice(block_id * HASH_BYTES, (block_id + 1) * HASH_BYTES),
        )
        key, lineage = bytes(index.keys[where]), BlockHash(bytes(index.lineages[where]))
        token_ids = index.token_ids[block_id].tobytes()
        salts = (home.tenant.salt, PUBLIC_SALT) if home else (PUBLIC_SALT,)
        # A lineage is its own inverse: that of a lineage is the parent.
        if all(
            hasher.key(BlockHash(hasher.lineage(lineage, salt)), token_ids, salt) != key
            for salt in salts
        ):
            yield f"block {block_id} has a key that is not that of its tokens"
