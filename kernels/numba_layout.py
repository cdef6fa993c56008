"""Where queries, keys, values and outputs of attention lie in memory, and what else all its tasks know."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np

from kernels.numba_ir import CHUNK
from kernels.numba_products import KEYS_TOGETHER
from kernels.numba_rows import float_at, int32_at, int64_at, put_int64
from kernels.numba_setup import njit

LOG2_E: Final = np.float32(math.log2(math.e))  # scores are in the logarithm's base 2


class Layout(NamedTuple):
    """Addresses in bytes, strides in elements."""

    query: int
    token_stride: int
    head_stride: int
    keys: int
    values: int
    out: int
    sinks: int  # 0: none
    tables: int
    table_width: int
    starts: int
    lengths: int
    num_sequences: int
    num_decodes: int
    num_heads: int
    num_kv_heads: int
    k_dim: int
    v_dim: int
    block_size: int
    width: int  # bytes of an element
    window: int  # at least every context's length where there is none
    num_threads: int
    scale: np.float32
    cap: np.float32  # 0: none


jitted: Final = njit(error_model="numpy")  # whose divisions know no exception


@jitted
def read_job(job):
    """Layout, and addresses of counters and states, from the address of what `numba_attention` wrote."""
    scores = int64_at(job, 21)
    layout = Layout(
        int64_at(job, 0),
        int64_at(job, 1),
        int64_at(job, 2),
        int64_at(job, 3),
        int64_at(job, 4),
        int64_at(job, 5),
        int64_at(job, 6),
        int64_at(job, 7),
        int64_at(job, 8),
        int64_at(job, 9),
        int64_at(job, 10),
        int64_at(job, 11),
        int64_at(job, 12),
        int64_at(job, 13),
        int64_at(job, 14),
        int64_at(job, 15),
        int64_at(job, 16),
        int64_at(job, 17),
        int64_at(job, 18),
        int64_at(job, 19),
        int64_at(job, 20),
        float_at(scores, 0),
        float_at(scores, 1),
    )
    return layout, int64_at(job, 22), int64_at(job, 23)


@jitted
def padded(dim):
    """Elements of a row of whole chunks."""
    return -(-dim // CHUNK) * CHUNK


@jitted
def first_seen(layout, length):
    """The first position that the last token of a context sees."""
    return max(0, length - layout.window)


@jitted
def find_slots(layout, table, first, last, slots):
    """Slots of the positions `[first, last)`; the last one again up to a whole number of keys that run together."""
    size, at = layout.block_size, 0
    for block in range(first // size, -(-last // size)):
        begin, end = max(first, block * size), min(last, block * size + size)
        slot = int32_at(table, block) * size + begin - block * size
        for offset in range(end - begin):
            put_int64(slots, at + offset, slot + offset)
        at += end - begin
    for more in range(at, -(-at // KEYS_TOGETHER) * KEYS_TOGETHER):
        put_int64(slots, more, int64_at(slots, at - 1))
