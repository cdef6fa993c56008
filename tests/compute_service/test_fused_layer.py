"""Layers that run as one call: the same bits as one operation after the other, and only where they are proven."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from paged_models import NUM_BLOCKS, make_model
from structlog.testing import capture_logs
from tiny_checkpoints import COMMON, VOCAB_SIZE, make_checkpoint
from transformers.models.llama import modeling_llama

from compute_service.device import open_device
from compute_service.fast_paths import FastPaths
from compute_service.forward import ForwardPass
from compute_service.fused_layer import fuse_layers
from compute_service.fused_ops import fuse
from compute_service.model_loader import load_model
from compute_service.packed_linear import PanelLinear, pack_linears
from compute_service.paged_probe import BLOCK_SIZE, batch_of
from kernels.launcher import Kernels

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from kernels.batch import PagedBatch

NUM_LAYERS = COMMON["num_hidden_layers"]
# Products leave no gaps, whatever a register holds.
EVEN = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
CPU = torch.device("cpu")
# Of sequences, those that run one token first: tokens before and with this step.
SPANS = {
    "a decode": [(6, 7)],
    "decodes": [(0, 1), (11, 12), (3, 4)],
    "a chunk": [(2, 11)],
    "all": [(9, 10), (0, 1), (0, 12), (5, 8)],
}


def prepared(model_type: str, **overrides: Any) -> Any:
    """With everything that layers are made of."""
    model = make_model(model_type, **{**EVEN, **overrides})
    fuse(model)
    pack_linears(model, PanelLinear)
    return model


def fuse_all(model: Any, kernels: Kernels) -> int:
    """How many the log says there were."""
    with capture_logs() as logs:
        fuse_layers(model, kernels)
    return sum(entry["count"] for entry in logs)


def packed(spans: Sequence[tuple[int, int]]) -> tuple[Tensor, PagedBatch]:
    """Positions of sequences that run `[begin, end)`, and their batch: three blocks each, in no order."""
    tables = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(0)).int()
    positions = torch.cat([torch.arange(begin, end) for begin, end in spans])
    return positions, batch_of(tables.view(-1, 3)[: len(spans)], spans)


def run(model: Any, spans: Sequence[tuple[int, int]], kernels: Kernels) -> list[Tensor]:
    """Logits of all tokens, and what is then in the caches."""
    generator = torch.Generator().manual_seed(1)
    shape = (NUM_BLOCKS, BLOCK_SIZE, COMMON["num_key_value_heads"], EVEN["head_dim"])
    caches = [
        (
            torch.randn(shape, generator=generator).bfloat16(),
            torch.randn(shape, generator=generator).bfloat16(),
        )
        for _ in range(NUM_LAYERS)
    ]
    positions, batch = packed(spans)
    tokens = torch.randint(VOCAB_SIZE, positions.shape, generator=generator)
    found = ForwardPass(model, kernels, caches)(
        tokens, positions, batch, torch.arange(len(positions))
    )
    return [found, *(cache for pair in caches for cache in pair)]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_layers_give_the_bits_of_their_parts(model_type: str) -> None:
    """Windows, biases and norms of heads included; a pass that has begun does not disturb the next one."""
    kernels = Kernels.for_device(CPU)
    plain, fused = prepared(model_type), prepared(model_type)
    assert fuse_all(fused, kernels) == NUM_LAYERS
    for spans in SPANS.values():
        pairs = zip(run(fused, spans, kernels), run(plain, spans, kernels), strict=True)
        assert all(torch.equal(found, expected) for found, expected in pairs)


class HalvedLayer(modeling_llama.LlamaDecoderLayer):
    """Has all the parts, and adds less of the last one."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        found: Tensor = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)) / 2
        return found


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [("gemma2", {}), ("granite", {"residual_multiplier": 0.5}), ("mixtral", {})],
)
def test_layers_of_another_form_are_kept(model_type: str, overrides: dict[str, Any]) -> None:
    """More norms, a factor of what is added, experts."""
    assert fuse_all(prepared(model_type, **overrides), Kernels.for_device(CPU)) == 0


def test_a_layer_that_computes_otherwise_is_kept() -> None:
    """Beside others that do not."""
    model = prepared("llama")
    model.model.layers[1].__class__ = HalvedLayer
    expected = run(model, SPANS["all"], Kernels.for_device(CPU))[0]
    assert fuse_all(model, Kernels.for_device(CPU)) == NUM_LAYERS - 1
    assert torch.equal(run(model, SPANS["all"], Kernels.for_device(CPU))[0], expected)


def test_layers_of_other_shapes_than_the_first_are_kept() -> None:
    """Layers hand their memory on to one another."""
    model = prepared("llama")
    wider = prepared("llama", intermediate_size=160)
    model.model.layers[1].mlp = wider.model.layers[1].mlp
    kernels = Kernels.for_device(CPU)
    expected = run(model, SPANS["all"], kernels)[0]
    assert fuse_all(model, kernels) == NUM_LAYERS - 1
    assert torch.equal(run(model, SPANS["all"], kernels)[0], expected)


def test_each_layer_may_turn_heads_by_angles_of_its_own() -> None:
    """As where windows and full attention have different rotary positions."""

    def turned_twice(model: Any) -> Any:
        layer = model.model.layers[1]
        theirs = layer.forward

        def forward(hidden_states: Tensor, **named: Any) -> Any:
            cos, sin = named.pop("position_embeddings")
            doubled = (cos * cos - sin * sin, 2 * cos * sin)
            return theirs(hidden_states, position_embeddings=doubled, **named)

        layer.forward = forward
        return model

    kernels = Kernels.for_device(CPU)
    plain, fused = prepared("llama"), prepared("llama")
    assert fuse_all(fused, kernels) == NUM_LAYERS
    runs = [run(turned_twice(model), SPANS["all"], kernels) for model in (plain, fused)]
    assert all(map(torch.equal, *runs))


def test_nothing_is_fused_where_the_reference_attends() -> None:
    """A kernel's mistake would not be told from a model's."""
    assert fuse_all(prepared("llama"), Kernels.for_device(CPU, "reference")) == 0


def test_caches_of_another_dtype_go_through_the_parts() -> None:
    """Keys and values are converted there."""
    kernels = Kernels.for_device(CPU)
    model = prepared("llama")
    positions, batch = packed(SPANS["all"])
    shape = (NUM_BLOCKS, BLOCK_SIZE, COMMON["num_key_value_heads"], EVEN["head_dim"])
    caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(NUM_LAYERS)]
    forward = ForwardPass(model, kernels, caches)
    rows = torch.arange(len(positions))
    expected = forward(positions, positions, batch, rows)
    fuse_all(model, kernels)
    assert torch.equal(forward(positions, positions, batch, rows), expected)


@pytest.mark.parametrize("fused_layers", [True, False])
def test_a_switch_decides(fused_layers: bool, tmp_path: Path) -> None:
    """Loading proves the model either way."""
    loaded = load_model(
        str(make_checkpoint(tmp_path / "model", "llama", **EVEN)),
        dtype="bfloat16",
        max_model_len=None,
        trust_remote_code=False,
        device=open_device("cpu"),
        fast_paths=FastPaths(fused_layers=fused_layers),
    )
    layers: Any = loaded.model.get_submodule("model.layers")
    is_panel = isinstance(layers[0].mlp.down_proj, PanelLinear)
    assert all(("forward" in vars(layer)) == (fused_layers and is_panel) for layer in layers)
