"""Attention of one query token over a part of its context: what `kernels.numba_attention` runs for decodes.

A part has at most `PART` keys, so that its scores fit into the nearest cache: first all scores, then their softmax, then
the weighed values (no online softmax within it), all with the query heads of one kv head together. Rows of the cache are
read where they lie; bfloat16 is widened in registers.
"""

from __future__ import annotations

import numpy as np

from kernels.numba_layout import LOG2_E, find_slots, first_seen, jitted, padded
from kernels.numba_products import KEYS_TOGETHER, PART, add_values, score_keys
from kernels.numba_rows import (
    cap_scores,
    copy_row,
    exp2,
    fill,
    float_at,
    join_row,
    largest,
    prefetch_rows,
    put_float,
    weigh_scores,
    write_row,
)
from kernels.simd import LANES

_LOWEST = np.float32(-np.inf)
_AHEAD = 16  # keys
_ZERO, _ONE = np.float32(0), np.float32(1)


@jitted
def num_parts(layout, length):
    """Parts of what a decode sees of its context."""
    return -(-(length - first_seen(layout, length)) // PART)


@jitted
def state_size(layout):
    """Float32 of a part's result: for each query head of a kv head weighed values, maximum, sum."""
    return layout.num_heads // layout.num_kv_heads * (padded(layout.v_dim) + 2)


@jitted
def decode_size(layout):
    """Float32 of scratch that a part needs."""
    return layout.num_heads // layout.num_kv_heads * (padded(layout.k_dim) + PART)


@jitted
def decode_part(element, layout, token, table, length, kv_head, part, slots, scratch, state):
    """Attention of packed token `token` over a part of its context, to `state`."""
    group, k_pad, v_pad = (
        layout.num_heads // layout.num_kv_heads,
        padded(layout.k_dim),
        padded(layout.v_dim),
    )
    begin = first_seen(layout, length) + part * PART
    count = min(PART, length - begin)
    find_slots(layout, table, begin, begin + count, slots)
    scores = scratch + 4 * group * k_pad
    first_head = token * layout.token_stride + kv_head * group * layout.head_stride
    for g in range(group):
        source = layout.query + layout.width * (first_head + g * layout.head_stride)
        copy_row(element, source, scratch + 4 * g * k_pad, layout.k_dim, layout.scale, 0)
    _score(element, layout, kv_head, slots, count, scratch, scores)
    for g in range(group):
        row, place = scores + 4 * g * PART, state + 4 * g * (v_pad + 2)
        padding = -count % LANES
        if layout.cap > 0:
            cap_scores(row, count + padding, layout.cap)
        fill(row + 4 * count, padding, _LOWEST)
        top = largest(row, count + padding)
        total = weigh_scores(row, count + padding, top if top > _LOWEST else _ZERO)
        # Keys run together, so that weights are read up to a multiple of them.
        fill(row + 4 * (count + padding), -(count + padding) % KEYS_TOGETHER, _ZERO)
        fill(place, v_pad, _ZERO)
        put_float(place, v_pad, top)
        put_float(place, v_pad + 1, total)
    _add(element, layout, kv_head, slots, count, scores, state)


@jitted
def _score(element, layout, kv_head, slots, count, query, scores):
    group, k_pad = layout.num_heads // layout.num_kv_heads, padded(layout.k_dim)
    dim, row = layout.k_dim, layout.num_kv_heads * layout.k_dim
    keys = layout.keys + layout.width * kv_head * dim
    values = layout.values + layout.width * kv_head * layout.v_dim
    v_row = layout.num_kv_heads * layout.v_dim
    for key in range(0, count, KEYS_TOGETHER):
        where = slots + 8 * key
        # Rows are too far apart for the hardware to see what comes next, and too long for a core to run ahead.
        ahead = min(KEYS_TOGETHER, max(0, count - key - _AHEAD))
        prefetch_rows(keys, where + 8 * _AHEAD, layout.width * row, layout.width * dim, ahead)
        now = min(KEYS_TOGETHER, count - key)
        prefetch_rows(values, where, layout.width * v_row, layout.width * layout.v_dim, now)
        for head in range(0, group, 4):
            q, out, left = query + 4 * head * k_pad, scores + 4 * (head * PART + key), group - head
            if left >= 4:
                score_keys(element, 4, q, k_pad, keys, where, row, dim, out)
            elif left == 3:
                score_keys(element, 3, q, k_pad, keys, where, row, dim, out)
            elif left == 2:
                score_keys(element, 2, q, k_pad, keys, where, row, dim, out)
            else:
                score_keys(element, 1, q, k_pad, keys, where, row, dim, out)


@jitted
def _add(element, layout, kv_head, slots, count, weights, state):
    group, stride = layout.num_heads // layout.num_kv_heads, padded(layout.v_dim) + 2
    dim, row = layout.v_dim, layout.num_kv_heads * layout.v_dim
    values = layout.values + layout.width * kv_head * dim
    for key in range(0, count, KEYS_TOGETHER):
        where = slots + 8 * key
        for head in range(0, group, 4):
            w, out, left = (
                weights + 4 * (head * PART + key),
                state + 4 * head * stride,
                group - head,
            )
            if left >= 4:
                add_values(element, 4, w, values, where, row, dim, out, stride)
            elif left == 3:
                add_values(element, 3, w, values, where, row, dim, out, stride)
            elif left == 2:
                add_values(element, 2, w, values, where, row, dim, out, stride)
            else:
                add_values(element, 1, w, values, where, row, dim, out, stride)


@jitted
def join_parts(element, layout, token, kv_head, states, parts):
    """Write a token's output for the query heads of a kv head from the states of its parts, which follow one another."""
    group, v_pad = layout.num_heads // layout.num_kv_heads, padded(layout.v_dim)
    for g in range(group):
        head = kv_head * group + g
        place = states + 4 * g * (v_pad + 2)
        sink = float_at(layout.sinks, head) * LOG2_E if layout.sinks else _LOWEST
        top = sink
        for part in range(parts):
            top = max(top, float_at(place + 4 * part * state_size(layout), v_pad))
        top = top if top > _LOWEST else _ZERO
        total, weight = exp2(sink - top), exp2(float_at(place, v_pad) - top)
        total += weight * float_at(place, v_pad + 1)
        for part in range(1, parts):
            other = place + 4 * part * state_size(layout)
            more = exp2(float_at(other, v_pad) - top)
            total += more * float_at(other, v_pad + 1)
            join_row(place, weight, other, more, v_pad)
            weight = _ONE
        out = layout.out + layout.width * (token * layout.num_heads + head) * layout.v_dim
        write_row(element, place, out, layout.v_dim, weight / total, 0)
