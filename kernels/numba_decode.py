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
    put_float,
    touch_rows,
    weigh_scores,
    write_row,
)
from kernels.simd import LANES

_FETCHED = 12_288  # bytes: a third of the first cache, and a stream long enough to be read ahead in
_LOWEST = np.float32(-np.inf)
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
    """Float32 of scratch that a part needs, of all kv heads."""
    return layout.num_heads * (padded(layout.k_dim) + PART)


@jitted
def decode_part(
    element, layout, token, table, length, kv_head, span, part, slots, scratch, state, state_stride
):
    """Attention of packed token `token` over a part of its context, for `span` kv heads from `kv_head` on.

    Heads take turns at a few keys: what all of them need of a key lies together, and a page of memory is looked up once.
    Results go to `state`, `state_stride` bytes from one kv head's to the next.
    """
    group, k_pad, v_pad = (
        layout.num_heads // layout.num_kv_heads,
        padded(layout.k_dim),
        padded(layout.v_dim),
    )
    begin = first_seen(layout, length) + part * PART
    count = min(PART, length - begin)
    find_slots(layout, table, begin, begin + count, slots)
    scores = scratch + 4 * span * group * k_pad
    first_head = token * layout.token_stride + kv_head * group * layout.head_stride
    for head in range(span * group):
        source = layout.query + layout.width * (first_head + head * layout.head_stride)
        copy_row(element, source, scratch + 4 * head * k_pad, layout.k_dim, layout.scale, 0)
    _score(element, layout, kv_head, span, slots, count, scratch, scores)
    for head in range(span * group):
        row = scores + 4 * head * PART
        place = state + head // group * state_stride + 4 * (head % group) * (v_pad + 2)
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
    _add(element, layout, kv_head, span, slots, count, scores, state, state_stride)


@jitted
def _fetch(layout, cache, kv_head, span, dim, slots, key, count):
    """Bring the rows of the next keys into the cache, for all heads in one stream, unless an earlier call did.

    By reading: to ask for so many lines at once was slower. `slots` has a place more than a part has keys.
    """
    stride, size = layout.width * layout.num_kv_heads * dim, layout.width * span * dim
    many = KEYS_TOGETHER * max(1, _FETCHED // (KEYS_TOGETHER * size))
    if key % many == 0:
        base, sink = cache + layout.width * kv_head * dim, slots + 8 * PART
        touch_rows(base, slots + 8 * key, stride, size, min(many, count - key), sink)


@jitted
def _score(element, layout, kv_head, span, slots, count, query, scores):
    group, k_pad = layout.num_heads // layout.num_kv_heads, padded(layout.k_dim)
    dim, row = layout.k_dim, layout.num_kv_heads * layout.k_dim
    for key in range(0, count, KEYS_TOGETHER):
        where = slots + 8 * key
        _fetch(layout, layout.keys, kv_head, span, dim, slots, key, count)
        for own in range(span):
            keys = layout.keys + layout.width * (kv_head + own) * dim
            for head in range(0, group, 4):
                first = own * group + head
                q, out, left = (
                    query + 4 * first * k_pad,
                    scores + 4 * (first * PART + key),
                    group - head,
                )
                if left >= 4:
                    score_keys(element, 4, q, k_pad, keys, where, row, dim, out)
                elif left == 3:
                    score_keys(element, 3, q, k_pad, keys, where, row, dim, out)
                elif left == 2:
                    score_keys(element, 2, q, k_pad, keys, where, row, dim, out)
                else:
                    score_keys(element, 1, q, k_pad, keys, where, row, dim, out)


@jitted
def _add(element, layout, kv_head, span, slots, count, weights, state, state_stride):
    group, stride = layout.num_heads // layout.num_kv_heads, padded(layout.v_dim) + 2
    dim, row = layout.v_dim, layout.num_kv_heads * layout.v_dim
    for key in range(0, count, KEYS_TOGETHER):
        where = slots + 8 * key
        _fetch(layout, layout.values, kv_head, span, dim, slots, key, count)
        for own in range(span):
            values = layout.values + layout.width * (kv_head + own) * dim
            for head in range(0, group, 4):
                w, out, left = (
                    weights + 4 * ((own * group + head) * PART + key),
                    state + own * state_stride + 4 * head * stride,
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
