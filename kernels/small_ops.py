"""What a decoder computes between its products, in plain torch: what `kernels.numba_small_ops` has to give."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor


class NormStyle(IntEnum):
    """Where the weight of an RMS norm comes in."""

    AFTER_ROUNDING = (
        0  # the normed row is rounded to its own dtype, then multiplied: Llama, Qwen, Mistral
    )
    BEFORE_ROUNDING = 1  # multiplied in float32, then rounded: OLMo 2, GPT-OSS
    ONE_PLUS = 2  # as BEFORE_ROUNDING, by 1 + weight: Gemma


class Activation(IntEnum):
    """Of the gate of a gated MLP."""

    SILU = 0
    GELU_TANH = 1


def rms_norm(x: Tensor, weight: Tensor, eps: float, style: NormStyle) -> Tensor:
    """Rows of x `[..., size]` divided by the root of their mean square, times weight `[size]`.

    Zhang and Sennrich, 2019 (arXiv:1910.07467).
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if style is NormStyle.AFTER_ROUNDING:
        return weight * normed.to(x.dtype)
    factor = weight.float() + (style is NormStyle.ONE_PLUS)
    return (normed * factor).to(x.dtype)


def gate(x: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """activation(x) * up, both `[..., size]`; the activation is rounded first."""
    if activation is Activation.SILU:
        return functional.silu(x) * up
    return functional.gelu(x, approximate="tanh") * up


def rotate(query: Tensor, key: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions (Su et al., 2021, arXiv:2104.09864): element i of a head turns with element i + head_dim / 2.

    Args:
        query: `[1, num_heads, T, head_dim]`.
        key: `[1, num_kv_heads, T, head_dim]`.
        cosines: `[1, T, head_dim]`.
        sines: as cosines.

    Returns:
        Both, rotated; each product is rounded before the sum.
    """
    return _rotated(query, cosines, sines), _rotated(key, cosines, sines)


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cosines.unsqueeze(1) + torch.cat((-high, low), dim=-1) * sines.unsqueeze(1)
