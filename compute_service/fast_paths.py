"""What of a loaded model is replaced by something faster that computes the same, each with a switch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from compute_service import fused_layer, fused_ops, packed_linear

if TYPE_CHECKING:
    from torch import nn

    from kernels.launcher import Kernels


@dataclass(frozen=True, slots=True)
class FastPaths:
    """Which replacements are made."""

    packed_weights: bool = (
        True  # bfloat16 products on the CPU, from weights in a layout made for it
    )

    fused_ops: bool = True  # norms, gates and rotary positions in one pass each, likewise

    fused_layers: bool = True  # decoder layers made of all these in one call each, likewise

    def apply(self, model: nn.Module, kernels: Kernels) -> None:
        """Make them, in place; the load-time proof compares what comes of it with the model's own logits."""
        # Fused first: an operation is recognised among torch's own modules.
        if self.fused_ops:
            fused_ops.fuse(model)
        if self.packed_weights:
            packed_linear.pack_linears(model, packed_linear.choose())
        if self.fused_layers:
            fused_layer.fuse_layers(model, kernels)


EVERY_FAST_PATH: Final = FastPaths()
