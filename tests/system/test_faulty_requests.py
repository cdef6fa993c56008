"""Requests that fail on the device, do not fit or come too many: each gets its error, nobody else notices."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch
from processes import Quire, assert_pool_is_idle, running_quire
from safetensors.torch import load_file, save_file
from tiny_checkpoints import make_checkpoint

from quire.client import Client, QuireError

if TYPE_CHECKING:
    from collections.abc import Iterator

POISON = 298  # its embedding is not a number
FLAGS = (
    *("--memory-budget", "210KiB", "--max-model-len", "300", "--queue-limit", "10"),
    *("--max-num-seqs", "8", "--dtype", "float32", "--log-level", "error"),
)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quire]:
    """Services with a model that cannot compute one of its tokens."""
    folder = make_checkpoint(tmp_path_factory.mktemp("faulty") / "model", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with running_quire(folder, *FLAGS) as found:
        yield found


def complete(quire: Quire, prompt: list[int], max_tokens: int = 40) -> list[int]:
    with Client(quire.addresses["router"]) as client:
        # Greedy, and never the broken token itself.
        answer = client.complete(
            prompt,
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            logit_bias={POISON: -100.0},
        )
    return list(answer.completions[0].token_ids)


def test_a_request_that_cannot_be_computed_ends_alone(faulty: Quire) -> None:
    """The guilty request gets INTERNAL with STEP_FAILED; those that shared its steps get their own tokens."""
    prompts = [[seed, seed + 1, seed + 2] for seed in range(10, 80, 10)]
    alone = [complete(faulty, prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        neighbours = [pool.submit(complete, faulty, prompt) for prompt in prompts]
        guilty = pool.submit(complete, faulty, [5, POISON, 6])
        with pytest.raises(QuireError) as caught:
            guilty.result(60)
        assert [found.result(60) for found in neighbours] == alone
    assert (caught.value.code, caught.value.reason) == ("INTERNAL", "STEP_FAILED")
    assert_pool_is_idle(faulty)


def test_a_request_larger_than_the_pool_is_refused_at_once(faulty: Quire) -> None:
    """What could not be held even alone is INVALID_ARGUMENT with both numbers, not a wait without end."""
    with (
        Client(faulty.addresses["router"]) as client,
        pytest.raises(QuireError) as caught,
    ):
        client.complete(list(range(3, 250)), max_tokens=50, num_samples=8, timeout_s=30)
    assert (caught.value.code, caught.value.reason) == ("INVALID_ARGUMENT", "POOL_TOO_SMALL")
    needed, there = caught.value.metadata["num_blocks_needed"], caught.value.metadata["num_blocks"]
    assert int(needed) > int(there)
    assert_pool_is_idle(faulty)


def test_a_full_queue_says_when_to_come_again(faulty: Quire) -> None:
    """Beyond what runs and what may wait: RESOURCE_EXHAUSTED with a time; the others end as they should."""
    with ThreadPoolExecutor(60) as pool:
        jobs = [pool.submit(complete, faulty, [seed], 200) for seed in range(3, 63)]
        errors = [error for job in jobs if isinstance(error := job.exception(120), QuireError)]
    assert errors
    assert {(error.code, error.reason.value) for error in errors} == {
        ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    }
    assert all(error.retry_after_s for error in errors)
    assert len(errors) < 60
    assert_pool_is_idle(faulty)
