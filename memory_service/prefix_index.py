"""Which block holds which key, and which blocks follow another one."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from memory_service.block_hash import HASH_BYTES, BlockHash

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from memory_service.demand import IntArray

_NONE: Final = 0  # the null block is never indexed, so it ends every list
MAX_CHAIN: Final = 200
_UNKNOWN, _FORGOTTEN, INDEXED = 0, 1, 2


@dataclass(frozen=True, slots=True)
class IndexArrays:
    """The two hash tables of an index."""

    mask: int
    keys: NDArray[np.uint32]  # `[num_blocks, 4]`
    lineages: NDArray[np.uint32]  # likewise
    states: NDArray[np.uint8]
    heads: IntArray  # first block of each slot; 0: none
    chain: IntArray  # block behind each one in its slot
    first: IntArray  # the same for lineages
    next: IntArray
    previous: IntArray

    def slots(self, block_ids: NDArray[np.intp] | IntArray) -> NDArray[np.uint32]:
        """Where the keys of blocks belong."""
        found: NDArray[np.uint32] = self.keys[block_ids, 0] & np.uint32(self.mask)
        return found

    def find(self, keys: NDArray[np.uint32]) -> NDArray[np.intp]:
        """The block of each key; 0 where there is none."""
        found: NDArray[np.intp] = self.heads[keys[:, 0] & np.uint32(self.mask)].astype(np.intp)
        searching = np.arange(len(keys))
        # At most one key a slot on average: a chain that is longer than this runs in a circle.
        for _ in range(MAX_CHAIN):
            differs = (self.keys[found[searching]] != keys[searching]).any(axis=1)
            searching = searching[differs & (found[searching] != _NONE)]
            if not len(searching):
                break
            found[searching] = self.chain[found[searching]]
        return found

    def lineage_slots(self, block_ids: NDArray[np.intp] | IntArray) -> NDArray[np.uint32]:
        """Where the lineages of blocks belong."""
        found: NDArray[np.uint32] = self.lineages[block_ids, 0] & np.uint32(self.mask)
        return found


class PrefixIndex:
    """Sealed full blocks by key, one block a key; and the keys that running sequences are about to fill.

    Two hash tables with chains through arrays, since a dict of a million keys stalls when it grows and takes three times
    the memory. The keys are digests: their first bytes are the hash. The second table finds the blocks of one lineage
    (what may follow a block), the newest first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        num_slots = 1 << max(1, num_blocks - 1).bit_length()
        self._mask = num_slots - 1
        self.keys = bytearray(HASH_BYTES * num_blocks)
        self.states = bytearray(num_blocks)
        self._heads = array("i", bytes(4 * num_slots))
        self._chain = array("i", bytes(4 * num_blocks))
        self.lineages = bytearray(HASH_BYTES * num_blocks)
        self._first = array("i", bytes(4 * num_slots))
        self._next = array("i", bytes(4 * num_blocks))
        self._previous = array("i", bytes(4 * num_blocks))
        self.token_ids = np.zeros((num_blocks, block_size), dtype=np.int32)
        self._in_progress: dict[BlockHash, int] = {}  # key -> sequences that will fill it
        self._num_indexed = 0

    def __len__(self) -> int:
        """Blocks in the index."""
        return self._num_indexed

    def _slot(self, key: bytes | bytearray) -> int:
        return int.from_bytes(key[:4], "little") & self._mask

    def find(self, key: BlockHash) -> int:
        """The block that holds `key`; 0 when there is none."""
        keys: bytearray = self.keys
        wanted: bytes = key
        block_id = self._heads[int.from_bytes(key[:4], "little") & self._mask]
        while block_id:
            begin = block_id * HASH_BYTES
            if keys[begin : begin + HASH_BYTES] == wanted:
                return block_id
            block_id = self._chain[block_id]
        return _NONE

    def is_indexed(self, block_id: int) -> bool:
        """Whether the block can be hit."""
        return self.states[block_id] == INDEXED

    def key_of(self, block_id: int) -> BlockHash | None:
        """The key of a sealed block, be it that it cannot be hit any more."""
        if self.states[block_id] == _UNKNOWN:
            return None
        return BlockHash(bytes(self.keys[block_id * HASH_BYTES : (block_id + 1) * HASH_BYTES]))

    def add(self, key: BlockHash, lineage: bytes, block_id: int) -> None:
        """Let `block_id` answer for `key`; no block does yet, and it answers for no other key."""
        assert self.states[block_id] != INDEXED
        begin = block_id * HASH_BYTES
        self.keys[begin : begin + HASH_BYTES] = key
        self.lineages[begin : begin + HASH_BYTES] = lineage
        self.states[block_id] = INDEXED
        slot = int.from_bytes(key[:4], "little") & self._mask
        self._chain[block_id] = self._heads[slot]
        self._heads[slot] = block_id
        slot = int.from_bytes(lineage[:4], "little") & self._mask
        following = self._first[slot]
        self._first[slot] = block_id
        self._next[block_id] = following
        self._previous[block_id] = _NONE
        if following:
            self._previous[following] = block_id
        self._num_indexed += 1

    def add_all(self, block_ids: IntArray) -> None:
        """Let blocks, the oldest first, answer for the keys and lineages that they have; only on an empty index."""
        assert not self._num_indexed
        arrays = self.arrays()
        arrays.states[block_ids] = INDEXED
        _chain_all(block_ids, arrays.slots(block_ids), arrays.heads, arrays.chain)
        _chain_all(block_ids, arrays.lineage_slots(block_ids), arrays.first, arrays.next)
        following = arrays.next[block_ids]
        arrays.previous[following[following > 0]] = block_ids[following > 0]
        self._num_indexed = len(block_ids)

    def forget(self, block_id: int) -> None:
        """The block cannot be hit any more. It keeps its key, since blocks behind it may yet be sealed."""
        if self.states[block_id] != INDEXED:
            return
        self.states[block_id] = _FORGOTTEN
        begin = block_id * HASH_BYTES
        self._unchain(self._slot(self.keys[begin : begin + HASH_BYTES]), block_id)
        self._unlink(self._slot(self.lineages[begin : begin + HASH_BYTES]), block_id)
        self._num_indexed -= 1

    def clear(self, block_id: int) -> None:
        """The block is given out anew."""
        self.states[block_id] = _UNKNOWN

    def _unchain(self, slot: int, block_id: int) -> None:
        chain = self._chain
        found = self._heads[slot]
        if found == block_id:
            self._heads[slot] = chain[block_id]
            return
        while chain[found] != block_id:
            found = chain[found]
        chain[found] = chain[block_id]

    def _unlink(self, slot: int, block_id: int) -> None:
        before, after = self._previous[block_id], self._next[block_id]
        if before:
            self._next[before] = after
        else:
            self._first[slot] = after
        if after:
            self._previous[after] = before

    def followers(self, lineage: bytes, limit: int) -> list[int]:
        """The newest blocks of a lineage, at most `limit`."""
        found: list[int] = []
        block_id = self._first[self._slot(lineage)]
        while block_id and len(found) < limit:
            begin = block_id * HASH_BYTES
            if self.lineages[begin : begin + HASH_BYTES] == lineage:
                found.append(block_id)
            block_id = self._next[block_id]
        return found

    def longest_match(self, lineage: bytes, token_ids: IntArray, limit: int) -> tuple[int, int]:
        """The block of a lineage that shares the most leading tokens with `token_ids`, and how many; (0, 0) for none.

        Only the `limit` newest are looked at. Of equals the newest is taken.
        """
        blocks = self.followers(lineage, limit)
        num_tokens = min(len(token_ids), self.token_ids.shape[1])
        if not blocks or not num_tokens:
            return _NONE, 0
        differs = self.token_ids[blocks, :num_tokens] != token_ids[:num_tokens]
        lengths = np.where(differs.any(axis=1), differs.argmax(axis=1), num_tokens)
        best = int(lengths.argmax())
        return (blocks[best], int(lengths[best])) if lengths[best] else (_NONE, 0)

    def indexed_blocks(self) -> Iterator[int]:
        """Ids of the blocks that can be hit, ascending."""
        return iter(np.flatnonzero(np.frombuffer(self.states, np.uint8) == INDEXED).tolist())

    def arrays(self) -> IndexArrays:
        """Both tables as views, for checks. Not to be kept: nor read after the next change."""
        keys, lineages = (np.frombuffer(found, "<u4") for found in (self.keys, self.lineages))
        links = (self._heads, self._chain, self._first, self._next, self._previous)
        return IndexArrays(
            self._mask,
            keys.reshape(-1, HASH_BYTES // 4),
            lineages.reshape(-1, HASH_BYTES // 4),
            np.frombuffer(self.states, np.uint8),
            *(np.frombuffer(found, np.int32) for found in links),
        )

    def oldest_first(self) -> Iterator[int]:
        """The blocks of every lineage, oldest first: adding them in this order makes the same lists again."""
        for head in self._first:
            found = []
            while head:
                found.append(head)
                head = self._next[head]  # noqa: PLW2901 -- as above
            yield from reversed(found)

    # In progress

    def is_in_progress(self, key: BlockHash) -> bool:
        """Whether a running sequence will fill `key`."""
        return key in self._in_progress

    def begin(self, keys: Iterable[BlockHash]) -> None:
        """A sequence runs that will fill `keys`."""
        for key in keys:
            self._in_progress[key] = self._in_progress.get(key, 0) + 1

    def end(self, keys: Iterable[BlockHash]) -> None:
        """It filled them, or will not."""
        for key in keys:
            self._in_progress[key] -= 1
            if not self._in_progress[key]:
                del self._in_progress[key]


def _chain_all(
    block_ids: IntArray, slots: NDArray[np.uint32], heads: IntArray, behind: IntArray
) -> None:
    """Put each block in front of those that came before it in its slot."""
    order = np.argsort(slots, kind="stable")
    slots, block_ids = slots[order], block_ids[order]
    is_same = slots[1:] == slots[:-1]
    behind[block_ids[1:][is_same]] = block_ids[:-1][is_same]
    is_last = np.append(~is_same, True)[: len(slots)]
    heads[slots[is_last]] = block_ids[is_last]
