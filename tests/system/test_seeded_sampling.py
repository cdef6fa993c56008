"""Sampled output with a seed does not depend on who else runs, on preemption or on how prompts are cut."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from processes import Quire, assert_pool_is_idle, running_quire
from tiny_checkpoints import VOCAB_SIZE, make_checkpoint

from quire.client import Client

if TYPE_CHECKING:
    from pathlib import Path

NUM_TOKENS = 60
BLOCK_BYTES = 3 * 16 * 2 * 2 * 12 * 4  # layers, tokens, heads, K and V, head size, float32
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 20},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "repetition_penalty": 1.3, "top_p": 0.95},
    {"temperature": 0.8, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    {"temperature": 1.0, "logit_bias": {7: 4.0, 8: -4.0}},
    {"temperature": 1.2, "num_samples": 3},
]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = (3, 20, 40, 64, 90, 7, 55, 31)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


def sample(quire: Quire, index: int) -> list[list[int]]:
    with Client(quire.addresses["router"]) as client:
        answer = client.complete(
            prompts()[index],
            seed=1000 + index,
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
            **SETTINGS[index],
        )
    return [list(found.token_ids) for found in answer.completions]


def sample_together(quire: Quire) -> list[list[list[int]]]:
    with ThreadPoolExecutor(len(SETTINGS)) as pool:
        return list(pool.map(lambda index: sample(quire, index), range(len(SETTINGS))))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("sampling") / "model", "llama")


@pytest.fixture(scope="module")
def alone(tiny_quire: Quire) -> list[list[list[int]]]:
    """Each request by itself, in a pool with room for all and prompts that run whole."""
    found = [sample(tiny_quire, index) for index in range(len(SETTINGS))]
    assert sample_together(tiny_quire) == found
    return found


@pytest.mark.parametrize("budget", [16, pytest.param(41, marks=pytest.mark.long)])
def test_a_seed_gives_the_same_tokens_in_any_batch(
    budget: int, checkpoint: Path, alone: list[list[list[int]]], tmp_path: Path
) -> None:
    """In a crowd whose prompts are cut and whose sequences are preempted, every token is the same."""
    log = tmp_path / "log"
    flags = (
        *("--dtype", "float32"),
        *("--max-num-batched-tokens", str(budget)),
        *("--max-model-len", "256"),
        *("--memory-budget", str(24 * BLOCK_BYTES + 3 * 2 * 4096)),
        *("--log-format", "json"),
    )
    with running_quire(checkpoint, *flags, log=log) as quire:
        assert sample_together(quire) == alone
        assert_pool_is_idle(quire)
    assert '"event": "preempted"' in log.read_text()


def test_samples_and_seeds_differ(alone: list[list[list[int]]]) -> None:
    """Every sample of every request is its own."""
    outputs = [tuple(tokens) for samples in alone for tokens in samples]
    assert len(outputs) == 10
    assert len(set(outputs)) == len(outputs)
