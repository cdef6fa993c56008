"""A model with packed weights computes what it computed before, up to rounding, and holds its weights once."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING

import pytest
import torch
from tiny_checkpoints import VOCAB_SIZE, make_checkpoint
from torch import nn

from compute_service import packed_linear
from compute_service.device import open_device
from compute_service.fast_paths import FastPaths
from compute_service.forward import ForwardPass
from compute_service.model_loader import load_model
from compute_service.packed_linear import OneDnnLinear, PanelLinear
from compute_service.refusal import ModelRefused
from kernels.batch import PagedBatch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from compute_service.model_loader import LoadedModel

BLOCK_SIZE = 16
NUM_TOKENS = 40
CPU = open_device("cpu")
ONEDNN_BF16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this CPU"
)


def load(folder: Path, *, packed_weights: bool, dtype: str = "bfloat16") -> LoadedModel:
    return load_model(
        str(folder),
        dtype=dtype,
        max_model_len=400,
        trust_remote_code=False,
        device=CPU,
        fast_paths=FastPaths(packed_weights=packed_weights),
    )


def logits_of(loaded: LoadedModel) -> Tensor:
    """Of all positions of one prompt, `[NUM_TOKENS, vocab]`."""
    num_blocks = -(-NUM_TOKENS // BLOCK_SIZE)
    caches = [
        tuple(
            torch.zeros(num_blocks, BLOCK_SIZE, layer.num_kv_heads, size, dtype=loaded.dtype)
            for size in (layer.k_head_dim, layer.v_head_dim)
        )
        for layer in loaded.layers
    ]
    positions = torch.arange(NUM_TOKENS)
    batch = PagedBatch(
        block_tables=torch.arange(num_blocks, dtype=torch.int32)[None],
        context_lens=torch.tensor([NUM_TOKENS], dtype=torch.int32),
        query_start=torch.tensor([0, NUM_TOKENS], dtype=torch.int32),
        slot_mapping=positions,
        num_decodes=0,
        max_query_len=NUM_TOKENS,
        max_context_len=NUM_TOKENS,
    )
    tokens = torch.randint(3, VOCAB_SIZE, (NUM_TOKENS,), generator=torch.Generator().manual_seed(5))
    return ForwardPass(loaded.model, CPU.kernels, caches)(tokens, positions, batch, positions)


def linears_of(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules() if type(module).__name__.endswith("Linear")]


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt_oss"])
@pytest.mark.parametrize("make", [PanelLinear, pytest.param(OneDnnLinear, marks=ONEDNN_BF16)])
def test_packed_weights_are_as_exact_as_torch(
    model_type: str,
    make: Callable[[Tensor, Tensor | None], nn.Module],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the logits in float32 they miss no more than torch's own bfloat16 products; heads tied to embeddings too."""
    is_tied = model_type == "qwen2"
    folder = make_checkpoint(tmp_path / "model", model_type, tie_word_embeddings=is_tied)
    exact = logits_of(load(folder, packed_weights=False, dtype="float32"))
    theirs = logits_of(load(folder, packed_weights=False))
    monkeypatch.setattr(packed_linear, "choose", lambda: make)
    packed = load(folder, packed_weights=True)
    ours = logits_of(packed)
    assert make in linears_of(packed.model)
    assert nn.Linear not in linears_of(packed.model)
    assert float((ours - exact).abs().mean()) < 1.2 * float((theirs - exact).abs().mean())


def test_every_weight_is_freed_when_it_is_packed() -> None:
    """Before the next one is, so that the model is never there twice; what the embedding shares stays."""
    model = nn.Sequential(*(nn.Linear(8, 8, dtype=torch.bfloat16) for _ in range(4)))
    model.append(nn.Embedding(8, 8, dtype=torch.bfloat16))
    model[3].weight = model[4].weight
    alive = [weakref.ref(model[index].weight) for index in range(4)]
    counts = []

    def pack_and_count(weight: Tensor, bias: Tensor | None) -> nn.Module:
        gc.collect()
        counts.append(sum(reference() is not None for reference in alive))
        return PanelLinear(weight, bias)

    packed_linear.pack_linears(model, pack_and_count)
    assert counts == [4, 3, 2, 1]
    assert alive[3]() is model[4].weight


def test_a_wrong_product_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The load-time proof probes the model with its packed weights."""
    folder = make_checkpoint(tmp_path / "model", "llama")
    monkeypatch.setattr(
        packed_linear, "choose", lambda: lambda weight, bias: PanelLinear(weight.flip(0), bias)
    )
    with pytest.raises(ModelRefused, match="through block tables its logits differ by"):
        load(folder, packed_weights=True)


def test_only_bfloat16_is_packed(tmp_path: Path) -> None:
    """float32 runs as fast in torch."""
    folder = make_checkpoint(tmp_path / "model", "llama")
    loaded = load(folder, packed_weights=True, dtype="float32")
    assert set(linears_of(loaded.model)) == {nn.Linear}


@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48), (1, 0, 48)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_onednn_in_float32_is_what_torch_computes(
    shape: tuple[int, ...], *, has_bias: bool
) -> None:
    """All shapes that a model's linear module meets, none of its rows included."""
    linear = nn.Linear(48, 70, bias=has_bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = OneDnnLinear(linear.weight, linear.bias)(x)
        torch.testing.assert_close(found, linear(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("has_instructions", "chosen"), [(True, OneDnnLinear), (False, PanelLinear)]
)
def test_a_cpu_with_bfloat16_instructions_uses_them(
    chosen: type[nn.Module], monkeypatch: pytest.MonkeyPatch, *, has_instructions: bool
) -> None:
    """Through oneDNN; every other one widens to float32."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_instructions)
    assert packed_linear.choose() is chosen
