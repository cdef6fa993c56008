"""A whole decoder layer on the CPU in one call: norm, attention, norm, gated MLP, and what is added around both.

Between products of one row Python takes as long as a third of them: what it needs is out of the caches by the time it is
needed. So the operations of `kernels.numba_linear`, `kernels.numba_small_ops` and `kernels.numba_attention` follow one
another here without it, and give what they give one by one, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch
from numba.core import types

from kernels.numba_attention import is_supported, launch
from kernels.numba_linear import multiply
from kernels.numba_matvec import multiply_row
from kernels.numba_panels import PANEL, PackedWeight
from kernels.numba_rows import float_at, int64_at, put_int64
from kernels.numba_setup import njit
from kernels.numba_small_ops import (
    add_all,
    gate_rows,
    norm_rows,
    rotate_heads,
    widen_all,
)
from kernels.numba_store import store_heads

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.batch import AttentionParams, PagedBatch
    from kernels.numba_attention import PagedAttention
    from kernels.small_ops import Activation, NormStyle

_BF16, _F32 = 2, 4  # bytes


@dataclass(frozen=True, slots=True)
class Norm:
    """See `kernels.small_ops.rms_norm`."""

    weight: Tensor  # bfloat16 [size]
    eps: float
    style: NormStyle


@dataclass(frozen=True, slots=True)
class LayerParts:
    """What a layer is made of; heads are all of `head_dim`."""

    first_norm: Norm  # of the layer's input
    qkv: PackedWeight  # outputs are the heads of queries, then of keys, then of values
    head_norms: tuple[Norm, ...]  # of each head of queries and of keys, or none
    attention: AttentionParams
    output: PackedWeight
    second_norm: Norm  # of the input and what attention adds to it
    gate_up: PackedWeight  # outputs are the gates, then what they gate
    activation: Activation
    down: PackedWeight
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def size(self) -> int:
        """Of the hidden state."""
        return self.qkv.depth

    @property
    def shape(self) -> tuple[int, ...]:
        """Two layers of the same shape can share a `LayerStep`'s memory."""
        return (self.size, self.num_heads, self.num_kv_heads, self.head_dim, self.down.depth)

    @property
    def weights(self) -> tuple[PackedWeight, ...]:
        """In the order in which they are multiplied by."""
        return (self.qkv, self.output, self.gate_up, self.down)

    @property
    def is_supported(self) -> bool:
        """Whether products leave no gaps between rows, and no sinks are attended to."""
        has_gaps = any(weight.num_outputs % PANEL for weight in self.weights)
        return not has_gaps and self.attention.sinks is None


class Layer:
    """A layer that can be run.

    Raises:
        ValueError: when its parts are not supported.
    """

    def __init__(self, parts: LayerParts) -> None:
        if not parts.is_supported:
            raise ValueError(f"outputs have to be a multiple of {PANEL}, and sinks none")
        self.parts = parts
        norms = (parts.first_norm, parts.second_norm, *parts.head_norms)
        self._eps = np.array([norm.eps for norm in norms], np.float32)
        weights = [
            number
            for weight in parts.weights
            for number in (weight.panels_at, weight.num_panels, weight.bias_at, weight.depth)
        ]
        of_norms = [
            number for norm in norms for number in (norm.weight.data_ptr(), int(norm.style))
        ]
        self._numbers = np.array(
            [self._eps.ctypes.data, int(parts.activation), *weights, *of_norms, *[0] * 4], np.int64
        )
        self.address: int = self._numbers.ctypes.data


class LayerStep:
    """Memory for one pass of T tokens through layers of the same shape, one after the other.

    Args:
        attention: lays out its part, and says on how many threads all is to run.
    """

    def __init__(self, attention: PagedAttention) -> None:
        self._attention = attention
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._numbers = np.zeros(len(Step._fields), np.int64)
        self._address: int = self._numbers.ctypes.data

    @staticmethod
    def can_use(key_cache: Tensor, value_cache: Tensor) -> bool:
        """Whether keys and values are only copied there."""
        return key_cache.dtype is torch.bfloat16 and is_supported(key_cache, value_cache)

    def begin(
        self, parts: LayerParts, num_tokens: int, cos: Tensor, sin: Tensor, batch: PagedBatch
    ) -> None:
        """Lay the memory out for T tokens and their rotary positions, bfloat16 `[1, T, head_dim]`."""
        self._batch = batch
        self._kept = tuple(found.contiguous() for found in (cos, sin, batch.slot_mapping))
        heads, kv_heads = parts.num_heads * parts.head_dim, parts.num_kv_heads * parts.head_dim
        inner = parts.down.depth
        sizes = [  # bytes a token
            _F32 * max(parts.size, heads, inner),
            *(_BF16 * parts.size, _BF16 * (heads + 2 * kv_heads), _BF16 * heads, _BF16 * kv_heads),
            *(_BF16 * heads, _BF16 * parts.size, _BF16 * 2 * inner, _BF16 * inner),
        ]
        places = self._places([num_tokens * size for size in sizes])
        self._shape = (num_tokens, parts.num_heads, parts.head_dim)
        shape = (num_tokens, parts.size, parts.num_heads, parts.num_kv_heads, parts.head_dim, inner)
        kept = [found.data_ptr() for found in self._kept]
        numbers = [*shape, *kept, *places, self._attention.num_threads]
        self._numbers[:] = Step(*numbers)

    def _places(self, sizes: list[int]) -> list[int]:
        """Addresses of memory of these sizes, in bytes."""
        ends = np.cumsum([-(-size // 64) * 64 for size in sizes])
        if self._scratch.numel() < ends[-1]:
            self._scratch = torch.empty(int(ends[-1]), dtype=torch.uint8)
        return [self._scratch.data_ptr() + int(end) for end in (0, *ends[:-1])]

    def run(self, layer: Layer, hidden: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
        """Change `hidden`, bfloat16 `[1, T, size]`, as the layer does; its keys and values go into the caches."""
        job = self._attention.job(
            self._shape, torch.bfloat16, value_cache, self._batch, layer.parts.attention
        )
        caches = (key_cache.data_ptr(), value_cache.data_ptr())
        _run_layer(
            layer.address, self._address, hidden.data_ptr(), *caches, job.worker, job.address
        )


class Step(NamedTuple):
    """What all layers of a pass know; addresses in bytes."""

    num_tokens: int
    size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inner: int  # of the gated MLP
    cos: int
    sin: int
    slots: int
    wide: int  # float32, what a product of several rows reads
    normed: int
    heads: int  # of queries, keys and values, token by token
    query: int
    key: int
    attended: int
    product: int
    gates: int
    gated: int
    num_threads: int


# Of a layer's numbers.
_EPS, _ACTIVATION, _WEIGHTS, _NORMS = 0, 1, 2, 18
_QKV, _OUTPUT, _GATE_UP, _DOWN = range(4)
_FIRST, _SECOND, _OF_QUERY, _OF_KEY = range(4)
# Elements from which a second thread gains more than it takes to wake it.
_MANY: Final = 32_000

_jitted = njit(error_model="numpy")


@_jitted
def _read_step(step):
    return Step(
        int64_at(step, 0),
        int64_at(step, 1),
        int64_at(step, 2),
        int64_at(step, 3),
        int64_at(step, 4),
        int64_at(step, 5),
        int64_at(step, 6),
        int64_at(step, 7),
        int64_at(step, 8),
        int64_at(step, 9),
        int64_at(step, 10),
        int64_at(step, 11),
        int64_at(step, 12),
        int64_at(step, 13),
        int64_at(step, 14),
        int64_at(step, 15),
        int64_at(step, 16),
        int64_at(step, 17),
        int64_at(step, 18),
    )


@_jitted
def _parts(step, count):
    """Of an operation on so many elements."""
    return step.num_threads if count >= _MANY else 1


@_jitted
def _product(layer, step, which, x_at, out_at):
    at = _WEIGHTS + 4 * which
    panels, num_panels, bias = int64_at(layer, at), int64_at(layer, at + 1), int64_at(layer, at + 2)
    depth = int64_at(layer, at + 3)
    if step.num_tokens == 1:
        multiply_row(x_at, depth, panels, num_panels, bias, out_at)
    else:
        count = step.num_tokens * depth
        widen_all(x_at, step.wide, count, _parts(step, count))
        multiply(step.wide, step.num_tokens, depth, panels, num_panels, bias, out_at)


@_jitted
def _norm(layer, step, which, x_at, out_at):
    weight, style = int64_at(layer, _NORMS + 2 * which), int64_at(layer, _NORMS + 2 * which + 1)
    eps = np.float64(float_at(int64_at(layer, _EPS), which))
    parts = _parts(step, step.num_tokens * step.size)
    norm_rows(x_at, weight, out_at, step.size, eps, style, step.num_tokens, parts)


@_jitted
def _norm_heads(layer, step, which, first_at, num_heads, token_stride):
    """Each head of each token where it lies."""
    weight, style = int64_at(layer, _NORMS + 2 * which), int64_at(layer, _NORMS + 2 * which + 1)
    if weight:
        eps = np.float64(float_at(int64_at(layer, _EPS), which))
        for token in range(step.num_tokens):
            at = first_at + _BF16 * token * token_stride
            norm_rows(at, weight, at, step.head_dim, eps, style, num_heads, 1)


@_jitted
def _rotate(step, first_at, num_heads, token_stride, out_at):
    parts = _parts(step, step.num_tokens * num_heads * step.head_dim)
    rotate_heads(
        first_at,
        step.head_dim,
        token_stride,
        num_heads,
        step.cos,
        step.sin,
        out_at,
        step.head_dim,
        step.num_tokens,
        parts,
    )


@_jitted
def _store(step, first_at, token_stride, cache):
    bytes_a_head = _BF16 * step.head_dim
    store_heads(
        first_at,
        _BF16 * token_stride,
        bytes_a_head,
        cache,
        step.slots,
        step.num_tokens,
        step.num_kv_heads,
        bytes_a_head,
    )


@_jitted
def _attend(step, keys, values, worker, job):
    """The first numbers of a job are of a layer; see `kernels.numba_layout.Layout`."""
    put_int64(job, 0, step.query)
    put_int64(job, 1, step.num_heads * step.head_dim)
    put_int64(job, 2, step.head_dim)
    put_int64(job, 3, keys)
    put_int64(job, 4, values)
    put_int64(job, 5, step.attended)
    put_int64(job, 6, 0)
    launch(worker, job, step.num_threads)


@_jitted
def _add(step, hidden, more):
    count = step.num_tokens * step.size
    add_all(hidden, more, count, _parts(step, count))


# A chunk takes a while: the process's other threads go on meanwhile.
@njit(error_model="numpy", cache=True, nogil=True)
def _run_layer(layer, step_at, hidden, keys, values, worker, job):
    step = _read_step(step_at)
    heads, kv_heads = step.num_heads * step.head_dim, step.num_kv_heads * step.head_dim
    stride = heads + 2 * kv_heads
    key, value = step.heads + _BF16 * heads, step.heads + _BF16 * (heads + kv_heads)
    _norm(layer, step, _FIRST, hidden, step.normed)
    _product(layer, step, _QKV, step.normed, step.heads)
    _norm_heads(layer, step, _OF_QUERY, step.heads, step.num_heads, stride)
    _norm_heads(layer, step, _OF_KEY, key, step.num_kv_heads, stride)
    _rotate(step, step.heads, step.num_heads, stride, step.query)
    _rotate(step, key, step.num_kv_heads, stride, step.key)
    _store(step, step.key, kv_heads, keys)
    _store(step, value, stride, values)
    _attend(step, keys, values, worker, job)
    _product(layer, step, _OUTPUT, step.attended, step.product)
    _add(step, hidden, step.product)
    _norm(layer, step, _SECOND, hidden, step.normed)
    _product(layer, step, _GATE_UP, step.normed, step.gates)
    gates, up, inner = step.gates, step.gates + _BF16 * step.inner, step.inner
    parts = _parts(step, step.num_tokens * inner)
    activation = int64_at(layer, _ACTIVATION)
    gate_rows(
        gates, 2 * inner, up, 2 * inner, step.gated, inner, activation, step.num_tokens, parts
    )
    _product(layer, step, _DOWN, step.gated, step.product)
    _add(step, hidden, step.product)


def compile_all() -> None:
    """Compile what runs a layer, or fetch it from the cache."""
    # As a call looks for it: a signature in words would be kept under another name.
    _run_layer.compile((types.int64,) * 7)
