"""A pool in the compute service's own memory, as on a GPU: the kernels interpreted, everything else real."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
import torch
from processes import QUIRE, running_service, wait_until_serving
from tiny_checkpoints import make_checkpoint
from transformers import AutoModelForCausalLM

from protos.memory.v1 import inspection_pb2, inspection_pb2_grpc
from quire.client import Client

if TYPE_CHECKING:
    from collections.abc import Iterator

    from protos.memory.v1.inspection_pb2 import GetPoolResponse

PROGRAM = Path(__file__).parents[1] / "support" / "compute_on_interpreter.py"
PROMPTS = [[5, 6, 7], [5, 6, 7, *range(10, 40)], [9]]
NUM_TOKENS = 24


@contextmanager
def running_compute(*flags: str) -> Iterator[subprocess.Popen[str]]:
    """The compute service on its stand-in for a GPU, killed at the end if it still runs."""
    quiet = ("--log-level", "error", "--metrics-listen", "off")
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), "--device", "cuda", *quiet, *flags], text=True
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def complete(client: Client, prompt: list[int]) -> list[int]:
    answer = client.complete(
        prompt, temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, timeout_s=120
    )
    return list(answer.completions[0].token_ids)


def expected_tokens(folder: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    options = {
        "max_new_tokens": NUM_TOKENS,
        "min_new_tokens": NUM_TOKENS,
        "do_sample": False,
        "eos_token_id": None,
    }
    found = [model.generate(torch.tensor([prompt]), **options)[0] for prompt in PROMPTS]
    return [tokens[len(prompt) :].tolist() for tokens, prompt in zip(found, PROMPTS, strict=True)]


def test_a_pool_on_the_device_ends_with_its_writer_and_requests_go_on(tmp_path: Path) -> None:
    """The tokens of transformers; after kill -9 under load a new writer gets a new pool, and the tokens are the same."""
    folder = make_checkpoint(tmp_path / "model", "llama", num_hidden_layers=1)
    expected = expected_tokens(folder)
    memory, compute, router = (f"unix:{tmp_path}/{name}" for name in ("m", "c", "r"))
    flags = ("--listen", compute, "--memory-address", memory, "--model", str(folder))
    flags += ("--max-model-len", "128")
    descriptor = ("--descriptor-socket", f"{tmp_path}/d", "--memory-budget", "1MiB")
    with (
        running_service("memory", "--listen", memory, *descriptor),
        running_service(
            "router", "--listen", router, "--memory-address", memory, "--compute-address", compute
        ),
        grpc.insecure_channel(memory) as channel,
        Client(router) as client,
        ThreadPoolExecutor(len(PROMPTS)) as threads,
    ):
        with running_compute(*flags) as first, grpc.insecure_channel(router) as to_router:
            wait_until_serving(to_router, 90)
            before = look(channel)
            assert before.placement == "writer"
            assert any("every cached prefix is lost" in cost for cost in before.known_costs)
            assert list(threads.map(complete, [client] * 3, PROMPTS)) == expected
            running = threads.map(complete, [client] * 3, PROMPTS)
            while not look(channel).num_sequences:
                time.sleep(0.01)
            first.kill()
        with running_compute(*flags):
            assert list(running) == expected
            after = look(channel)
            assert after.pool_id != before.pool_id
            assert after.num_blocks == before.num_blocks
            assert int(after.writer_generation) == int(before.writer_generation) + 1
        assert integrity(channel) == []


def look(channel: grpc.Channel) -> GetPoolResponse:
    stub = inspection_pb2_grpc.InspectionServiceStub(channel)
    return stub.GetPool(inspection_pb2.GetPoolRequest(), timeout=5)


def integrity(channel: grpc.Channel) -> list[str]:
    stub = inspection_pb2_grpc.InspectionServiceStub(channel)
    return list(stub.CheckIntegrity(inspection_pb2.CheckIntegrityRequest(), timeout=5).findings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU takes --device cuda")
def test_a_missing_gpu_is_told_in_one_line() -> None:
    """`quire up --device cuda` where PyTorch has no GPU ends at once, and says what to do."""
    done = subprocess.run(
        [QUIRE, "up", "--device", "cuda", "--listen", "127.0.0.1:0", "--log-level", "error"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --device cuda: ")
    assert line.endswith("; --device cpu needs no GPU")
