"""Start what an exercised image holds, as its user would: entry point, environment, a root that stays as it was."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tools.dockerfile_steps import Image, ImageBuilder

_HEAVY = ("torch", "triton", "transformers", "numba", "llvmlite", "safetensors")
_OWN_QUIRE = str(Path(sys.executable).with_name("quire"))
_BUDGET = ("--memory-budget", "16MiB")
_MIB = 1 << 20
_PATIENCE_S = 180

Process = subprocess.Popen[bytes]


def try_light(builder: ImageBuilder, memory: Image, router: Image) -> None:
    """Memory service and router from their images, with this environment's compute service between them."""
    for image in (memory, router):
        _check(builder, image)
        _check_is_light(builder, image)
    with tempfile.TemporaryDirectory(prefix="q") as name, ExitStack() as stack:
        folder = Path(name)
        memory_at = f"unix:{folder / 'memory.sock'}"
        compute_at, router_at = _address(), _address()
        own = [
            f"--descriptor-socket={folder / 'fd.sock'}",
            f"--state-dir={folder / 'state'}",
            *_BUDGET,
        ]
        first = _serving(builder, memory, [f"--listen={memory_at}", *_quiet(), *own])
        running = [stack.enter_context(first)]
        compute = [_OWN_QUIRE, "compute", f"--listen={compute_at}", f"--memory-address={memory_at}"]
        running.append(stack.enter_context(_running([*compute, *_quiet()], None)))
        peers = [f"--memory-address={memory_at}", f"--compute-address={compute_at}"]
        last = _serving(builder, router, [f"--listen={router_at}", *_quiet(), *peers])
        running.append(stack.enter_context(last))
        _ask(builder, router, router_at, running)


def try_compute(builder: ImageBuilder, image: Image) -> None:
    """All three services from the compute image, by `quire up`."""
    _check(builder, image)
    at = _address()
    command = ["quire", "up", f"--listen={at}", "--no-metrics", "--log-level=error", *_BUDGET]
    with (
        _own_folder(builder, image) as env,
        _running([_program(builder, command[0]), *command[1:]], env) as process,
    ):
        _ask(builder, image, at, [process])


def _check(builder: ImageBuilder, image: Image) -> None:
    """A user that is not root, labels, and an entry point that starts."""
    builder.use(image)
    uid = image.user.partition(":")[0]
    assert uid.isdigit(), f"Kubernetes cannot tell that {image.user} is not root"
    assert int(uid) > 0
    assert f":{uid}:" in (image.root / "etc" / "passwd").read_text(encoding="utf-8")
    assert image.labels["org.opencontainers.image.licenses"]
    with _own_folder(builder, image) as env:
        command = [*image.entrypoint, *image.command, "--help"]
        subprocess.run(
            [_program(builder, command[0]), *command[1:]],
            env=env,
            check=True,
            stdout=subprocess.DEVNULL,
        )


def _check_is_light(builder: ImageBuilder, image: Image) -> None:
    """None of compute's libraries, and commands that need them say so in one line."""
    program = f"import importlib.util as u; print([n for n in {_HEAVY} if u.find_spec(n)])"
    with _own_folder(builder, image) as env:
        python = [_program(builder, "python"), "-c", program]
        found = subprocess.run(python, env=env, check=True, capture_output=True, text=True).stdout
        assert found.strip() == "[]", found
        up = [_program(builder, "quire"), "up"]
        refused = subprocess.run(up, env=env, check=False, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "pip install 'quire[compute]'" in refused.stderr
    size = sum(path.lstat().st_size for path in (image.root / "opt").rglob("*"))
    print(f"/opt: {size / _MIB:.0f} MiB", flush=True)


@contextmanager
def _serving(builder: ImageBuilder, image: Image, flags: list[str]) -> Iterator[Process]:
    """The image's own command with `flags`, until the end of the block; it must write nothing into its root."""
    builder.use(image)
    before = _written(image)
    with _own_folder(builder, image) as env:
        command = [*image.entrypoint, *image.command, *flags]
        with _running([_program(builder, command[0]), *command[1:]], env) as process:
            yield process
    assert _written(image) == before, "a read-only root would have refused a write"


@contextmanager
def _running(command: list[str], env: dict[str, str] | None) -> Iterator[Process]:
    process = subprocess.Popen(command, env=env)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
    assert status == 0, command


@contextmanager
def _own_folder(builder: ImageBuilder, image: Image) -> Iterator[dict[str, str]]:
    """The image's environment, with a folder of this machine where a Pod mounts one."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        writable = {"HOME": folder, "TMPDIR": folder, "NUMBA_CACHE_DIR": folder}
        yield builder.environment(image) | writable


def _ask(builder: ImageBuilder, image: Image, router: str, running: list[Process]) -> None:
    """A request through `quire generate` of the image, once the router serves."""
    builder.use(image)
    generate = [_program(builder, "quire"), "generate", "import os", "--max-tokens=8"]
    with _own_folder(builder, image) as env:
        command = [*generate, f"--router-address={router}"]
        deadline = time.monotonic() + _PATIENCE_S
        while not _answers(command, env):
            assert time.monotonic() < deadline, "no answer"
            assert all(process.poll() is None for process in running), "a service ended by itself"
            time.sleep(0.5)


def _answers(command: list[str], env: dict[str, str]) -> bool:
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    return done.returncode == 0 and bool(done.stdout.strip())


def _written(image: Image) -> dict[str, int]:
    """When each file of the image was written."""
    return {str(path): path.lstat().st_mtime_ns for path in image.root.rglob("*")}


def _program(builder: ImageBuilder, name: str) -> str:
    return str(builder.root / "opt" / "quire" / "bin" / name)


def _quiet() -> list[str]:
    return ["--log-level=error", "--metrics-listen=off"]


def _address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"
