"""Output tokens per second of `quire up` beside plain `transformers` generate: one random checkpoint, alternating runs.

    python bench/throughput.py [--shape 135m|0.5b] [--requests 16] [--rounds 3]

The checkpoint has random weights in bfloat16: how fast it runs does not depend on what it knows. Prompts are 128 tokens,
outputs 64, greedy.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, logging

from quire.client import Client

NUM_INPUT, NUM_OUTPUT = 128, 64
SHAPES: dict[str, Any] = {
    "135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
    "0.5b": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
}


def make_checkpoint(folder: Path, shape: str) -> torch.nn.Module:
    """Random weights of a known shape; the tokenizer is only there to be loaded."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])).save(str(folder / "tokenizer.json"))
    ready: torch.nn.Module = model.eval()
    return ready


def make_prompts(count: int) -> torch.Tensor:
    """Random token ids, int64 `[count, NUM_INPUT]`, anew each time so that no prefix is cached."""
    return torch.randint(10, 40_000, (count, NUM_INPUT))


def run_transformers(model: torch.nn.Module, count: int) -> float:
    """Tokens per second of one batch."""
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(  # type: ignore[operator]
            make_prompts(count),
            attention_mask=torch.ones(count, NUM_INPUT, dtype=torch.int64),
            do_sample=False,
            max_new_tokens=NUM_OUTPUT,
            min_new_tokens=NUM_OUTPUT,
            pad_token_id=0,
        )
    return count * NUM_OUTPUT / (time.perf_counter() - started)


def run_quire(client: Client, count: int) -> float:
    """Tokens per second of as many requests at once."""
    prompts = make_prompts(count).tolist()
    started = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        answers = list(
            pool.map(
                lambda prompt: client.complete(
                    prompt, temperature=0, max_tokens=NUM_OUTPUT, ignore_eos=True
                ),
                prompts,
            )
        )
    num_tokens = sum(len(answer.completions[0].token_ids) for answer in answers)
    return num_tokens / (time.perf_counter() - started)


def start_quire(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """`quire up` and the address of its router."""
    process = subprocess.Popen(  # noqa: S603 -- ourselves
        [
            str(Path(sys.executable).with_name("quire")),
            *("up", "--model", str(folder), "--listen", "127.0.0.1:0"),
            *("--memory-budget", "1GiB", "--log-level", "warning"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    ready = dict(part.split("=", 1) for part in process.stdout.readline().split()[1:])
    return process, ready["router"]


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="135m")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as name:
        model = make_checkpoint(Path(name), arguments.shape)
        started = time.perf_counter()
        process, address = start_quire(Path(name))
        seconds_to_ready = time.perf_counter() - started
        try:
            with Client(address) as client:
                results = measure(client, model, arguments.requests, arguments.rounds)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
    table = Table(
        title=f"{arguments.shape}, {arguments.requests} requests, 128 in, 64 out, bfloat16"
    )
    for heading in ("engine", "tokens/s, median", "lowest", "highest"):
        table.add_column(heading)
    for engine, found in results.items():
        numbers = (statistics.median(found), min(found), max(found))
        table.add_row(engine, *(f"{number:.0f}" for number in numbers))
    console = Console()
    console.print(table)
    console.print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"quire up was ready after {seconds_to_ready:.1f} s"
    )


def measure(
    client: Client, model: torch.nn.Module, num_requests: int, num_rounds: int
) -> dict[str, list[float]]:
    """Alternate the two; the first round warms up and is not counted."""
    results: dict[str, list[float]] = {"quire": [], "transformers": []}
    for number in range(num_rounds + 1):
        found = {
            "quire": run_quire(client, num_requests),
            "transformers": run_transformers(model, num_requests),
        }
        if number:
            for engine, rate in found.items():
                results[engine].append(rate)
    return results


if __name__ == "__main__":
    main()
