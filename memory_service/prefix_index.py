"""Which block holds which key."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from memory_service.block_hash import BlockHash


class PrefixIndex:
    """Sealed full blocks by key, one block a key; and the keys that running sequences are about to fill."""

    def __init__(self, num_blocks: int) -> None:
        self._block_of: dict[BlockHash, int] = {}
        self._key_of: list[BlockHash | None] = [None] * num_blocks
        self._in_progress: dict[BlockHash, int] = {}  # key -> sequences that will fill it

    def __len__(self) -> int:
        """Blocks in the index."""
        return len(self._block_of)

    def __iter__(self) -> Iterator[tuple[BlockHash, int]]:
        """Keys with their blocks."""
        return iter(self._block_of.items())

    def find(self, key: BlockHash) -> int | None:
        """The block that holds `key`."""
        return self._block_of.get(key)

    def key_of(self, block_id: int) -> BlockHash | None:
        """The key that `block_id` holds."""
        return self._key_of[block_id]

    def add(self, key: BlockHash, block_id: int) -> None:
        """Let `block_id` answer for `key`; no block does yet, and it answers for no other key."""
        assert key not in self._block_of
        assert self._key_of[block_id] is None
        self._block_of[key] = block_id
        self._key_of[block_id] = key

    def remove(self, block_id: int) -> None:
        """Forget the block, if it is there."""
        key = self._key_of[block_id]
        if key is not None:
            del self._block_of[key]
            self._key_of[block_id] = None

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
