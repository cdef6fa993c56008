"""Keys of blocks: equal keys mean equal tokens from the first position on, under the same salt."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Final, NewType

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

BlockHash = NewType("BlockHash", bytes)

HASH_BYTES: Final = 16


class BlockHasher:
    """Keyed BLAKE2b (RFC 7693) over parent key, salt and token ids.

    The secret keeps a tenant who can choose tokens from constructing a collision with somebody else's block. The root
    takes the place of a parent before the first block and binds keys to one pool.
    """

    def __init__(self, secret: bytes, root: bytes) -> None:
        self._secret = secret
        self._root = BlockHash(blake2b(root, digest_size=HASH_BYTES, key=secret).digest())

    def key(self, parent: BlockHash | None, token_ids: bytes, salt: bytes = b"") -> BlockHash:
        """Key of a block.

        Args:
            parent: key of the block before it; None for the first.
            token_ids: the ids of a full block, little-endian int32.
            salt: what separates callers that must not share.
        """
        # The salt's length goes first, so that no salt can pass for tokens.
        digest = blake2b(parent or self._root, digest_size=HASH_BYTES, key=self._secret)
        digest.update(len(salt).to_bytes(4, "little") + salt)
        digest.update(token_ids)
        return BlockHash(digest.digest())

    def chain(
        self, parent: BlockHash | None, token_ids: NDArray[np.int32], block_size: int
    ) -> Iterator[BlockHash]:
        """Keys of the full blocks that `token_ids` fill, one after another."""
        for begin in range(0, len(token_ids) - block_size + 1, block_size):
            parent = self.key(parent, token_ids[begin : begin + block_size].tobytes())
            yield parent
