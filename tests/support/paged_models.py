"""Small bfloat16 models with our attention, and their logits through block tables, without services."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tiny_checkpoints import COMMON, SERVED, VOCAB_SIZE
from transformers import AutoConfig, AutoModelForCausalLM

from compute_service import attention
from compute_service.forward import ForwardPass
from compute_service.paged_probe import BLOCK_SIZE, batch_of
from kernels.launcher import Kernels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from quire.pool_layout import LayerGeometry

NUM_BLOCKS = 12


def make_model(model_type: str, **overrides: Any) -> Any:
    """With our attention in place, as it is when a model is loaded."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**COMMON, **SERVED[model_type], **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            mean, spread = (
                (0.0, 1.6 / parameter.shape[-1] ** 0.5) if parameter.dim() > 1 else (0.8, 0.3)
            )
            parameter.normal_(mean, spread)
    attention.register()
    model.set_attn_implementation(attention.NAME)
    return model


def logits(model: Any, layers: Sequence[LayerGeometry], num_tokens: int) -> Tensor:
    """Of one sequence through block tables."""
    caches = [
        tuple(
            torch.zeros(NUM_BLOCKS, BLOCK_SIZE, layer.num_kv_heads, size, dtype=torch.bfloat16)
            for size in (layer.k_head_dim, layer.v_head_dim)
        )
        for layer in layers
    ]
    positions = torch.arange(num_tokens)
    tables = torch.arange(NUM_BLOCKS, dtype=torch.int32)[None]
    batch = batch_of(tables, [(0, num_tokens)])
    forward = ForwardPass(model, Kernels.for_device(torch.device("cpu")), caches)
    return forward(positions * 7 % VOCAB_SIZE, positions, batch, positions).float()
