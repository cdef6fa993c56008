"""What of a prompt is in the cache, for one tenant."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from memory_service.block_hash import PUBLIC_SALT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memory_service.block_hash import BlockHash
    from memory_service.demand import IntArray
    from memory_service.ledger import Ledger

# Blocks of one lineage that are compared with a prompt; the newest, since a conversation goes on from its last turn.
_MAX_CANDIDATES: Final = 32
_MAX_REMEMBERED: Final = 32  # prompts


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The part of a prompt that the cache has."""

    block_ids: list[int] = field(default_factory=list)  # leading full blocks
    missing_keys: list[BlockHash] = field(default_factory=list)  # of the full blocks behind them
    partial_block: int = 0  # it has the next `num_partial_tokens`; 0 for none
    num_partial_tokens: int = 0

    def num_tokens(self, block_size: int) -> int:
        """Leading tokens that need not be computed."""
        return len(self.block_ids) * block_size + self.num_partial_tokens

    def without_copy(self) -> PrefixHit:
        """The hit without its partly matching block."""
        return replace(self, partial_block=0, num_partial_tokens=0)


class PrefixLookup:
    """Finds prefixes. A tenant sees blocks that were sealed under its own salt, and those of published prefixes."""

    def __init__(self, ledger: Ledger, min_partial_tokens: int) -> None:
        self._ledger = ledger
        self._min_partial_tokens = min_partial_tokens
        # A prompt that waits is asked about at every step.
        self._remembered = lru_cache(_MAX_REMEMBERED)(self._keys)

    def prefixes_changed(self) -> None:
        """A prefix was published or withdrawn: other keys are public now."""
        self._remembered.cache_clear()

    def keys(self, token_ids: IntArray, salt: bytes) -> list[BlockHash]:
        """Keys of the full blocks that `token_ids` fill for a tenant: public ones as far as a published prefix goes."""
        return list(self._remembered(token_ids.tobytes(), salt))

    def _keys(self, packed: bytes, salt: bytes) -> tuple[BlockHash, ...]:
        size = self._ledger.block_size
        public = tuple(self._public_keys(packed))
        hasher = self._ledger.hasher
        parent = public[-1] if public else hasher.root
        return public + tuple(hasher.chain(parent, packed[len(public) * 4 * size :], size, salt))

    def _public_keys(self, packed: bytes) -> Iterator[BlockHash]:
        public_keys = self._ledger.retentions.public_keys
        if not public_keys:
            return
        hasher = self._ledger.hasher
        for key in hasher.chain(hasher.root, packed, self._ledger.block_size, PUBLIC_SALT):
            if key not in public_keys:
                return
            yield key

    def next_key(self, parent: BlockHash, token_ids: bytes, salt: bytes) -> BlockHash:
        """Key of one full block behind `parent`."""
        hasher, public_keys = self._ledger.hasher, self._ledger.retentions.public_keys
        if public_keys and (key := hasher.key(parent, token_ids, PUBLIC_SALT)) in public_keys:
            return key
        return hasher.key(parent, token_ids, salt)

    def find(self, token_ids: IntArray, salt: bytes) -> PrefixHit:
        """The longest hit; at least one token is left to run. Touches nothing."""
        if not self._ledger.prefix_cache_enabled:
            return PrefixHit()
        keys = self.keys(token_ids[:-1], salt)
        find = self._ledger.pool.index.find
        block_ids: list[int] = []
        for key in keys:
            block_id = find(key)
            if not block_id:
                break
            block_ids.append(block_id)
        missing = keys[len(block_ids) :]
        if missing and self._ledger.pool.index.is_in_progress(missing[0]):
            return PrefixHit(block_ids, missing)
        parent = keys[len(block_ids) - 1] if block_ids else self._ledger.hasher.root
        # Never all of a block: one that was sealed under another salt, before its prefix was published or withdrawn, has
        # the same tokens, and a copy of all of them would be a full block that nobody seals.
        begin, size = len(block_ids) * self._ledger.block_size, self._ledger.block_size
        rest = token_ids[begin : min(begin + size, len(token_ids)) - 1]
        return PrefixHit(block_ids, missing, *self._partial(parent, rest, salt))

    def _partial(self, parent: BlockHash, rest: IntArray, salt: bytes) -> tuple[int, int]:
        """The block behind `parent` that shares the most leading tokens with `rest`, if those are worth a copy."""
        if not self._min_partial_tokens or len(rest) < self._min_partial_tokens:
            return 0, 0
        own = self._match(parent, rest, salt)
        if self._ledger.retentions.public_keys:
            shared = self._match(parent, rest, PUBLIC_SALT)
            key = self._ledger.pool.index.key_of(shared[0])
            if key in self._ledger.retentions.public_keys and shared[1] > own[1]:
                own = shared
        return own if own[1] >= self._min_partial_tokens else (0, 0)

    def _match(self, parent: BlockHash, rest: IntArray, salt: bytes) -> tuple[int, int]:
        lineage = self._ledger.hasher.lineage(parent, salt)
        return self._ledger.pool.index.longest_match(lineage, rest, _MAX_CANDIDATES)
