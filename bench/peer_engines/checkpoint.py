"""Checkpoints with random weights in the shapes of known models: speed does not depend on what a model knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

if TYPE_CHECKING:
    from pathlib import Path

COMMON: dict[str, Any] = {
    "max_position_embeddings": 8_192,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
SHAPES: dict[str, PreTrainedConfig] = {
    # What a test can load in a second.
    "tiny": LlamaConfig(
        vocab_size=1_024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **COMMON,
    ),
    "135m": LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        **COMMON,
    ),
    "0.5b": Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4_864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        **COMMON,
    ),
}


def make_checkpoint(folder: Path, shape: str) -> None:
    """Write weights in bfloat16 and a tokenizer in which every token has a text; the folder is whole or not there."""
    part = folder.with_name(f"{folder.name}-part")
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.save_pretrained(part)
    make_tokenizer(model.config.vocab_size).save_pretrained(part)
    part.rename(folder)


def make_tokenizer(vocab_size: int) -> Any:  # noqa: ANN401 -- a class without types
    """Byte-level, the bytes first: whoever turns tokens into text has a text to make of each."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|end|>": 0} | {piece: 1 + index for index, piece in enumerate(pieces)}
    vocab |= {f"w{index}": index for index in range(len(vocab), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict.fromkeys(("eos_token", "bos_token", "pad_token"), "<|end|>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)  # type: ignore[no-untyped-call]
