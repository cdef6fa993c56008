"""The operations of `kernels.small_ops` on the CPU: a pass over memory each, compiled by numba; bfloat16 in and out.

Sums and functions are float32. What is rounded to bfloat16 in between is what plain torch rounds, so that results are its
own but for float32's last bits: equal, or one step of bfloat16 apart. Kernels take addresses, and strides in elements: at
16 rows such an operation takes a few microseconds, and making a numpy array of a tensor takes three.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np
import torch

from kernels.numba_scalars import (
    OPTIONS,
    bf16_pointer,
    float_pointer,
    gelu_tanh,
    narrow,
    silu,
    to_bf16,
    widen,
)
from kernels.numba_setup import carray, njit, prange
from kernels.small_ops import Activation, NormStyle

if TYPE_CHECKING:
    from torch import Tensor

# Elements from which a second thread gains more than it takes to wake it.
_MANY_TO_NORM = 50_000
_MANY_TO_GATE = 32_000
_MANY_TO_ROTATE = 40_000

_AFTER_ROUNDING, _ONE_PLUS = int(NormStyle.AFTER_ROUNDING), int(NormStyle.ONE_PLUS)
_SILU = int(Activation.SILU)
_ZERO, _ONE = np.float32(0), np.float32(1)


@njit(error_model="numpy", fastmath={"contract", "reassoc"}, cache=True)
def norm_some(x_at, weight_at, out_at, size, eps, style, begin, end):
    """Norm the rows `[begin, end)`; in place where out is x."""
    weight = carray(bf16_pointer(weight_at), size)
    for row in range(begin, end):
        x = carray(bf16_pointer(x_at + 2 * row * size), size)
        out = carray(bf16_pointer(out_at + 2 * row * size), size)
        total = _ZERO
        for i in range(size):
            total += widen(x[i]) * widen(x[i])
        scale = _ONE / np.sqrt(total / np.float32(size) + np.float32(eps))
        if style == _AFTER_ROUNDING:
            for i in range(size):
                out[i] = narrow(to_bf16(widen(x[i]) * scale) * widen(weight[i]))
        else:
            shift = _ONE if style == _ONE_PLUS else _ZERO
            for i in range(size):
                out[i] = narrow(widen(x[i]) * scale * (widen(weight[i]) + shift))


@njit(parallel=True, cache=True)
def _norm_parts(x_at, weight_at, out_at, size, eps, style, rows, parts):
    for part in prange(parts):
        begin, end = part * rows // parts, (part + 1) * rows // parts
        norm_some(x_at, weight_at, out_at, size, eps, style, begin, end)


@njit(cache=True)
def norm_rows(x_at, weight_at, out_at, size, eps, style, rows, parts):
    """See `rms_norm`."""
    if parts == 1:
        norm_some(x_at, weight_at, out_at, size, eps, style, 0, rows)
    else:
        _norm_parts(x_at, weight_at, out_at, size, eps, style, rows, parts)


@njit(cache=True, **OPTIONS)
def _gate_some(x_at, x_stride, up_at, up_stride, out_at, size, activation, begin, end):
    for row in range(begin, end):
        x = carray(bf16_pointer(x_at + 2 * row * x_stride), size)
        up = carray(bf16_pointer(up_at + 2 * row * up_stride), size)
        out = carray(bf16_pointer(out_at + 2 * row * size), size)
        if activation == _SILU:
            for i in range(size):
                out[i] = narrow(to_bf16(silu(widen(x[i]))) * widen(up[i]))
        else:
            for i in range(size):
                out[i] = narrow(to_bf16(gelu_tanh(widen(x[i]))) * widen(up[i]))


@njit(parallel=True, cache=True)
def _gate_parts(x_at, x_stride, up_at, up_stride, out_at, size, activation, rows, parts):
    for part in prange(parts):
        begin, end = part * rows // parts, (part + 1) * rows // parts
        _gate_some(x_at, x_stride, up_at, up_stride, out_at, size, activation, begin, end)


@njit(cache=True)
def gate_rows(x_at, x_stride, up_at, up_stride, out_at, size, activation, rows, parts):
    """See `gate`."""
    if parts == 1:
        _gate_some(x_at, x_stride, up_at, up_stride, out_at, size, activation, 0, rows)
    else:
        _gate_parts(x_at, x_stride, up_at, up_stride, out_at, size, activation, rows, parts)


@njit(cache=True, **OPTIONS)
def _rotate_head(x_at, cos_at, sin_at, out_at, half):
    x = carray(bf16_pointer(x_at), 2 * half)
    cosines, sines = carray(bf16_pointer(cos_at), 2 * half), carray(bf16_pointer(sin_at), 2 * half)
    out = carray(bf16_pointer(out_at), 2 * half)
    for i in range(half):
        low, high = widen(x[i]), widen(x[half + i])
        out[i] = narrow(to_bf16(low * widen(cosines[i])) - to_bf16(high * widen(sines[i])))
        turned = to_bf16(low * widen(sines[half + i]))
        out[half + i] = narrow(to_bf16(high * widen(cosines[half + i])) + turned)


@njit(cache=True, **OPTIONS)
def _rotate_some(x_at, head_stride, token_stride, heads, cos_at, sin_at, out_at, size, begin, end):
    for token in range(begin, end):
        at = 2 * token * size
        for head in range(heads):
            source = x_at + 2 * (head * head_stride + token * token_stride)
            target = out_at + 2 * (token * heads + head) * size
            _rotate_head(source, cos_at + at, sin_at + at, target, size // 2)


@njit(parallel=True, cache=True)
def _rotate_parts(
    x_at, head_stride, token_stride, heads, cos_at, sin_at, out_at, size, tokens, parts
):
    for part in prange(parts):
        begin, end = part * tokens // parts, (part + 1) * tokens // parts
        _rotate_some(
            x_at, head_stride, token_stride, heads, cos_at, sin_at, out_at, size, begin, end
        )


@njit(cache=True)
def rotate_heads(
    x_at, head_stride, token_stride, heads, cos_at, sin_at, out_at, size, tokens, parts
):
    """Half of `rotate_tokens`."""
    what = (x_at, head_stride, token_stride, heads, cos_at, sin_at, out_at, size)
    if parts == 1:
        _rotate_some(*what, 0, tokens)
    else:
        _rotate_parts(*what, tokens, parts)


@njit(cache=True, **OPTIONS)
def _widen_some(x_at, out_at, begin, end):
    x, out = carray(bf16_pointer(x_at), end), carray(float_pointer(out_at), end)
    for i in range(begin, end):
        out[i] = widen(x[i])


@njit(parallel=True, cache=True)
def _widen_parts(x_at, out_at, count, parts):
    for part in prange(parts):
        _widen_some(x_at, out_at, part * count // parts, (part + 1) * count // parts)


@njit(cache=True)
def widen_all(x_at, out_at, count, parts):
    """Write `count` bfloat16 as float32."""
    if parts == 1:
        _widen_some(x_at, out_at, 0, count)
    else:
        _widen_parts(x_at, out_at, count, parts)


@njit(cache=True, **OPTIONS)
def _add_some(x_at, more_at, begin, end):
    x, more = carray(bf16_pointer(x_at), end), carray(bf16_pointer(more_at), end)
    for i in range(begin, end):
        x[i] = narrow(widen(x[i]) + widen(more[i]))


@njit(parallel=True, cache=True)
def _add_parts(x_at, more_at, count, parts):
    for part in prange(parts):
        _add_some(x_at, more_at, part * count // parts, (part + 1) * count // parts)


@njit(cache=True)
def add_all(x_at, more_at, count, parts):
    """Add `count` bfloat16 to others."""
    if parts == 1:
        _add_some(x_at, more_at, 0, count)
    else:
        _add_parts(x_at, more_at, count, parts)


def compile_all() -> None:
    """Compile every kernel, or fetch it from the cache, by calls that have nothing to do: no step waits for that."""
    norm_rows(0, 0, 0, 1, 0.0, 0, 0, 1)
    gate_rows(0, 0, 0, 0, 0, 1, 0, 0, 1)
    rotate_heads(0, 0, 0, 0, 0, 0, 0, 1, 0, 1)


def _parts(count: int, many: int) -> int:
    """Of an operation on so many elements."""
    threads: int = numba.get_num_threads()
    return 1 if count < many else threads


def rms_norm(x: Tensor, weight: Tensor, eps: float, style: NormStyle) -> Tensor:
    """See `kernels.small_ops.rms_norm`; bfloat16, weight contiguous."""
    assert x.dtype is weight.dtype is torch.bfloat16
    x = x.contiguous()
    out = torch.empty_like(x)
    size, count = x.shape[-1], x.numel()
    rows = count // size
    what = (x.data_ptr(), weight.data_ptr(), out.data_ptr(), size, eps, int(style))
    norm_rows(*what, rows, _parts(count, _MANY_TO_NORM))
    return out


def gate(x: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """See `kernels.small_ops.gate`; bfloat16 `[..., rows, size]`, neighbours of a row side by side, rows evenly apart."""
    assert x.dtype is up.dtype is torch.bfloat16
    size = x.shape[-1]
    rows = x.numel() // size
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    what = (
        *(x.data_ptr(), x.stride(-2), up.data_ptr(), up.stride(-2)),
        *(out.data_ptr(), size, int(activation)),
    )
    gate_rows(*what, rows, _parts(rows * size, _MANY_TO_GATE))
    return out


def rotate(query: Tensor, key: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.small_ops.rotate`; bfloat16, cosines and sines contiguous, neighbours of a head side by side.

    The results' memory is `[1, T, heads, head_dim]`, as the attention kernels want it.
    """
    by_tokens = rotate_tokens(query[0].transpose(0, 1), key[0].transpose(0, 1), cosines, sines)
    return by_tokens[0].transpose(0, 1)[None], by_tokens[1].transpose(0, 1)[None]


def rotate_tokens(
    query: Tensor, key: Tensor, cosines: Tensor, sines: Tensor
) -> tuple[Tensor, Tensor]:
    """As `rotate`, of `[T, heads, head_dim]`."""
    assert query.dtype is key.dtype is cosines.dtype is sines.dtype is torch.bfloat16
    cos_at, sin_at = cosines.data_ptr(), sines.data_ptr()
    return _rotated(query, cos_at, sin_at), _rotated(key, cos_at, sin_at)


def _rotated(x: Tensor, cos_at: int, sin_at: int) -> Tensor:
    tokens, heads, size = x.shape
    out = torch.empty((tokens, heads, size), dtype=torch.bfloat16)
    token_stride, head_stride, _ = x.stride()
    what = (
        *(x.data_ptr(), head_stride, token_stride, heads),
        *(cos_at, sin_at, out.data_ptr(), size),
    )
    rotate_heads(*what, tokens, _parts(heads * tokens * size, _MANY_TO_ROTATE))
    return out
