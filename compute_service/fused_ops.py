"""Norms, gated activations and rotary positions of a loaded model, each as one pass over memory; products joined.

Model code stays as it is: a replacement is a `forward` of one module instance. Which modules can be replaced is never
read from a name alone: ours has to give what theirs gives on random input.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Final

import structlog
import torch
from torch import Tensor, nn

from compute_service.equivalence import agree, random_rows
from compute_service.fused_attention import TokenRotary, fuse_attention
from compute_service.joined_linear import join_if
from kernels import numba_small_ops
from kernels.numba_layer import Norm
from kernels.small_ops import Activation, NormStyle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ROTARY: Final = "apply_rotary_pos_emb"  # a global function of nearly every modeling file
_EPS_NAMES: Final = ("variance_epsilon", "eps")

_logger = structlog.get_logger()


@torch.inference_mode()
def fuse(model: nn.Module) -> None:
    """Replace what can be replaced in a bfloat16 model on the CPU, and log how much of each that was.

    Others stay as they are: in float32 products take longer and nothing is rounded in between.
    """
    parameter = next(model.parameters())
    if parameter.dtype is not torch.bfloat16 or parameter.device.type != "cpu":
        return
    numba_small_ops.compile_all()
    counts = dict.fromkeys(("norms", "gates", "rotaries", "attentions"), 0)
    kept = set()
    for kind, module, replacement in _candidates(model):
        if replacement is None:
            kept.add(type(module).__name__)
        else:
            module.forward = replacement
            counts[kind] += 1
    _logger.info("operations_fused", **counts, kept=sorted(kept))


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, Callable[..., Any] | None]]:
    """Modules that look like one of these, with a forward for each that proved to be it."""
    # The more a replacement takes in, the later: it is made of those that were replaced before.
    for module in model.modules():
        if _eps(module) is not None and isinstance(getattr(module, "weight", None), Tensor):
            yield "norms", module, _if_callable(_fused_norm, module)
    for module in list(model.modules()):
        if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            yield "gates", module, _if_callable(_fused_mlp, module)
    yield from _attentions(model)


def _attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module, Callable[..., Any] | None]]:
    """Layers whole, or else what turns their heads alone."""
    rotaries: dict[Callable[..., Any], Callable[..., Any] | None] = {}
    for module in list(model.modules()):
        forward = type(module).forward
        if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names:
            continue
        theirs = forward.__globals__.get(_ROTARY)
        if theirs is None:
            # Of this name it may only be an attribute of something else.
            continue
        if theirs not in rotaries:
            rotaries[theirs] = _if_callable(_fused_rotary, theirs)
        rotary = rotaries[theirs]
        by_tokens = TokenRotary(theirs, is_fused=rotary is not None)
        whole = _if_callable(fuse_attention, module, by_tokens)
        if whole is not None:
            yield "attentions", module, whole
        else:
            turning = rotary and MethodType(_with_global(forward, rotary), module)
            yield "rotaries", module, turning


def _if_callable(
    fused: Callable[..., Callable[..., Any] | None],
    *original: Any,  # noqa: ANN401 -- a module or a function, and what it is made of
) -> Callable[..., Any] | None:
    """The replacement of `original`; None too when that cannot be called as such an operation is."""
    try:
        return fused(*original)
    except (TypeError, RuntimeError, AttributeError):
        return None


def _eps(module: nn.Module) -> float | None:
    found = [getattr(module, name) for name in _EPS_NAMES if hasattr(module, name)]
    return found[0] if found and isinstance(found[0], float) else None


@dataclass(frozen=True, slots=True)
class FusedNorm:
    """The forward of a norm."""

    norm: Norm
    theirs: Callable[[Tensor], Tensor]  # of what is not bfloat16

    def __call__(self, x: Tensor) -> Tensor:
        """As theirs."""
        if x.dtype is not torch.bfloat16:
            return self.theirs(x)
        return numba_small_ops.rms_norm(x, self.norm.weight, self.norm.eps, self.norm.style)


def _fused_norm(module: Any) -> FusedNorm | None:  # noqa: ANN401 -- nn.Module's attributes have no types
    weight, theirs, eps = module.weight.detach(), module.forward, _eps(module)
    if weight.dtype is not torch.bfloat16 or weight.dim() != 1 or eps is None:
        return None
    x = random_rows(len(weight))
    expected = theirs(x)
    norms = (FusedNorm(Norm(weight, eps, style), theirs) for style in NormStyle)
    return next((found for found in norms if agree(found(x), expected)), None)


@dataclass(frozen=True, slots=True)
class FusedMlp:
    """The forward of a gated MLP whose first two products are one."""

    module: Any
    activation: Activation

    def __call__(self, x: Tensor) -> Tensor:
        """As theirs."""
        gates, up = self.module.gate_up_proj(x).chunk(2, -1)
        output: Tensor = self.module.down_proj(numba_small_ops.gate(gates, up, self.activation))
        return output


def _fused_mlp(module: Any) -> FusedMlp | None:  # noqa: ANN401 -- as above
    # Two rows say enough of a sum over all of them, and torch's own products take their time.
    x = random_rows(module.gate_proj.in_features)[:, 1:3]
    expected = module.forward(x)
    for activation in Activation:
        fused = FusedMlp(module, activation)

        def is_same(fused: FusedMlp = fused) -> bool:
            return agree(fused(x), expected)

        if join_if(module, ("gate_proj", "up_proj"), "gate_up_proj", is_same):
            return fused
    return None


def _fused_rotary(theirs: Callable[..., Any]) -> Callable[..., Any] | None:
    """Ours in place of a function (q, k, cos, sin) that turns halves of heads; it asks theirs for all else."""

    def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **named: Any) -> Any:  # noqa: ANN401 -- theirs
        if others or named or not _can_rotate(q, k, cos):
            return theirs(q, k, cos, sin, *others, **named)
        return numba_small_ops.rotate(q, k, cos, sin)

    arguments = _random_rotary_arguments()
    agreeing = map(agree, ours(*arguments), theirs(*arguments))
    return ours if all(agreeing) else None


def _can_rotate(q: Tensor, k: Tensor, cos: Tensor) -> bool:
    if not q.dtype is k.dtype is cos.dtype is torch.bfloat16:
        return False
    # Each look at a shape builds a tuple: this runs in every layer of every step.
    of_q, of_k, of_cos = q.shape, k.shape, cos.shape
    return (
        len(of_q) == len(of_k) == len(of_cos) + 1
        and of_q[0] == of_k[0] == of_cos[0] == 1
        and of_q[-1] == of_k[-1] == of_cos[-1]
    )


def _with_global(function: FunctionType, rotary: Callable[..., Any]) -> FunctionType:
    """The same code, in which the name of the rotary function means ours; the module that holds it is left alone."""
    made = FunctionType(
        function.__code__,
        {**function.__globals__, _ROTARY: rotary},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _random_rotary_arguments() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, cos, sin; the halves of cos and sin differ, as an original might mix them otherwise."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 9, 16), (1, 2, 9, 16), (1, 9, 16), (1, 9, 16))
    q, k, cos, sin = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    return q, k, cos, sin
