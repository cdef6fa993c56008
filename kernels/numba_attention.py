"""Paged attention for the CPU, compiled by numba: one call runs a step's decodes and its chunks of prompts.

The work is cut into tasks that depend on their own sequence alone, so that a result does not depend on who else runs: for
decodes a part of the context and some kv heads, for chunks a few panels of rows and a kv head. Workers, one a thread,
take the next task until there is none. Who ends the last part of a decode joins all of them, in their order, by
log-sum-exp.
`kernels.reference.paged_attention` says what is computed.

Addresses are all that jitted code works with: on slices of arrays numba takes four times as long to compile the same.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numba
import numpy as np
import torch

from kernels.numba_decode import decode_part, decode_size, join_parts, num_parts, state_size
from kernels.numba_ir import CHUNK
from kernels.numba_layout import LOG2_E, jitted, read_job
from kernels.numba_prefill import lay_out, panels_together, prefill_tile
from kernels.numba_products import PART, ROWS
from kernels.numba_rows import call, int32_at, put_float, put_int64, take
from kernels.numba_setup import cfunc, njit, prange

if TYPE_CHECKING:
    from numba.core.ccallback import CFunc

    from kernels.batch import AttentionParams, PagedBatch


_TASKS_A_THREAD = 2  # at least, so that no thread waits long for another


@jitted
def _num_pieces(layout, sequence, panels):
    """Parts of a decode's context, or tiles of a chunk's queries."""
    if sequence < layout.num_decodes:
        return num_parts(layout, int32_at(layout.lengths, sequence))
    tokens = int32_at(layout.starts, sequence + 1) - int32_at(layout.starts, sequence)
    return -(-tokens * (layout.num_heads // layout.num_kv_heads) // (panels * ROWS))


@jitted
def _run_chunk(element, layout, sequence, kv_head, tile, panels, slots, scratch):
    token, end = int32_at(layout.starts, sequence), int32_at(layout.starts, sequence + 1)
    table = layout.tables + 4 * sequence * layout.table_width
    num_rows = (end - token) * (layout.num_heads // layout.num_kv_heads)
    first_row = tile * panels * ROWS
    rows = (first_row, min(num_rows, first_row + panels * ROWS), num_rows)
    position = int32_at(layout.lengths, sequence) - (end - token)
    prefill_tile(
        element,
        layout,
        token,
        table,
        position,
        kv_head,
        rows,
        slots,
        lay_out(layout, panels, scratch),
    )


@jitted
def _run_decode(element, layout, sequence, kv_head, span, part, slots, scratch, states, ended):
    """`states` are those of the sequence, `[kv head, part]`; `ended` counts, for each kv head, parts that are there.

    Runs `span` kv heads from `kv_head` on, of which only the first is counted.
    """
    length = int32_at(layout.lengths, sequence)
    table = layout.tables + 4 * sequence * layout.table_width
    parts, size = num_parts(layout, length), 4 * state_size(layout)
    own = states + kv_head * parts * size
    token = int32_at(layout.starts, sequence)
    place, stride = own + part * size, parts * size
    decode_part(
        element, layout, token, table, length, kv_head, span, part, slots, scratch, place, stride
    )
    if take(ended + 8 * kv_head) == parts - 1:
        for head in range(span):
            join_parts(element, layout, token, kv_head + head, own + head * stride, parts)


@jitted
def _heads_together(layout, most_parts):
    """Kv heads of a decode's task: all of them, unless threads would go without work; a divisor of their number."""
    heads, tasks = layout.num_kv_heads, layout.num_decodes * most_parts
    span = heads
    while span > 1 and tasks * (heads // span) < _TASKS_A_THREAD * layout.num_threads:
        span -= 1
        while heads % span:
            span -= 1
    return span


@jitted
def _work(element, job):
    """Run tasks until there is none left: chunks, which are long, before decodes."""
    layout, counters, states = read_job(job)
    heads, most_parts = layout.num_kv_heads, num_parts(layout, layout.window)
    group = layout.num_heads // heads
    num_tokens = int32_at(layout.starts, layout.num_sequences)
    panels = panels_together(layout, group * (num_tokens - layout.num_decodes))
    span, size = _heads_together(layout, most_parts), decode_size(layout)
    if layout.num_decodes < layout.num_sequences:
        size = max(size, lay_out(layout, panels, 0).end // 4)
    slot_array, scratch_array = np.empty(PART + 1, np.int64), np.empty(size, np.float32)
    slots, scratch = slot_array.ctypes.data, scratch_array.ctypes.data
    index, first, task = 0, 0, take(counters)
    while index < layout.num_sequences:
        sequence = (layout.num_decodes + index) % layout.num_sequences
        pieces = _num_pieces(layout, sequence, panels)
        together = span if sequence < layout.num_decodes else 1
        groups = heads // together
        if task >= first + pieces * groups:
            first += pieces * groups
            index += 1
            continue
        kv_head, piece = (task - first) % groups * together, (task - first) // groups
        if sequence >= layout.num_decodes:
            # The last tile sees most keys.
            tile = pieces - 1 - piece
            _run_chunk(element, layout, sequence, kv_head, tile, panels, slots, scratch)
        else:
            own = states + 4 * sequence * heads * most_parts * state_size(layout)
            ended = counters + 8 * (1 + sequence * heads)
            _run_decode(element, layout, sequence, kv_head, span, piece, slots, scratch, own, ended)
        task = take(counters)
    # An address does not keep its array.
    put_float(scratch_array.ctypes.data, 0, np.float32(slot_array[0]))


@cache
def _worker(dtype: torch.dtype) -> CFunc:
    """The machine code for a dtype: a function of a job's address."""
    element = np.uint16(0) if dtype == torch.bfloat16 else np.float32(0)

    def work(job):
        _work(element, job)

    worker: CFunc = cfunc("void(int64)", cache=True, error_model="numpy")(work)
    return worker


@njit(parallel=True, cache=True)
def launch(worker, job, num_threads):
    """Run a job's tasks on each thread.

    The worker is called through its address: else its code would be optimised once more with that of each caller.
    """
    layout, counters, _ = read_job(job)
    for index in range(1 + layout.num_decodes * layout.num_kv_heads):
        put_int64(counters, index, 0)
    for _thread in prange(num_threads):
        call(worker, job)


def is_supported(key_cache: torch.Tensor, value_cache: torch.Tensor) -> bool:
    """Whether the kernels read such caches: float16, fp8 and bfloat16 of odd head sizes run through the reference."""
    is_even = key_cache.shape[3] % 2 == value_cache.shape[3] % 2 == 0
    return key_cache.dtype == torch.float32 or (key_cache.dtype == torch.bfloat16 and is_even)


class Job:
    """What a launch is told, and the memory that it works in; layers of a step that attend alike share it.

    The first numbers are of one layer: where its query, caches and output lie.
    """

    def __init__(
        self,
        query_shape: tuple[int, ...],
        dtype: torch.dtype,
        value_cache: torch.Tensor,
        batch: PagedBatch,
        params: AttentionParams,
        num_threads: int,
    ) -> None:
        _, num_heads, k_dim = query_shape
        _, block_size, num_kv_heads, v_dim = value_cache.shape
        self._tables = batch.block_tables.contiguous()
        window = params.sliding_window or batch.max_context_len
        v_pad = -(-v_dim // CHUNK) * CHUNK
        num_states = -(-window // PART) * batch.num_decodes * num_heads * (v_pad + 2)
        self._states = np.empty(num_states, np.float32)
        self._counters = np.zeros(1 + batch.num_decodes * num_kv_heads, np.int64)
        self._scores = np.array([params.scale, params.soft_cap], np.float32) * LOG2_E
        self.worker = int(_worker(dtype).address or 0)
        self._num_threads = num_threads
        of_layer = [0] * 7
        self._numbers = np.array(
            [
                *of_layer,
                self._tables.data_ptr(),
                self._tables.shape[1],
                batch.query_start.data_ptr(),
                batch.context_lens.data_ptr(),
                len(batch.context_lens),
                batch.num_decodes,
                num_heads,
                num_kv_heads,
                k_dim,
                v_dim,
                block_size,
                dtype.itemsize,
                window,
                num_threads,
                self._scores.ctypes.data,
                self._counters.ctypes.data,
                self._states.ctypes.data,
            ],
            np.int64,
        )
        self.address: int = self._numbers.ctypes.data

    def run(self, *of_layer: int) -> None:
        """Attend in a layer: the first seven numbers of `kernels.numba_layout.Layout`."""
        self._numbers[:7] = of_layer
        launch(self.worker, self.address, self._num_threads)


class PagedAttention:
    """Attends on `num_threads` threads, for one caller at a time; what the layers of a step share is laid out once."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._batch: PagedBatch | None = None
        self._jobs: dict[tuple[object, ...], Job] = {}

    def __call__(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: PagedBatch,
        params: AttentionParams,
    ) -> torch.Tensor:
        """See `kernels.reference.paged_attention`; the dtype is a supported one, and caches are contiguous."""
        assert key_cache.is_contiguous()
        assert value_cache.is_contiguous()
        query = query if query.stride(2) == 1 else query.contiguous()
        sinks = None if params.sinks is None else params.sinks.detach().float().contiguous()
        out = query.new_empty(*query.shape[:2], value_cache.shape[3])
        self.job(query.shape, query.dtype, value_cache, batch, params).run(
            query.data_ptr(),
            query.stride(0),
            query.stride(1),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            out.data_ptr(),
            0 if sinks is None else sinks.data_ptr(),
        )
        return out

    def job(
        self,
        query_shape: tuple[int, ...],
        dtype: torch.dtype,
        value_cache: torch.Tensor,
        batch: PagedBatch,
        params: AttentionParams,
    ) -> Job:
        """The one of all layers of `batch` that attend alike; what is of a layer has to be filled in."""
        if batch is not self._batch:
            self._batch, self._jobs = batch, {}
        how = (params.scale, params.soft_cap, params.sliding_window)
        kind = (query_shape, value_cache.shape, dtype, *how)
        job = self._jobs.get(kind)
        if job is None:
            job = Job(query_shape, dtype, value_cache, batch, params, self.num_threads)
            self._jobs[kind] = job
        return job


def set_num_threads(num_threads: int) -> int:
    """Use as many threads as torch does; gives how many there are."""
    count: int = min(num_threads, numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(count)
    return count
