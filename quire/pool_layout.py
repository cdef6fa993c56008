"""Where each layer's keys and values lie in the pool's bytes: one function for owner and writer alike.

    layer 0 keys | layer 0 values | layer 1 keys | layer 1 values | ...

Keys are `[num_blocks, block_size, num_kv_heads, k_head_dim]`, values the same with v_head_dim, row-major; each array
starts at a multiple of 4096 bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ALIGNMENT_BYTES: Final = 4096
ELEMENT_SIZES: Final[Mapping[str, int]] = {"float32": 4, "bfloat16": 2, "float16": 2}
NUM_NULL_BLOCKS: Final = 1


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """Geometry of one layer's keys and values."""

    num_kv_heads: int
    k_head_dim: int  # elements a key head
    v_head_dim: int  # elements a value head


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the arrays lie."""

    size_bytes: int  # of the whole pool
    offsets: tuple[tuple[int, int], ...]  # byte offsets of (keys, values), a layer an entry


def pool_layout(
    layers: Sequence[LayerGeometry], element_size: int, block_size: int, num_blocks: int
) -> Layout:
    """Lay out a pool of `num_blocks` blocks.

    Args:
        layers: first layer first.
        element_size: bytes of one key or value element.
        block_size: token slots a block.
        num_blocks: blocks, the null block included.
    """
    offsets: list[tuple[int, int]] = []
    end = 0
    for layer in layers:
        per_dim = num_blocks * block_size * layer.num_kv_heads * element_size
        values = end + _aligned(per_dim * layer.k_head_dim)
        offsets.append((end, values))
        end = values + _aligned(per_dim * layer.v_head_dim)
    return Layout(size_bytes=end, offsets=tuple(offsets))


def block_bytes(layers: Sequence[LayerGeometry], element_size: int, block_size: int) -> int:
    """Bytes of one block over all layers, alignment left out."""
    elements = sum(layer.num_kv_heads * (layer.k_head_dim + layer.v_head_dim) for layer in layers)
    return elements * block_size * element_size


def num_blocks_for(
    budget_bytes: int, layers: Sequence[LayerGeometry], element_size: int, block_size: int
) -> int:
    """Most blocks whose pool is at most `budget_bytes` large; 0 when not even one fits."""
    upper = budget_bytes // block_bytes(layers, element_size, block_size)
    candidates = range(1, upper + 1)
    return bisect_right(
        candidates,
        budget_bytes,
        key=lambda count: pool_layout(layers, element_size, block_size, count).size_bytes,
    )


def num_blocks_needed(max_model_len: int, block_size: int) -> int:
    """Blocks of the smallest pool that holds one sequence of `max_model_len` tokens."""
    return NUM_NULL_BLOCKS + -(-max_model_len // block_size)


def longest_sequence(num_blocks: int, block_size: int) -> int:
    """Tokens of the longest sequence that a pool of `num_blocks` blocks holds."""
    return max(0, num_blocks - NUM_NULL_BLOCKS) * block_size


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
