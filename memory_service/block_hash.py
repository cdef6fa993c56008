"""Keys of blocks: equal keys mean equal tokens from the first position on, under the same salt."""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, NewType

if TYPE_CHECKING:
    from collections.abc import Iterator

BlockHash = NewType("BlockHash", bytes)

HASH_BYTES: Final = 16
PUBLIC_SALT: Final = b"public"
_TENANT_SALT: Final = b"tenant:"
_MAX_SALTS: Final = 4096  # states kept ready; another one is made when it is needed


def tenant_salt(tenant: str) -> bytes:
    """What separates the keys of `tenant` from those of all others."""
    return _TENANT_SALT + tenant.encode()


def split_keys(joined: bytes) -> tuple[BlockHash, ...]:
    """Keys that were written behind each other; raises ValueError for a part of one."""
    if len(joined) % HASH_BYTES:
        raise ValueError("packed keys have a part too much")
    begins = range(0, len(joined), HASH_BYTES)
    return tuple(BlockHash(joined[begin : begin + HASH_BYTES]) for begin in begins)


class BlockHasher:
    """Keyed BLAKE2b (RFC 7693) over salt, parent key and token ids.

    The secret keeps a tenant who can choose tokens from constructing a collision with somebody else's block. The root
    takes the place of a parent before the first block and binds keys to one pool.
    """

    def __init__(self, secret: bytes, root: bytes) -> None:
        self._secret = secret
        self.root = BlockHash(blake2b(root, digest_size=HASH_BYTES, key=secret).digest())
        self._salted = lru_cache(_MAX_SALTS)(self._make_salted)
        self._mask = lru_cache(_MAX_SALTS)(self._make_mask)

    def _make_salted(self, salt: bytes) -> blake2b:
        # The salt's length goes first, so that no salt can pass for tokens.
        digest = blake2b(digest_size=HASH_BYTES, key=self._secret)
        digest.update(len(salt).to_bytes(4, "little") + salt)
        return digest

    def _make_mask(self, salt: bytes) -> int:
        return int.from_bytes(self._salted(salt).digest(), "little")

    def key(self, parent: BlockHash, token_ids: bytes, salt: bytes) -> BlockHash:
        """Key of a block.

        Args:
            parent: key of the block before it; `root` for the first.
            token_ids: the ids of a full block, little-endian int32.
            salt: what separates callers that must not share.
        """
        digest = self._salted(salt).copy()
        digest.update(parent + token_ids)
        return BlockHash(digest.digest())

    def lineage(self, parent: BlockHash, salt: bytes) -> bytes:
        """Names the blocks that may follow `parent` under `salt`, and tells nothing to other salts."""
        mask = self._mask(salt)
        return (int.from_bytes(parent, "little") ^ mask).to_bytes(HASH_BYTES, "little")

    def chain(
        self, parent: BlockHash, token_ids: bytes, block_size: int, salt: bytes
    ) -> Iterator[BlockHash]:
        """Keys of the full blocks that `token_ids` (little-endian int32) fill behind `parent`, one after another."""
        salted = self._salted(salt)
        width = 4 * block_size
        for begin in range(0, len(token_ids) - width + 1, width):
            digest = salted.copy()
            digest.update(parent + token_ids[begin : begin + width])
            parent = BlockHash(digest.digest())
            yield parent
