"""The same greedy tokens as transformers, through the three real processes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from processes import Quire, assert_pool_is_idle, running_quire
from tiny_checkpoints import EVERY_RUN, SERVED, VOCAB_SIZE, make_checkpoint
from transformers import AutoModelForCausalLM

from compute_service.model_loader import fix_longrope
from protos.memory.v1 import inspection_pb2
from quire.client import Client

if TYPE_CHECKING:
    from pathlib import Path

NUM_TOKENS = 64
MAX_MODEL_LEN = 400
NUM_BLOCKS = 45  # cannot hold the crowd: some are preempted
# Shorter and longer than windows of 9 and than the 64 tokens of the longrope model; the long ones run in chunks.
LENGTHS = (1, 5, 16, 33, 70, 150)
NEAR_TIE = 1e-3


@dataclass
class Oracle:
    """transformers' own eager model, one prompt at a time."""

    model: torch.nn.Module
    num_checked: int = 0
    num_near_ties: int = 0

    def generate(self, prompt: list[int]) -> list[int]:
        """Greedy tokens of `model.generate`."""
        found = self.model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        return found[0, len(prompt) :].tolist()

    def check(self, prompt: list[int], expected: list[int], output: list[int]) -> None:
        """`output` is `expected`, or leaves it at near-ties only, which are counted."""
        self.num_checked += 1
        assert len(output) == NUM_TOKENS
        if output == expected:
            return
        self.num_near_ties += 1
        with torch.inference_mode():
            logits = self.model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        assert (logits.max(1).values - chosen).max() < NEAR_TIE


def complete(quire: Quire, prompt: list[int], num_samples: int = 1) -> list[list[int]]:
    with Client(quire.addresses["router"]) as client:
        answer = client.complete(
            prompt,
            temperature=0,
            num_samples=num_samples,
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
        )
    return [list(found.token_ids) for found in answer.completions]


def models() -> list[Any]:
    """Of each type; those that differ little from others run at night."""
    marks = {
        model_type: [pytest.mark.long] * (model_type not in EVERY_RUN) for model_type in SERVED
    }
    return [pytest.param(model_type, marks=marks[model_type]) for model_type in sorted(SERVED)]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", models())
def test_greedy_tokens_equal_transformers(model_type: str, tmp_path: Path) -> None:
    """Alone, chunked, with prefix hits, in a crowd that preempts, forked: the tokens are those of `model.generate`."""
    folder = make_checkpoint(tmp_path / "model", model_type)
    oracle = Oracle(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"))
    fix_longrope(oracle.model, MAX_MODEL_LEN)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in LENGTHS]
    expected = [oracle.generate(prompt) for prompt in prompts]
    log = tmp_path / "log"
    with running_quire(folder, *_flags(oracle.model.config), log=log) as quire:
        for prompt, tokens in zip(prompts, expected, strict=True):
            oracle.check(prompt, tokens, *complete(quire, prompt))
        # Every prompt twice, and each time one of them four times over.
        jobs = [(index, 1) for index in range(len(prompts))] * 2 + [(2, 4), (3, 4)]
        with ThreadPoolExecutor(len(jobs)) as pool:
            crowd = list(pool.map(lambda job: complete(quire, prompts[job[0]], job[1]), jobs))
        for (index, num_samples), outputs in zip(jobs, crowd, strict=True):
            assert len(outputs) == num_samples
            for output in outputs:
                oracle.check(prompts[index], expected[index], output)
        pool_state = quire.inspection.GetPool(inspection_pb2.GetPoolRequest(), timeout=5)
        assert int(pool_state.num_prefix_hit_tokens) > 0
        assert_pool_is_idle(quire)
    assert '"event": "preempted"' in log.read_text()
    assert oracle.num_near_ties <= 1 + oracle.num_checked // 200


def _flags(config: Any) -> list[str]:
    return [
        *("--dtype", "float32"),
        *("--max-num-batched-tokens", "32"),
        *("--max-model-len", str(MAX_MODEL_LEN)),
        *("--memory-budget", str(NUM_BLOCKS * _block_bytes(config) + 3 * 2 * 4096)),
        *("--log-format", "json"),
    ]


def _block_bytes(config: Any) -> int:
    heads, k_and_v = config.num_key_value_heads, 2 * config.head_dim
    if config.model_type == "deepseek_v3":
        k_and_v = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return config.num_hidden_layers * 16 * heads * k_and_v * 4
