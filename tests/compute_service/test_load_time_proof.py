"""What is served is served right, and what is not is refused in one sentence that says why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import EVERY_RUN, LONGROPE, MOE, SERVED, VOCAB_SIZE, WINDOWED, make_checkpoint
from transformers import AutoModelForCausalLM
from triton_interpreter import interpreted_operations

from compute_service.device import ComputeDevice, open_device
from compute_service.model_loader import load_model
from compute_service.paged_probe import PagedProbe
from compute_service.refusal import ModelRefused
from kernels.launcher import Kernels

if TYPE_CHECKING:
    from pathlib import Path

    from compute_service.model_loader import LoadedModel

# Model types beside those whose tokens are compared through the three processes.
ALSO_SERVED: dict[str, dict[str, Any]] = {
    "afmoe": WINDOWED,
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "cohere": {},
    "cohere2": WINDOWED,
    "deepseek_v2": SERVED["deepseek_v3"],
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {**WINDOWED, "sliding_window_pattern": 2},
    "flex_olmo": {},
    "gemma": {},
    "gemma4_text": WINDOWED,
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "granitemoe": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "jetmoe": {},
    "llama4_text": {
        "num_local_experts": 4,
        "intermediate_size_mlp": 64,
        "layer_types": ["full_attention"] * 3,
    },
    "mimo_v2_flash": WINDOWED,
    "minimax_m2": {},
    "ministral": WINDOWED,
    "nanochat": {},
    "olmo": {},
    "olmo3": WINDOWED,
    "olmoe": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "phimoe": {},
    "qwen2": {**WINDOWED, "use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 32},
    "seed_oss": {},
    "smollm3": {},
    "starcoder2": WINDOWED,
    "vaultgemma": WINDOWED,
}

WINDOW_IN_MASK = r"layer 0 tells attention of no window, but its mask decides otherwise"
RECURRENT = "layers of type linear_attention"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "phimoe": (WINDOWED, WINDOW_IN_MASK),
    "qwen2_moe": ({**MOE, **WINDOWED, "use_sliding_window": True}, WINDOW_IN_MASK),
    "llama4_text": ({"num_local_experts": 4, "attention_chunk_size": 16}, "type chunked_attention"),
    "diffllama": ({}, r"called attention as layers \[0, 0, 1, 1, 2, 2\], not each exactly once"),
    "doge": ({}, "layer 0 masks attention in a way of its own"),
    "qwen3_next": ({}, RECURRENT),
    "mamba": ({}, RECURRENT),
    "jamba": ({}, RECURRENT),
    "recurrent_gemma": ({}, RECURRENT),
    "rwkv": ({}, "recurrent layers, whose state is no KV cache"),
    "bloom": ({}, r"called attention as layers \[\], not each exactly once"),
    "gptj": ({"rotary_dim": 8}, r"called attention as layers \[\], not each exactly once"),
    "nemotron": ({}, "layer 0 does not pass keywords on to attention"),
    "t5": ({"d_model": 48, "d_kv": 12}, "t5 is an encoder-decoder; only decoders are served"),
    "bert": ({}, "BertLMHeadModel is no decoder"),
    "roberta": ({}, "layer 0 lets position 1023 see a later one"),
    "llama": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "RoPE scaling is dynamic",
    ),
}


CPU = open_device("cpu")
TRITON = ComputeDevice(torch.device("cpu"), Kernels(interpreted_operations()), holds_pool=True)


def load(folder: Path, max_model_len: int = 400, device: ComputeDevice = CPU) -> LoadedModel:
    return load_model(
        str(folder),
        dtype="float32",
        max_model_len=max_model_len,
        trust_remote_code=False,
        device=device,
    )


def check_against_eager(folder: Path, device: ComputeDevice = CPU) -> None:
    """Two packed sequences in uneven chunks, longer than every window, have the logits of the model's own attention."""
    oracle = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    token_ids = torch.randint(3, VOCAB_SIZE, (70,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = oracle(input_ids=token_ids[None], use_cache=False).logits[0].float()
    loaded = load(folder, device=device)
    cuts = ((0, 13), (13, 14), (14, 50), (50, 69), (69, 70))
    probe = PagedProbe(loaded.model, device.kernels, loaded.layers, token_ids)
    probe.check_logits(expected, cuts)


@pytest.mark.parametrize("model_type", sorted({*ALSO_SERVED, *SERVED} - {*EVERY_RUN}))
def test_served_models_have_their_own_logits(model_type: str, tmp_path: Path) -> None:
    """A model that passes the proof answers as it does under transformers."""
    check_against_eager(make_checkpoint(tmp_path, model_type, **ALSO_SERVED.get(model_type, {})))


# Windows and sinks; caps; keys unlike values. What they need of the kernels has tests of its own.
@pytest.mark.parametrize(
    "model_type",
    [
        "gpt_oss",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("gemma2", "deepseek_v3")),
    ],
)
def test_the_triton_kernels_serve_the_same_logits(model_type: str, tmp_path: Path) -> None:
    """A model that computes with the GPU's kernels, here interpreted, answers as it does under transformers."""
    overrides = {**SERVED[model_type], "num_hidden_layers": 2}
    check_against_eager(make_checkpoint(tmp_path, model_type, **overrides), TRITON)


def test_longrope_is_fixed_by_the_served_length(tmp_path: Path) -> None:
    """A pool that serves more than the original length uses the long factors throughout, as transformers does there."""
    check_against_eager(make_checkpoint(tmp_path, "phi3"))


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_other_models_are_refused(model_type: str, tmp_path: Path) -> None:
    """Attention that is not wholly ours is refused at load, in one line with the reason."""
    overrides, reason = REFUSED[model_type]
    folder = make_checkpoint(tmp_path, model_type, **overrides)
    with pytest.raises(ModelRefused, match=reason) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_factors_that_follow_the_neighbours_are_refused(tmp_path: Path) -> None:
    """PhiMoE picks its own longrope factors in each pass: refused above the original length, served below."""
    folder = make_checkpoint(
        tmp_path,
        "phimoe",
        rope_parameters={**LONGROPE["rope_parameters"], "short_mscale": 1.1, "long_mscale": 1.3},
    )
    with pytest.raises(ModelRefused, match=r"logits change by .* a shorter --max-model-len"):
        load(folder)
    assert load(folder, max_model_len=64).max_model_len == 64


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no .*safetensors; other formats"),
    ],
)
def test_a_folder_with_a_missing_file_is_refused(missing: str, reason: str, tmp_path: Path) -> None:
    """The file that is missing is named."""
    folder = make_checkpoint(tmp_path, "llama")
    (folder / missing).unlink()
    with pytest.raises(ModelRefused, match=reason):
        load(folder)


def test_broken_weights_are_refused(tmp_path: Path) -> None:
    """A cut-off safetensors file is one sentence, no trace."""
    folder = make_checkpoint(tmp_path, "llama")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelRefused, match="it cannot be loaded: "):
        load(folder)


def test_a_missing_weight_is_refused(tmp_path: Path) -> None:
    """No weight is made up for one that the files lack."""
    folder = make_checkpoint(tmp_path, "llama")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelRefused, match=r"lack 1 weights, among them model\.layers\.1\.mlp"):
        load(folder)


def test_a_length_above_the_models_own_is_refused(tmp_path: Path) -> None:
    """More positions than the model knows are never promised."""
    folder = make_checkpoint(tmp_path, "llama")
    with pytest.raises(ModelRefused, match="--max-model-len 513 is above the model's own limit"):
        load(folder, max_model_len=513)
