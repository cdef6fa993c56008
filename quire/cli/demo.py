"""`quire demo`: the three services, one streamed completion, eight requests that share a prefix, a look at the pool."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from rich.console import Console

from protos.memory.v1 import inspection_pb2, inspection_pb2_grpc
from protos.router.v1 import router_pb2, router_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Sequence

_DEADLINE_S = 60.0
_NUM_SHARING = 8
_PROMPT = "import os\nimport sys\n\n\ndef main():\n"
_ENDINGS = ("os.path", "sys.argv", "print", "open", "len", "range", "str", "list")


def demo(_argv: Sequence[str]) -> int:
    """Run the demonstration; the process's exit status."""
    command = [sys.executable, "-c", "import sys; from quire.cli import main; sys.exit(main())"]
    listen = f"127.0.0.1:{_free_port()}"
    flags = ["up", "--listen", listen, "--memory-budget", "16MiB", "--log-level", "warning"]
    services = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)  # noqa: S603 -- ourselves
    assert services.stdout is not None
    try:
        print("starting memory, compute and router with the demo model ...", flush=True)
        line = services.stdout.readline()
        if not line.startswith("ready "):
            return 1
        _show(dict(part.split("=", 1) for part in line.split()[1:]))
    finally:
        services.send_signal(signal.SIGTERM)
        services.wait()
        services.stdout.close()
    return 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _show(addresses: dict[str, str]) -> None:
    console = Console(highlight=False)
    with (
        grpc.insecure_channel(addresses["router"]) as to_router,
        grpc.insecure_channel(addresses["memory"]) as to_memory,
    ):
        stub = router_pb2_grpc.RouterServiceStub(to_router)
        _stream_one(stub)
        _share_prefix(stub, console)
        pool = inspection_pb2_grpc.InspectionServiceStub(to_memory)
        _draw_pool(console, pool.GetPool(inspection_pb2.GetPoolRequest(), timeout=_DEADLINE_S))
    memory = addresses["memory"].removeprefix("unix:")
    console.print(
        "\nTo look for yourself, start `quire up` and ask (its ready line has the addresses):",
        soft_wrap=True,
    )
    print(f"  grpcurl -plaintext -unix {memory} quire.memory.v1.InspectionService/GetPool")
    print(
        f'  grpcurl -plaintext -d \'{{"text": "import"}}\' {addresses["router"]} '
        "quire.router.v1.RouterService/Generate"
    )


def _request(text: str, num_tokens: int) -> router_pb2.GenerateRequest:
    return router_pb2.GenerateRequest(
        text=text,
        sampling=router_pb2.SamplingParams(temperature=0.7, top_p=0.9, seed=1),
        stopping=router_pb2.StoppingCriteria(max_tokens=num_tokens, ignore_eos=True),
    )


def _stream_one(stub: router_pb2_grpc.RouterServiceStub) -> None:
    print("\na streamed completion:\n")
    print(_PROMPT, end="", flush=True)
    for event in stub.Generate(_request(_PROMPT, 48), timeout=_DEADLINE_S):
        print(event.delta.text, end="", flush=True)
    print()


def _share_prefix(stub: router_pb2_grpc.RouterServiceStub, console: Console) -> None:
    """The first request fills the cache; the others find its prefix."""
    prefix = Path(signal.__file__).read_text(encoding="utf-8")[:1200]
    started = time.perf_counter()
    with ThreadPoolExecutor(_NUM_SHARING) as pool:
        answers = list(
            pool.map(
                lambda ending: stub.Complete(
                    router_pb2.CompleteRequest(request=_request(f"{prefix}\n{ending}", 32)),
                    timeout=_DEADLINE_S,
                ),
                _ENDINGS,
            )
        )
    seconds = time.perf_counter() - started
    usages = [answer.completions[0].finished.usage for answer in answers]
    num_output = sum(usage.num_output_tokens for usage in usages)
    num_prompt = sum(usage.num_prompt_tokens for usage in usages)
    num_cached = sum(usage.num_cached_tokens for usage in usages)
    console.print(
        f"\n{_NUM_SHARING} requests that share a prefix: {num_output} output tokens in {seconds:.2f} s, "
        f"{num_output / seconds:.0f} tokens/s; {num_cached} of {num_prompt} prompt tokens were prefix hits",
        soft_wrap=True,
    )


def _draw_pool(console: Console, pool: inspection_pb2.GetPoolResponse) -> None:
    """A character for every hundredth of the pool."""
    owned = pool.num_used_blocks - pool.num_shared_blocks
    parts = (
        ("free", "·", pool.num_free_blocks),
        ("cached", "▒", pool.num_cached_blocks),
        ("shared", "▓", pool.num_shared_blocks),
        ("owned", "█", owned),
    )
    console.print(
        f"\nthe pool: {pool.num_blocks} blocks of {pool.block_size} tokens, {pool.size_mib:.1f} MiB"
    )
    console.print("".join(sign * -(-count * 80 // pool.num_blocks) for _, sign, count in parts))
    console.print("  ".join(f"{sign} {name} {count}" for name, sign, count in parts))
