"""The same greedy tokens as transformers, through the three real processes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from processes import running_quire
from tiny_checkpoints import SERVED, VOCAB_SIZE, make_checkpoint
from transformers import AutoModelForCausalLM

from protos.memory.v1 import inspection_pb2
from protos.router.v1 import router_pb2

if TYPE_CHECKING:
    from pathlib import Path

    from protos.router.v1 import router_pb2_grpc

NUM_TOKENS = 64
NEAR_TIE = 1e-3


def complete(
    stub: router_pb2_grpc.RouterServiceStub, prompt: list[int], n: int = 1
) -> list[list[int]]:
    request = router_pb2.GenerateRequest(
        tokens=router_pb2.TokenIds(ids=prompt),
        sampling=router_pb2.SamplingParams(temperature=0, num_samples=n),
        stopping=router_pb2.StoppingCriteria(max_tokens=NUM_TOKENS, ignore_eos=True),
    )
    answer = stub.Complete(router_pb2.CompleteRequest(request=request), timeout=120)
    return [list(found.token_ids) for found in answer.completions]


def check_tokens(model: torch.nn.Module, prompt: list[int], output: list[int]) -> None:
    """Every token is the reference's own choice, teacher-forced; a near-tie may go either way."""
    assert len(output) == NUM_TOKENS
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
    assert (logits.max(1).values - chosen).max() < NEAR_TIE


@pytest.mark.parametrize("model_type", sorted(SERVED))
def test_greedy_tokens_equal_transformers(model_type: str, tmp_path: Path) -> None:
    """Alone, batched, chunked, with prefix hits, forked and preempted: each token is the one transformers chooses."""
    folder = make_checkpoint(tmp_path / "model", model_type)
    oracle = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 5, 16, 33, 70, 150]
    prompts = [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]
    # A pool of 40 blocks cannot hold all of these at once: some are preempted.
    block_bytes = _block_bytes(oracle.config)
    budget = 45 * block_bytes + 3 * 2 * 4096
    flags = [
        "--max-num-batched-tokens",
        "32",
        "--memory-budget",
        str(budget),
        "--max-model-len",
        "400",
    ]
    with running_quire(folder, *flags, "--dtype", "float32", "--log-level", "warning") as quire:
        for prompt in prompts:
            check_tokens(oracle, prompt, complete(quire.router, prompt)[0])
        with ThreadPoolExecutor(12) as pool:
            crowd = list(pool.map(lambda prompt: complete(quire.router, prompt), prompts * 2))
        for prompt, found in zip(prompts * 2, crowd, strict=True):
            check_tokens(oracle, prompt, found[0])
        for sample in complete(quire.router, prompts[3], n=4):
            check_tokens(oracle, prompts[3], sample)
        state = quire.inspection.GetPool(inspection_pb2.GetPoolRequest(), timeout=5)
        assert int(state.num_prefix_hit_tokens) > 0
        checked = quire.inspection.CheckIntegrity(inspection_pb2.CheckIntegrityRequest(), timeout=5)
        assert list(checked.findings) == []


def _block_bytes(config: Any) -> int:
    heads, size = config.num_key_value_heads, config.head_dim
    if config.model_type == "deepseek_v3":
        k_and_v = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        return 3 * 16 * heads * k_and_v * 4
    return 3 * 16 * heads * 2 * size * 4
