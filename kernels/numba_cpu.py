"""Paged decode attention for the CPU, compiled by numba.

Online softmax (Milakov and Gimelshein, 2018, arXiv:1805.02867) block by block; one task for each sequence and kv head,
spread over torch's own OpenMP threads. bfloat16 is read as uint16 and widened to float32, in which everything is summed.
`kernels.reference.paged_attention` says what is computed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import prange
from numba.core import types
from numba.extending import intrinsic

if TYPE_CHECKING:
    from kernels.batch import AttentionParams, PagedBatch

# torch was imported above: with this layer numba's threads are torch's, and neither disturbs the other.
numba.config.THREADING_LAYER = "omp"

_BF16_SHIFT = 16


@intrinsic
def _widen(_typing_context, element):
    """float32 of one cache element: bfloat16 bits (uint16) are its upper half."""

    def shift(_context, builder, _signature, arguments):
        wide = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(
            builder.shl(wide, ir.Constant(ir.IntType(32), _BF16_SHIFT)), ir.FloatType()
        )

    def keep(_context, _builder, _signature, arguments):
        return arguments[0]

    return types.float32(element), shift if element == types.uint16 else keep


@numba.njit(parallel=True, fastmath={"nsz", "arcp", "contract", "afn", "reassoc"}, cache=True)
def _decode(q, k, v, tables, lengths, scale, window, soft_cap, sinks, has_sinks, out):
    num_sequences, num_heads, k_dim = q.shape
    block_size, num_kv_heads, v_dim = v.shape[1], v.shape[2], v.shape[3]
    group = num_heads // num_kv_heads
    for task in prange(num_sequences * num_kv_heads):
        sequence = task // num_kv_heads
        kv_head = task % num_kv_heads
        length = lengths[sequence]
        first = max(0, length - window) if window > 0 else 0
        query = np.empty((group, k_dim), np.float32)
        total = np.zeros((group, v_dim), np.float32)
        highest = np.full(group, -np.inf, np.float32)
        weight_sum = np.zeros(group, np.float32)
        scores = np.empty((group, block_size), np.float32)
        for g in range(group):
            head = kv_head * group + g
            for d in range(k_dim):
                query[g, d] = _widen(q[sequence, head, d]) * scale
            if has_sinks:
                highest[g] = sinks[head]
                weight_sum[g] = np.float32(1.0)
        for index in range(first // block_size, (length + block_size - 1) // block_size):
            block = tables[sequence, index]
            begin = max(0, first - index * block_size)
            end = min(block_size, length - index * block_size)
            for offset in range(begin, end):
                for g in range(group):
                    dot = np.float32(0.0)
                    for d in range(k_dim):
                        dot += query[g, d] * _widen(k[block, offset, kv_head, d])
                    scores[g, offset] = dot
            for g in range(group):
                top = highest[g]
                for offset in range(begin, end):
                    if soft_cap > 0:
                        scores[g, offset] = soft_cap * math.tanh(scores[g, offset] / soft_cap)
                    top = max(top, scores[g, offset])
                fade = math.exp(highest[g] - top)
                highest[g] = top
                weight_sum[g] *= fade
                for d in range(v_dim):
                    total[g, d] *= fade
                for offset in range(begin, end):
                    scores[g, offset] = math.exp(scores[g, offset] - top)
                    weight_sum[g] += scores[g, offset]
            for offset in range(begin, end):
                for g in range(group):
                    weight = scores[g, offset]
                    for d in range(v_dim):
                        total[g, d] += weight * _widen(v[block, offset, kv_head, d])
        for g in range(group):
            for d in range(v_dim):
                out[sequence, kv_head * group + g, d] = total[g, d] / weight_sum[g]


def is_supported(dtype: torch.dtype) -> bool:
    """Whether the kernel reads caches of this dtype; float16 runs through the reference."""
    return dtype in (torch.float32, torch.bfloat16)


def paged_decode(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: PagedBatch,
    params: AttentionParams,
) -> torch.Tensor:
    """Attention of the first `batch.num_decodes` sequences: `[num_decodes, num_heads, v_head_dim]`.

    Arguments as for `kernels.reference.paged_attention`; `query` has one token a sequence.
    """
    num_sequences, num_heads, _ = query.shape
    out = torch.empty(num_sequences, num_heads, value_cache.shape[3], dtype=torch.float32)
    no_sinks = np.zeros(1, dtype=np.float32)
    _decode(
        _readable(query.contiguous()),
        _readable(key_cache),
        _readable(value_cache),
        batch.block_tables.numpy(),
        batch.context_lens.numpy(),
        np.float32(params.scale),
        params.sliding_window,
        np.float32(params.soft_cap),
        no_sinks if params.sinks is None else params.sinks.detach().float().numpy(),
        params.sinks is not None,
        out.numpy(),
    )
    return out.to(query.dtype)


def _readable(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def set_num_threads(num_threads: int) -> None:
    """Use as many threads as torch does."""
    numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
