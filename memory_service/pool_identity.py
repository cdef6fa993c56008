"""What decides whether the bytes of a pool are usable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.errors import BudgetTooSmall, InvalidRequest
from quire.pool_layout import (
    ELEMENT_SIZES,
    block_bytes,
    longest_sequence,
    num_blocks_for,
    num_blocks_needed,
    pool_layout,
)

if TYPE_CHECKING:
    from quire.pool_layout import LayerGeometry

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class PoolIdentity:
    """Equal for writers that compute the same bytes for the same tokens."""

    layers: tuple[LayerGeometry, ...]
    dtype: str
    block_size: int
    tensor_parallel: tuple[int, int]  # rank, size
    model_fingerprint: str

    @property
    def geometry(self) -> tuple[tuple[LayerGeometry, ...], int, int]:
        """Layers, bytes of an element, token slots a block: what `quire.pool_layout` lays out."""
        return self.layers, ELEMENT_SIZES[self.dtype], self.block_size

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return block_bytes(*self.geometry)

    def size_bytes(self, num_blocks: int) -> int:
        """Bytes of a pool of `num_blocks` blocks."""
        return pool_layout(*self.geometry, num_blocks).size_bytes


def check_identity(identity: PoolIdentity, max_model_len: int) -> None:
    """Raise InvalidRequest, with what is wrong, for a pool that cannot be."""
    size = identity.block_size
    if identity.dtype not in ELEMENT_SIZES:
        raise InvalidRequest(f"dtype {identity.dtype!r} is none of {', '.join(ELEMENT_SIZES)}")
    if not 1 <= size <= 256 or size & (size - 1):  # noqa: PLR2004 -- the range that the contract names
        raise InvalidRequest(f"block_size {size} is not a power of two from 1 to 256")
    sizes = [
        dimension
        for layer in identity.layers
        for dimension in (layer.num_kv_heads, layer.k_head_dim, layer.v_head_dim)
    ]
    if not sizes or min(sizes) < 1:
        raise InvalidRequest(
            "a pool needs at least one layer, with heads and dimensions above zero"
        )
    if max_model_len < 1:
        raise InvalidRequest(f"max_model_len {max_model_len} is below 1")


def num_blocks_within(budget_bytes: int, identity: PoolIdentity, max_model_len: int) -> int:
    """Most blocks whose pool takes at most `budget_bytes`.

    Raises:
        BudgetTooSmall: when they cannot hold one sequence of `max_model_len` tokens.
    """
    num_blocks = num_blocks_for(budget_bytes, *identity.geometry)
    num_needed = num_blocks_needed(max_model_len, identity.block_size)
    if num_blocks < num_needed:
        needed = identity.size_bytes(num_needed)
        possible = longest_sequence(num_blocks, identity.block_size)
        message = (
            f"a memory budget of {budget_bytes / _MIB:.1f} MiB cannot hold one sequence of "
            f"{max_model_len} tokens: it takes {needed / _MIB:.1f} MiB (--memory-budget {needed}); "
            f"this budget holds --max-model-len {possible}"
        )
        raise BudgetTooSmall(
            message, metadata={"needed_bytes": needed, "budget_bytes": budget_bytes}
        )
    return num_blocks
