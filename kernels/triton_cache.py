"""Writing into the cache: new keys and values into their slots, whole blocks onto others."""

from __future__ import annotations

import triton
import triton.language as tl

E4M3_MAX = tl.constexpr(448.0)
_DROPPED_BITS = tl.constexpr(20)  # of a float32's mantissa, of which e4m3 keeps three
# float32 bits of 2^-6, e4m3's least normal number, and what turns a float32 exponent into e4m3's.
_LEAST_NORMAL = tl.constexpr(0.015625)
_EXPONENT_SHIFT = tl.constexpr((127 - 7) << 3)
# Added to a number below 2^-6 it leaves the multiples of 2^-9 in the last bits.
_ROUNDER = tl.constexpr(16384.0)
_ROUNDER_BITS = tl.constexpr(0x46800000)


@triton.jit
def e4m3_bits(numbers):
    """The bits, uint8, of float32 `numbers` rounded to the nearest e4m3 (ties to even), clipped to its range."""
    magnitude = tl.minimum(tl.abs(numbers), E4M3_MAX)
    bits = magnitude.to(tl.int32, bitcast=True)
    odd = (bits >> _DROPPED_BITS) & 1
    normal = ((bits + 0x7FFFF + odd) >> _DROPPED_BITS) - _EXPONENT_SHIFT
    tiny = (magnitude + _ROUNDER).to(tl.int32, bitcast=True) - _ROUNDER_BITS
    rounded = tl.where(magnitude < _LEAST_NORMAL, tiny, normal)
    sign = (numbers.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (rounded | sign).to(tl.uint8)


@triton.jit
def store_heads(
    new,  # [T, num_kv_heads, DIM]
    cache,  # [num_blocks * block_size, num_kv_heads, DIM], slots of one layer
    scales,  # float32 [num_kv_heads]
    slot,
    token,
    first_head,
    num_kv_heads,
    new_token_stride,
    new_head_stride,
    slot_stride,
    head_stride,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """Write TILE_HEADS heads of one token into its slot."""
    heads = first_head + tl.arange(0, TILE_HEADS)
    columns = tl.arange(0, PADDED)
    is_head = heads < num_kv_heads
    mask = is_head[:, None] & (columns < DIM)[None, :]
    source = new + token * new_token_stride + heads[:, None] * new_head_stride + columns[None, :]
    elements = tl.load(source, mask=mask, other=0)
    target = cache + slot * slot_stride + heads[:, None] * head_stride + columns[None, :]
    if HAS_SCALES:
        factor = tl.load(scales + heads, mask=is_head, other=1.0)
        elements = e4m3_bits(elements.to(tl.float32) / factor[:, None])
    tl.store(target, elements.to(cache.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_kv_heads"])
def store_slots(
    key,
    value,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    slot_mapping,  # int64 [T]; -1: nothing is stored
    num_kv_heads,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    key_slot_stride,
    key_cache_head_stride,
    value_slot_stride,
    value_cache_head_stride,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """Some heads of one token: grid (T, tiles of the kv heads)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    first_head = tl.program_id(1) * TILE_HEADS
    store_heads(
        key,
        key_cache,
        key_scales,
        slot,
        token,
        first_head,
        num_kv_heads,
        key_token_stride,
        key_head_stride,
        key_slot_stride,
        key_cache_head_stride,
        K_DIM,
        K_PAD,
        TILE_HEADS,
        HAS_SCALES,
    )
    store_heads(
        value,
        value_cache,
        value_scales,
        slot,
        token,
        first_head,
        num_kv_heads,
        value_token_stride,
        value_head_stride,
        value_slot_stride,
        value_cache_head_stride,
        V_DIM,
        V_PAD,
        TILE_HEADS,
        HAS_SCALES,
    )


@triton.jit
def copy_words(
    bases,  # int64 [arrays]: addresses of the keys' and values' arrays of all layers
    block_words,  # int64 [arrays]: pairs of 8-byte words in one block of each
    copies,  # int64 [n, 2]: source and destination block
    TILE_WORDS: tl.constexpr,
):
    """Copy one block within one array: grid (n, arrays). No block is a source and a destination."""
    copy, array = tl.program_id(0), tl.program_id(1)
    source, destination = tl.load(copies + 2 * copy), tl.load(copies + 2 * copy + 1)
    count = 2 * tl.load(block_words + array)
    base = tl.multiple_of(tl.load(bases + array).to(tl.pointer_type(tl.int64)), 16)
    for first in range(0, count, TILE_WORDS):
        words = first + tl.arange(0, TILE_WORDS)
        mask = words < count
        found = tl.load(base + source * count + words, mask=mask, other=0)
        tl.store(base + destination * count + words, found, mask=mask)
