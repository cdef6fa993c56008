"""Linear modules that read the same input as one: one product where there were several, from one stream of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def join_if(
    module: nn.Module, parts: Sequence[str], name: str, is_same: Callable[[], bool]
) -> bool:
    """Put one linear module `name` of `module` in place of its `parts` if `is_same()`, which is asked when all are there.

    Raises:
        TypeError: when one of them is more than a plain linear module; `module` is left as it was.
    """
    setattr(module, name, _join([module.get_submodule(part) for part in parts]))
    joined = False
    try:
        joined = is_same()
    finally:
        for gone in parts if joined else [name]:
            delattr(module, gone)
    return joined


def _join(modules: Sequence[nn.Module]) -> nn.Linear:
    """A module whose outputs are those of linear modules, side by side; weights are copied."""
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    if any(type(module) is not nn.Linear for module in modules):
        # A subclass may compute something else.
        kinds = sorted({type(module).__name__ for module in modules})
        raise TypeError(f"only plain linear modules can be joined, not {', '.join(kinds)}")
    weight = torch.cat([linear.weight.detach() for linear in linears])
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    joined.register_parameter("bias", _joined_bias(linears))
    return joined


def _joined_bias(linears: Sequence[nn.Linear]) -> nn.Parameter | None:
    """Zeros stand for a bias that is not there."""
    if all(linear.bias is None for linear in linears):
        return None
    biases = [
        linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias.detach()
        for linear in linears
    ]
    return nn.Parameter(torch.cat(biases), requires_grad=False)
