"""Tiny random checkpoints whose outputs depend on the whole context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, logging

if TYPE_CHECKING:
    from pathlib import Path

logging.set_verbosity_error()
logging.disable_progress_bar()

VOCAB_SIZE = 300
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
WINDOWED = {"sliding_window": 9}
# Trained to 64 tokens, stretched to 512.
LONGROPE = {
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 6,
        "long_factor": [2.0, 2.5, 3.0, 4.0, 5.0, 6.0],
        "original_max_position_embeddings": 64,
    },
}

SERVED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": WINDOWED,
    "gemma2": {**WINDOWED, "query_pre_attn_scalar": 12},
    "gemma3_text": {**WINDOWED, "query_pre_attn_scalar": 12},
    "mixtral": MOE,
    "qwen3_moe": MOE,
    "gpt_oss": {**MOE, **WINDOWED},
    "olmo2": {},
    "granite": {},
    "phi3": LONGROPE,
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "num_key_value_heads": 4,
        "head_dim": 8,
    },
}

EVERY_RUN = ("gpt_oss", "llama")
"""Of them, those that run through three processes by day: one with all that is special, and one with none of it."""


def make_checkpoint(folder: Path, model_type: str, **overrides: Any) -> Path:
    """Write config, weights and a byte-level tokenizer of a model type into `folder`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, **{**COMMON, **SERVED.get(model_type, {}), **overrides}
    )
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                is_embedding = "embed" in name
                scale = 1.0 if is_embedding else 1.6 / parameter.shape[-1] ** 0.5
                parameter.normal_(0, scale)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    _tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def _tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{c: i + 3 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
