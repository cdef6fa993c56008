"""Train the demo model: a small Llama that has read Python's own standard library.

    .venv/bin/python -m bench.train_demo_model --minutes 15 --out quire/demo_model/quire-demo

Everything it needs is on every machine: the source files beside the running interpreter. The result is an ordinary
checkpoint folder (config, tokenizer, safetensors).
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from torch import Tensor

END = "<|endoftext|>"
VOCAB_SIZE = 4096
CONTEXT = 1024
BATCH = 4
PEAK_LEARNING_RATE = 3e-3
WARM_UP_SHARE = 0.03  # of the time
REPORT_EVERY = 50  # steps
# A conversation is shown to the model as what it knows: comments in a Python file.
CHAT_TEMPLATE = (
    "{% for message in messages %}# {{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant:{% endif %}"
)


def main() -> None:
    """Train for the time given and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15.0, help="time to train")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    options = parser.parse_args()
    texts = _texts()
    tokenizer = _train_tokenizer(texts)
    tokens = _encode(tokenizer, texts)
    print(f"{len(texts)} files, {len(tokens)} tokens")
    torch.manual_seed(0)
    model = LlamaForCausalLM(_config())
    print(f"{sum(found.numel() for found in model.parameters())} parameters")
    _train(model, tokens, options.minutes * 60)
    model.bfloat16().save_pretrained(options.out)
    _save_tokenizer(tokenizer, options.out)


def _texts() -> list[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
    files = [
        found
        for found in sorted(library.rglob("*.py"))
        if not skipped & set(found.relative_to(library).parts)
    ]
    return [found.read_text(encoding="utf-8", errors="ignore") for found in files]


def _train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    end = tokenizer.token_to_id(END)
    encoded = tokenizer.encode_batch(texts)
    return torch.cat([torch.tensor([*found.ids, end]) for found in encoded])


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def _train(model: LlamaForCausalLM, tokens: Tensor, seconds: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    begun, step = time.monotonic(), 0
    while (progress := (time.monotonic() - begun) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * _schedule(progress)
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH,))
        batch = torch.stack([tokens[start : start + CONTEXT] for start in starts])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % REPORT_EVERY == 0:
            print(f"{progress:6.1%}  step {step}  loss {loss.item():.3f}", flush=True)
        step += 1


def _schedule(progress: float) -> float:
    """Linear warm-up, then a cosine to a twentieth."""
    warm_up = min(1.0, (progress + 1e-3) / WARM_UP_SHARE)
    return warm_up * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


if __name__ == "__main__":
    main()
