"""Fused operations: the model's own numbers, only where they are proven, and only in the model that was given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from paged_models import logits, make_model
from structlog.testing import capture_logs
from tiny_checkpoints import COMMON, make_checkpoint
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from compute_service import attention
from compute_service.attention_record import check_calls, record
from compute_service.device import open_device
from compute_service.fast_paths import FastPaths
from compute_service.fused_ops import fuse
from compute_service.model_loader import load_model

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

NUM_LAYERS = COMMON["num_hidden_layers"]


def fused(model: nn.Module) -> Mapping[str, Any]:
    """What the log says of it."""
    with capture_logs() as logs:
        fuse(model)
    (entry,) = logs
    return entry


@pytest.mark.parametrize(
    ("model_type", "norms", "gates", "attentions"),
    [
        ("llama", 2, 1, 1),
        ("qwen2", 2, 1, 1),
        ("qwen3", 4, 1, 1),  # heads are normed too
        ("gemma2", 4, 1, 1),  # scores are capped
        ("gemma3_text", 6, 1, 1),
        ("olmo2", 4, 1, 0),  # norms before heads are told apart
        ("mixtral", 2, 0, 1),
        ("deepseek_v3", 4, 1, 0),  # queries and keys from latents
    ],
)
def test_logits_are_the_models_own(
    model_type: str, norms: int, gates: int, attentions: int
) -> None:
    """What a layer has is replaced in every layer, and the logits are those of plain torch up to rounding."""
    model = make_model(model_type)
    layers = check_calls(model, record(model, torch.arange(5)))
    plain = [logits(model, layers, num_tokens) for num_tokens in (1, 40)]
    entry = fused(model)
    assert entry["norms"] == norms * NUM_LAYERS + 1
    assert entry["gates"] == gates * NUM_LAYERS
    assert entry["attentions"] == attentions * NUM_LAYERS
    assert entry["rotaries"] == (1 - attentions) * NUM_LAYERS
    assert entry["kept"] == []
    for expected in plain:
        found = logits(model, layers, len(expected))
        assert (found - expected).abs().max() < 0.02 * expected.abs().max()
        assert (found.argmax(1) == expected.argmax(1)).float().mean() >= 0.95


def test_other_models_keep_their_functions() -> None:
    """Neither the modeling file nor another model of the same class is changed."""
    function = modeling_llama.apply_rotary_pos_emb
    other, model = make_model("llama"), make_model("llama")
    fused(model)
    assert modeling_llama.apply_rotary_pos_emb is function
    for module in other.modules():
        assert "forward" not in vars(module)


class CenteredNorm(nn.Module):
    """Has all the attributes of an RMS norm, and is none."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size).bfloat16())
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        centered = x.float() - 0.05 * x.float().mean(-1, keepdim=True)
        scale = torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (centered * scale).to(x.dtype)


class TwoInputNorm(CenteredNorm):
    """Cannot be called as a norm is."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x) * gate


class ScaledMLP(modeling_llama.LlamaMLP):
    """Scales what it multiplies, by three percent."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 1.03)
        return found


def turn_neighbours(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotary positions that pair neighbours instead of halves."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def turn(x: Tensor) -> Tensor:
        return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin

    return turn(q), turn(k)


@pytest.mark.parametrize("norm_class", [CenteredNorm, TwoInputNorm])
def test_a_norm_that_computes_otherwise_is_kept(norm_class: type[CenteredNorm]) -> None:
    """Names and attributes prove nothing; the log names what was left alone."""
    model = make_model("llama")
    model.model.norm = norm_class(COMMON["hidden_size"])
    entry = fused(model)
    assert entry["norms"] == 2 * NUM_LAYERS
    assert entry["kept"] == [norm_class.__name__]
    assert "forward" not in vars(model.model.norm)


def test_an_mlp_that_computes_otherwise_is_kept() -> None:
    """Three percent are more than rounding."""
    model = make_model("llama")
    model.model.layers[0].mlp.__class__ = ScaledMLP
    entry = fused(model)
    assert entry["gates"] == NUM_LAYERS - 1
    assert entry["kept"] == ["ScaledMLP"]


class ScaledAttention(modeling_llama.LlamaAttention):
    """Scales queries by three percent."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        scale = self.scaling * self.factor(**kwargs)
        output, _ = attention.attend(
            self, query * scale, key, value, attention_mask, scaling=1.0, **kwargs
        )
        return self.o_proj(output.flatten(2)), None

    def factor(self, **_: Any) -> float:
        return 1.03


class FarSightedAttention(ScaledAttention):
    """Scales queries at far positions."""

    def factor(self, *, position_ids: Tensor, **_: Any) -> float:
        return 1.03 if int(position_ids.max()) > 10_000 else 1.0


@pytest.mark.parametrize("attention_class", [ScaledAttention, FarSightedAttention])
def test_attention_that_asks_otherwise_keeps_its_code(
    attention_class: type[ScaledAttention],
) -> None:
    """Its projections stay three, as its code wants them; its heads may be turned by ours."""
    model = make_model("llama")
    model.model.layers[0].self_attn.__class__ = attention_class
    entry = fused(model)
    assert entry["attentions"] == NUM_LAYERS - 1
    assert hasattr(model.model.layers[0].self_attn, "q_proj")
    assert not hasattr(model.model.layers[0].self_attn, "qkv_proj")


def test_rotary_positions_that_pair_otherwise_are_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function is asked for numbers, not for its name; products are joined around it."""
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", turn_neighbours)
    model = make_model("llama")
    layers = check_calls(model, record(model, torch.arange(5)))
    expected = logits(model, layers, 40)
    entry = fused(model)
    assert entry["rotaries"] == 0
    assert entry["attentions"] == NUM_LAYERS
    assert (logits(model, layers, 40) - expected).abs().max() < 0.02 * expected.abs().max()


def test_models_in_float32_stay_as_they_are() -> None:
    """Not one forward is replaced."""
    model = make_model("llama").float()
    fuse(model)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("fused_ops", [True, False])
def test_a_switch_decides(fused_ops: bool, tmp_path: Path) -> None:
    """Loading proves the model either way; without the switch each forward is the model's own."""
    loaded = load_model(
        str(make_checkpoint(tmp_path / "model", "llama")),
        dtype="bfloat16",
        max_model_len=None,
        trust_remote_code=False,
        device=open_device("cpu"),
        fast_paths=FastPaths(fused_ops=fused_ops, fused_layers=False),
    )
    replaced = [module for module in loaded.model.modules() if "forward" in vars(module)]
    assert len(replaced) == (4 * NUM_LAYERS + 1 if fused_ops else 0)
