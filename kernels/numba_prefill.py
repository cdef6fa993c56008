"""Attention of a tile of queries over their context: what `kernels.numba_attention` runs for chunks of a prompt.

FlashAttention-2's order (Dao, 2023, arXiv:2307.08691): a tile's running maximum, sum and output stay while tiles of keys
pass. A row is one query head of one token; rows lie along the lanes of vectors, `ROWS` in a panel. So scores and outputs
are kept transposed, `[keys, ROWS]` and `[v_head_dim, ROWS]`: both products are the same one, and the softmax needs no
sum across lanes.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from kernels.numba_layout import LOG2_E, find_slots, jitted, padded
from kernels.numba_products import DOWN, ROWS, STATE, multiply, weigh_panel
from kernels.numba_rows import (
    cap_scores,
    copy_row,
    fill,
    float_at,
    int64_at,
    put_float,
    put_int32,
    write_row,
)

_KEYS: Final = (
    64  # in a tile; widened to float32, with their values, they stay in a core's own cache
)
_MOST_PANELS: Final = 8  # that share widened keys: more would leave that cache
_TASKS_A_THREAD: Final = 4  # at least, so that threads end together
_LOWEST = np.float32(-np.inf)
_ZERO, _ONE = np.float32(0), np.float32(1)


class Scratch(NamedTuple):
    """Addresses of what a tile of queries is computed in: float32, but for positions (int32)."""

    keys: int  # [_KEYS, padded k_dim]
    values: int  # [_KEYS, padded v_dim]
    scores: int  # [_KEYS, ROWS]
    row: int  # [larger padded dim]
    positions: int  # [panels, ROWS]
    states: int  # [panels, STATE]
    queries: int  # [panels, k_dim, ROWS]
    outputs: int  # [panels, padded v_dim, ROWS]
    end: int


@jitted
def lay_out(layout, panels, start):
    """The scratch that begins at an address."""
    k_pad, v_pad = padded(layout.k_dim), padded(layout.v_dim)
    values = start + 4 * _KEYS * k_pad
    scores = values + 4 * _KEYS * v_pad
    row = scores + 4 * _KEYS * ROWS
    positions = row + 4 * max(k_pad, v_pad)
    states = positions + 4 * panels * ROWS
    queries = states + 4 * panels * STATE
    outputs = queries + 4 * panels * k_pad * ROWS
    return Scratch(
        start,
        values,
        scores,
        row,
        positions,
        states,
        queries,
        outputs,
        outputs + 4 * panels * v_pad * ROWS,
    )


@jitted
def panels_together(layout, num_rows):
    """How many panels share widened keys, of `num_rows` rows a kv head in all."""
    panels = layout.num_kv_heads * num_rows // ROWS
    return max(1, min(_MOST_PANELS, panels // (layout.num_threads * _TASKS_A_THREAD)))


@jitted
def prefill_tile(element, layout, token, table, position, kv_head, rows, slots, scratch):
    """Attention of `rows = (first, last, of all)` of a chunk whose packed token `token` is at `position`."""
    first_row, last_row, _ = rows
    group = layout.num_heads // layout.num_kv_heads
    panels = -(-(last_row - first_row) // ROWS)
    for panel in range(panels):
        _start_panel(element, layout, token, position, kv_head, panel, rows, scratch)
    # A whole number of keys that run together lies before each edge between tiles, so that none is padded but at the end.
    begin = max(0, position + first_row // group + 1 - layout.window) // DOWN * DOWN
    end = position + (last_row - 1) // group + 1
    for tile in range(begin // _KEYS * _KEYS, end, _KEYS):
        tile_begin, tile_end = max(begin, tile), min(end, tile + _KEYS)
        find_slots(layout, table, tile_begin, tile_end, slots)
        _widen_keys(element, layout, kv_head, slots, tile_end - tile_begin, scratch)
        for panel in range(panels):
            panel_row = first_row + panel * ROWS
            first_key = position + panel_row // group + 1 - layout.window
            last_key = position + (min(last_row, panel_row + ROWS) - 1) // group
            skipped = max(0, first_key - tile_begin) // DOWN * DOWN
            count = -(-(min(tile_end, last_key + 1) - tile_begin - skipped) // DOWN) * DOWN
            if count > 0:
                _add_keys(layout, tile_begin + skipped, skipped, count, panel, scratch)
    for panel in range(panels):
        _write_panel(element, layout, token, kv_head, panel, rows, scratch)


@jitted
def _start_panel(element, layout, token, position, kv_head, panel, rows, scratch):
    """Queries of a panel, scaled and transposed, its positions, and its state and output before any key."""
    first_row, last_row, _ = rows
    group = layout.num_heads // layout.num_kv_heads
    queries = scratch.queries + 4 * panel * padded(layout.k_dim) * ROWS
    state, v_size = scratch.states + 4 * panel * STATE, padded(layout.v_dim) * ROWS
    fill(scratch.outputs + 4 * panel * v_size, v_size, _ZERO)
    fill(state, ROWS, _LOWEST)
    fill(state + 4 * ROWS, ROWS, _ZERO)
    for lane in range(ROWS):
        # Lanes behind the last row repeat it, and are not written.
        row = min(first_row + panel * ROWS + lane, last_row - 1)
        put_int32(scratch.positions, panel * ROWS + lane, position + row // group)
        head = kv_head * group + row % group
        place = (token + row // group) * layout.token_stride + head * layout.head_stride
        copy_row(
            element, layout.query + layout.width * place, scratch.row, layout.k_dim, layout.scale, 1
        )
        for d in range(layout.k_dim):
            put_float(queries, d * ROWS + lane, float_at(scratch.row, d))
        if layout.sinks:
            # A sink is a key without a value.
            put_float(state, lane, float_at(layout.sinks, head) * LOG2_E)
            put_float(state, ROWS + lane, _ONE)


@jitted
def _widen_keys(element, layout, kv_head, slots, count, scratch):
    """Rows of a tile's keys and values as float32, `count` of them and zeros up to a multiple of `DOWN`."""
    k_pad, v_pad, width = padded(layout.k_dim), padded(layout.v_dim), layout.width
    for index in range(count):
        row = int64_at(slots, index) * layout.num_kv_heads + kv_head
        key, value = (
            layout.keys + width * row * layout.k_dim,
            layout.values + width * row * layout.v_dim,
        )
        copy_row(element, key, scratch.keys + 4 * index * k_pad, layout.k_dim, _ONE, 1)
        copy_row(element, value, scratch.values + 4 * index * v_pad, layout.v_dim, _ONE, 1)
    fill(scratch.keys + 4 * count * k_pad, -count % DOWN * k_pad, _ZERO)
    fill(scratch.values + 4 * count * v_pad, -count % DOWN * v_pad, _ZERO)


@jitted
def _add_keys(layout, first_key, skipped, count, panel, scratch):
    """Let a panel see `count` keys of the tile in scratch, behind the `skipped` first ones."""
    k_pad, v_pad = padded(layout.k_dim), padded(layout.v_dim)
    keys, values = scratch.keys + 4 * skipped * k_pad, scratch.values + 4 * skipped * v_pad
    queries, outputs = (
        scratch.queries + 4 * panel * k_pad * ROWS,
        scratch.outputs + 4 * panel * v_pad * ROWS,
    )
    scores, state = scratch.scores, scratch.states + 4 * panel * STATE
    positions, fades = scratch.positions + 4 * panel * ROWS, state + 8 * ROWS
    for key in range(0, count, DOWN):
        multiply(
            keys + 4 * key * k_pad, k_pad, 1, queries, layout.k_dim, scores + 4 * key * ROWS, 0, 0
        )
    if layout.cap > 0:
        cap_scores(scores, count * ROWS, layout.cap)
    weigh_panel(scores, count, first_key, positions, layout.window, state)
    for d in range(0, layout.v_dim, DOWN):
        multiply(values + 4 * d, 1, v_pad, scores, count, outputs + 4 * d * ROWS, fades, 1)


@jitted
def _write_panel(element, layout, token, kv_head, panel, rows, scratch):
    first_row, last_row, _ = rows
    group = layout.num_heads // layout.num_kv_heads
    outputs = scratch.outputs + 4 * panel * padded(layout.v_dim) * ROWS
    for lane in range(min(ROWS, last_row - first_row - panel * ROWS)):
        row = first_row + panel * ROWS + lane
        for d in range(layout.v_dim):
            put_float(scratch.row, d, float_at(outputs, d * ROWS + lane))
        head = (token + row // group) * layout.num_heads + kv_head * group + row % group
        factor = _ONE / float_at(scratch.states, panel * STATE + ROWS + lane)
        write_row(
            element,
            scratch.row,
            layout.out + layout.width * head * layout.v_dim,
            layout.v_dim,
            factor,
            1,
        )
