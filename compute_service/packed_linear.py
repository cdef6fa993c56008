"""Linear modules whose weights are packed for this CPU, in place of torch's.

torch multiplies bfloat16 from row-major weights: without instructions for that at a tenth of what float32 reaches, with
them at half of the memory's bandwidth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from kernels import numba_linear

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

# For which number of rows oneDNN chooses its layout; products of any number read it.
_TYPICAL_ROWS: Final = 16


class PanelLinear(nn.Module):
    """A linear module that multiplies by `kernels.numba_linear`.

    Args:
        weight: bfloat16 `[N, K]`, not kept.
        bias: `[N]` or none.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = numba_linear.pack(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`."""
        return numba_linear.linear(x, self.packed)


class OneDnnLinear(nn.Module):
    """A linear module that multiplies by oneDNN, from a weight in the layout that it asks for.

    Args:
        weight: bfloat16 or float32 `[N, K]`, not kept.
        bias: `[N]` or none.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)  # noqa: SLF001 -- as torch's own compiler
        self._bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001 -- as above
            x, self._weight, self._bias, "none", [], ""
        )
        return product


def pack_linears(model: nn.Module, make: Callable[[Tensor, Tensor | None], nn.Module]) -> None:
    """Replace each linear module with a bfloat16 weight on the CPU; its weight is freed unless the embedding shares it.

    Weights are packed one after the other, so that no more than one is there twice.
    """
    for parent, name in _linears(model):
        setattr(parent, name, _packed(parent.get_submodule(name), make))


def choose() -> Callable[[Tensor, Tensor | None], nn.Module]:
    """What multiplies bfloat16 fastest here."""
    has_instructions = torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 -- there is no public name
    return OneDnnLinear if has_instructions else PanelLinear


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Parents and names alone: whoever held the modules would keep their weights."""
    parents = [module for module in model.modules() if not isinstance(module, nn.Linear)]
    for parent in parents:
        names = [name for name, child in parent.named_children() if _is_packable(child)]
        yield from ((parent, name) for name in names)


def _is_packable(module: nn.Module) -> bool:
    # A subclass may compute something else.
    if type(module) is not nn.Linear:
        return False
    return module.weight.dtype == torch.bfloat16 and module.weight.device.type == "cpu"


def _packed(linear: nn.Module, make: Callable[[Tensor, Tensor | None], nn.Module]) -> nn.Module:
    weight, bias = linear.get_parameter("weight"), linear.bias
    return make(weight.detach(), bias.detach() if isinstance(bias, torch.Tensor) else None)
