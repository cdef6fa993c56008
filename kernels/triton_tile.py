"""What the attention kernels share: one tile of keys and values, met by a tile of queries.

Online softmax (Milakov and Gimelshein, 2018, arXiv:1805.02867) in base 2; products on the tensor cores, sums in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Stands for minus infinity where a difference of two of them must not be NaN.
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def widen(elements, dtype: tl.constexpr):
    """Cache elements as `dtype`: fp8 ones, and bytes that hold the bits of e4m3 numbers divided by 256.

    Bits are what a target without e4m3 conversions gets. Shifted into a float16 they are the number times 2^-8, exactly,
    because the exponents' biases differ by 8; `kernels.triton_cache.bits_factor` puts the factor into the scales.
    """
    if elements.dtype == tl.uint8:
        wide = elements.to(tl.uint16)
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        return bits.to(tl.float16, bitcast=True).to(dtype)
    return elements.to(dtype)


@triton.jit
def load_rows(rows, is_row, DIM: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr):
    """`[len(rows), PADDED]` elements behind row pointers; zeros beyond DIM and, if MASKED, where not `is_row`."""
    columns = tl.arange(0, PADDED)
    pointers = rows[:, None] + columns[None, :]
    if MASKED:
        if DIM == PADDED:
            return tl.load(pointers, mask=is_row[:, None], other=0.0)
        return tl.load(pointers, mask=is_row[:, None] & (columns < DIM)[None, :], other=0.0)
    if DIM == PADDED:
        return tl.load(pointers)
    return tl.load(pointers, mask=(columns < DIM)[None, :], other=0.0)


@triton.jit
def cap(scores, soft_cap):
    """`soft_cap * tanh(scores / soft_cap)`, without overflow at either end."""
    return soft_cap - 2 * soft_cap / (tl.exp2(scores * (2 * LOG2_E / soft_cap)) + 1)


@triton.jit
def load_blocks(table, first_key, end_key, BLOCK_SIZE: tl.constexpr, TILE_KEYS: tl.constexpr):
    """The block of each key `[first_key, first_key + TILE_KEYS)`; the null block from `end_key` on.

    Loops load those of the next tile before they attend to this one: an address is then never waited for, and the loads
    of keys and values have all stages of the pipeline to themselves.
    """
    keys = first_key + tl.arange(0, TILE_KEYS)
    return tl.load(table + keys // BLOCK_SIZE, mask=keys < end_key, other=0)


@triton.jit
def attend_tile(
    query,  # [M, K_PAD]
    total,  # float32 [M, V_PAD]: weighed values so far
    top,  # float32 [M]: highest score so far, base 2
    weight_sum,  # float32 [M]
    first_key,
    end_key,
    position,  # int32 [M]: of each query in its sequence
    window,
    scale,
    soft_cap,
    block,  # int32 [TILE_KEYS]: of each key
    key_head,
    value_head,
    key_block_stride,
    key_slot_stride,
    value_block_stride,
    value_slot_stride,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Let the queries attend to keys `[first_key, first_key + TILE_KEYS)`.

    MASKED: keys from `end_key` on are not read, and each query sees those in `(position - window, position]`. Without it
    every query sees every key of the tile.
    """
    keys = first_key + tl.arange(0, TILE_KEYS)
    is_key = keys < end_key
    slot = keys % BLOCK_SIZE
    block = block.to(tl.int64)
    key_rows = key_head + block * key_block_stride + slot * key_slot_stride
    value_rows = value_head + block * value_block_stride + slot * value_slot_stride
    key = widen(load_rows(key_rows, is_key, K_DIM, K_PAD, MASKED), query.dtype)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    # To base 2, above zero: it meets the score in one multiply-add with the highest one, behind the maximum.
    factor = scale
    if HAS_CAP:
        scores = cap(scores * scale, soft_cap)
        factor = LOG2_E
    if MASKED:
        seen = (keys[None, :] <= position[:, None]) & (keys[None, :] > position[:, None] - window)
        scores = tl.where(seen & is_key[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * factor)
    fade = tl.exp2(top - new_top)
    weights = tl.exp2(scores * factor - new_top[:, None])
    weight_sum = weight_sum * fade + tl.sum(weights, 1)
    value = widen(load_rows(value_rows, is_key, V_DIM, V_PAD, MASKED), query.dtype)
    total = tl.dot(weights.to(query.dtype), value, total * fade[:, None], input_precision="ieee")
    return total, new_top, weight_sum
