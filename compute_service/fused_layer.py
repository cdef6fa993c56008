"""Decoder layers that run as one call of `kernels.numba_layer`.

A layer qualifies when all its parts were recognised before, and when the call gives what its own code gives with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import structlog
import torch
from torch import Tensor, nn

from compute_service.attention import PagedContext
from compute_service.fused_attention import JoinedAttention
from compute_service.fused_ops import FusedMlp, FusedNorm
from compute_service.packed_linear import PanelLinear
from compute_service.paged_probe import BLOCK_SIZE, batch_of
from kernels.numba_layer import Layer, LayerParts, LayerStep

if TYPE_CHECKING:
    from kernels.launcher import Kernels

_CHILDREN: Final = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_PROBE_TOKENS: Final = (1, 3)

_logger = structlog.get_logger()


@torch.inference_mode()
def fuse_layers(model: nn.Module, kernels: Kernels) -> None:
    """Replace the forward of each layer that qualifies, and log how many did; others stay as they are."""
    if kernels.numba_attention is None:
        return
    found = [(module, _parts_of(module)) for module in model.modules()]
    candidates = [(module, parts) for module, parts in found if parts and parts.is_supported]
    layer_pass = _Pass(LayerStep(kernels.numba_attention))
    count = 0
    for module, parts in candidates:
        # They hand their memory on to one another.
        if parts.shape == candidates[0][1].shape:
            fused = _FusedLayer(module, parts, layer_pass)
            if _is_same(fused, module, parts, kernels):
                module.forward = fused
                count += 1
    _logger.info("layers_fused", count=count)


class _Pass:
    """What the layers of a forward pass share: memory to work in, and the hidden state, which they change in place."""

    def __init__(self, step: LayerStep) -> None:
        self.step = step
        self._paged: PagedContext | None = None
        self._rotary: tuple[Tensor, Tensor] | None = None
        self._hidden: Tensor | None = None

    def enter(
        self, parts: LayerParts, hidden: Tensor, rotary: tuple[Tensor, Tensor], paged: PagedContext
    ) -> Tensor:
        """Begin with the first layer of a pass, or where rotary positions change; the hidden state to change."""
        # Kept here, none of them can be another one at the same address.
        if paged is not self._paged or rotary is not self._rotary:
            self.step.begin(parts, hidden.shape[1], *rotary, paged.batch)
            self._paged, self._rotary = paged, rotary
        if hidden is not self._hidden:
            # What comes from elsewhere is not ours to change.
            self._hidden = hidden.clone(memory_format=torch.contiguous_format)
        return self._hidden


class _FusedLayer:
    """The forward of a decoder layer."""

    def __init__(self, module: Any, parts: LayerParts, layer_pass: _Pass) -> None:  # noqa: ANN401 -- nn.Module's attributes have no types
        self._theirs = module.forward
        self._layer = Layer(parts)
        self._layer_idx = module.self_attn.forward.layer_idx
        self._pass = layer_pass

    def __call__(
        self,
        hidden_states: Tensor,
        *arguments: object,
        position_embeddings: tuple[Tensor, Tensor],
        paged: PagedContext,
        **named: object,
    ) -> Tensor:
        """As theirs, with our attention; what is not bfloat16 all through goes there."""
        parts, caches = self._layer.parts, paged.caches[self._layer_idx]
        cos = position_embeddings[0]
        if not (
            hidden_states.dtype is cos.dtype is torch.bfloat16
            and cos.shape[-1] == parts.head_dim
            and LayerStep.can_use(*caches)
        ):
            named |= {"position_embeddings": position_embeddings, "paged": paged}
            theirs: Tensor = self._theirs(hidden_states, *arguments, **named)
            return theirs
        hidden = self._pass.enter(parts, hidden_states, position_embeddings, paged)
        self._pass.step.run(self._layer, hidden, *caches)
        return hidden


def _parts_of(module: Any) -> LayerParts | None:  # noqa: ANN401 -- as above
    """What a layer is made of, if all of it was recognised."""
    if {name for name, _ in module.named_children()} != _CHILDREN:
        return None
    attention, mlp = module.self_attn.forward, module.mlp.forward
    norms: tuple[Any, ...] = (
        module.input_layernorm.forward,
        module.post_attention_layernorm.forward,
    )
    if not isinstance(attention, JoinedAttention) or not isinstance(mlp, FusedMlp):
        return None
    if not attention.rotary.is_fused:
        return None
    if attention.has_norms:
        norms += (module.self_attn.q_norm.forward, module.self_attn.k_norm.forward)
    linears = (
        *(module.self_attn.qkv_proj, module.self_attn.o_proj),
        *(module.mlp.gate_up_proj, module.mlp.down_proj),
    )
    if not all(isinstance(found, FusedNorm) for found in norms):
        return None
    if not all(isinstance(found, PanelLinear) for found in linears):
        return None
    qkv, output, gate_up, down = (found.packed for found in linears)
    return LayerParts(
        first_norm=norms[0].norm,
        qkv=qkv,
        head_norms=tuple(found.norm for found in norms[2:]),
        attention=attention.params,
        output=output,
        second_norm=norms[1].norm,
        gate_up=gate_up,
        activation=mlp.activation,
        down=down,
        num_heads=attention.num_heads[0],
        num_kv_heads=attention.num_heads[1],
        head_dim=attention.head_dim,
    )


def _is_same(
    fused: _FusedLayer,
    module: Any,  # noqa: ANN401 -- as above
    parts: LayerParts,
    kernels: Kernels,
) -> bool:
    """Whether a token and a chunk give the same bits, in the hidden state and in the caches."""
    return all(
        all(map(torch.equal, _run(fused, count, module, parts, kernels), expected))
        for count in _PROBE_TOKENS
        for expected in [_run(module.forward, count, module, parts, kernels)]
    )


def _run(
    forward: Any,  # noqa: ANN401 -- theirs or ours
    num_tokens: int,
    module: Any,  # noqa: ANN401 -- as above
    parts: LayerParts,
    kernels: Kernels,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, keys and values of a sequence's first tokens."""
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(1, num_tokens, parts.size, generator=generator).bfloat16()
    angles = torch.randn(1, num_tokens, parts.head_dim, generator=generator)
    shape = (1, BLOCK_SIZE, parts.num_kv_heads, parts.head_dim)
    keys, values = (torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2))
    batch = batch_of(torch.zeros(1, 1, dtype=torch.int32), [(0, num_tokens)])
    layer_idx = module.self_attn.forward.layer_idx
    output: Tensor = forward(
        hidden,
        position_embeddings=(angles.cos().bfloat16(), angles.sin().bfloat16()),
        attention_mask=None,
        paged=PagedContext(kernels, [(keys, values)] * (layer_idx + 1), batch),
    )
    return output, keys, values
