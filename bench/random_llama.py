"""A checkpoint with random weights: 106 million of them, in bfloat16, with the demo model's vocabulary and tokenizer.

    python -m bench.random_llama FOLDER

Speed does not depend on what a model knows; its tokens become text as those of any other.
"""

from __future__ import annotations

import sys
from shutil import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from quire import demo_model

SHAPE = LlamaConfig(
    vocab_size=4096,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)


def write(folder: str) -> None:
    """Write it."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(SHAPE, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    copy(demo_model.path() / "tokenizer.json", folder)


if __name__ == "__main__":
    write(sys.argv[1])
