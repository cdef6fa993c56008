"""`quire demo`: the three services, one streamed completion, eight requests that share a prefix, a look at the pool."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from quire.cli.pool_picture import draw_picture
from quire.client import Client, GenerateOptions, PoolInspector
from quire.run_folder import memory_address
from quire.settings import DEFAULT_ROUTER_ADDRESS, DemoSettings
from quire.settings_loader import load

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from quire.client import Pool

_TIMEOUT_S = 60.0
_LOOK_EVERY_S = 0.02
_PROMPT = "import os\nimport sys\n\n\ndef main():\n"
_OPTIONS: GenerateOptions = {
    "max_tokens": 48,
    "temperature": 0.7,
    "top_p": 0.9,
    "seed": 1,
    "ignore_eos": True,
}
_ENDINGS = ("os.path", "sys.argv", "print", "open", "len", "range", "str", "list")


def demo(argv: Sequence[str]) -> int:
    """Run the demonstration; the process's exit status."""
    settings = load(DemoSettings, argv, prog="quire demo")
    command = [sys.executable, "-c", "import sys; from quire.cli import main; sys.exit(main())"]
    flags = [
        "up",
        "--listen",
        "127.0.0.1:0",
        "--memory-budget",
        "4MiB",
        "--log-level",
        settings.log_level,
    ]
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


def _show(addresses: dict[str, str]) -> None:
    console = Console(highlight=False)
    with (
        Client(addresses["router"], timeout_s=_TIMEOUT_S) as client,
        PoolInspector(addresses["memory"]) as inspector,
    ):
        _stream_one(client)
        busiest = _share_prefix(client, inspector, console)
        console.print("\nthe pool while they ran, when most blocks were shared:")
        draw_picture(console, busiest)
        console.print("\nand now, with what they left in the prefix cache:")
        draw_picture(console, inspector.get_pool())
    memory = memory_address(DEFAULT_ROUTER_ADDRESS).removeprefix("unix:")
    print("\nTo look for yourself, start `quire up` in another terminal and ask:")
    print(f"  grpcurl -plaintext -unix {memory} quire.memory.v1.InspectionService/GetPool")
    print(
        f'  grpcurl -plaintext -d \'{{"text": "import"}}\' {DEFAULT_ROUTER_ADDRESS} '
        "quire.router.v1.RouterService/Generate"
    )


def _stream_one(client: Client) -> None:
    print("\na streamed completion:\n")
    print(_PROMPT, end="", flush=True)
    for delta in client.generate(_PROMPT, **_OPTIONS):
        print(delta.text, end="", flush=True)
    print()


def _share_prefix(client: Client, inspector: PoolInspector, console: Console) -> Pool:
    """The first request fills the cache, the others find its prefix; the pool at the moment of most sharing."""
    prefix = Path(signal.__file__).read_text(encoding="utf-8")[:1200]
    prompts = [f"{prefix}\n{ending}" for ending in _ENDINGS]
    started = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = [pool.submit(client.complete, text, **_OPTIONS) for text in prompts]
        busiest = _watch(inspector, answers)
        usages = [answer.result().completions[0].finished.usage for answer in answers]
    seconds = time.perf_counter() - started
    num_output = sum(usage.num_output_tokens for usage in usages)
    num_prompt = sum(usage.num_prompt_tokens for usage in usages)
    num_cached = sum(usage.num_cached_tokens for usage in usages)
    console.print(
        f"\n{len(prompts)} requests that share a prefix: {num_output} output tokens in {seconds:.2f} s, "
        f"{num_output / seconds:.0f} tokens/s; {num_cached} of {num_prompt} prompt tokens were prefix hits",
        soft_wrap=True,
    )
    return busiest


def _watch(inspector: PoolInspector, answers: Sequence[Future[Any]]) -> Pool:
    """Look at the pool until all answers are there; the look that saw most blocks shared."""
    looks = [inspector.get_pool()]
    while not all(answer.done() for answer in answers):
        time.sleep(_LOOK_EVERY_S)
        looks.append(inspector.get_pool())
    return max(looks, key=lambda look: look.num_shared_blocks)
