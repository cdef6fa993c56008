"""The demo model: an ordinary checkpoint folder inside the package, made by `bench/train_demo_model.py`."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """Folder of the checkpoint: config, tokenizer, safetensors."""
    return Path(__file__).with_name("quire-demo")
