"""What the README tells a reader to type works as it stands."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from grpcurl import as_buf_curl, run_buf
from processes import suspended_compute

from quire.client import Client

if TYPE_CHECKING:
    from collections.abc import Iterator

    from processes import Quire

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
REQUEST_ID = "my-request"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """Every call of `program` in the README, as words."""
    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith(program)]


def own_address(quire: Quire, words: list[str]) -> list[str]:
    """`words` with the addresses of this test's services."""
    memory = quire.addresses["memory"].removeprefix("unix:")
    return [
        word.replace("$MEMORY", memory).replace("127.0.0.1:7071", quire.addresses["router"])
        for word in words
    ]


@contextmanager
def live_request(quire: Quire) -> Iterator[None]:
    """The request that the calls name runs; it has its first token and gets no other meanwhile."""
    with Client(quire.addresses["router"]) as client:
        running = client.generate(
            "def f():", request_id=REQUEST_ID, max_tokens=900, ignore_eos=True
        )
        next(running)
        with suspended_compute(quire):
            yield
        client.abort(REQUEST_ID)
        list(running)


def needs_compute(words: list[str]) -> bool:
    return "generate" in words[1] or words[-1].endswith("Generate")


@pytest.mark.parametrize(
    "words",
    [*map(as_buf_curl, commands("grpcurl")), *commands("buf curl")],
    ids=lambda words: words[-1].rsplit("/", 1)[-1],
)
def test_the_grpcurl_calls_answer(words: list[str], quire: Quire) -> None:
    """Each call of the README, against live servers found by reflection; a request that it asks about runs."""
    with nullcontext() if needs_compute(words) else live_request(quire):
        answer = run_buf(own_address(quire, words))
    decoder = json.JSONDecoder()
    found, end = decoder.raw_decode(answer)
    assert found
    if words[-1].endswith("GetSequence"):
        assert found["blockTable"][0]["refCount"] == 1
    if words[-1].endswith("Generate"):
        assert "accepted" in found
        assert '"finished"' in answer[end:]


def test_the_readme_has_the_calls() -> None:
    """The tests above found what they are about."""
    assert len(commands("grpcurl")) == 5
    assert len(commands("buf curl")) == 1
    assert len(commands(".venv/bin/quire inspect")) == 4


@pytest.mark.parametrize("source", blocks("python"))
def test_the_python_runs(source: str, quire: Quire) -> None:
    """The Python of the README is a program that prints text."""
    program = source.replace("127.0.0.1:7071", quire.addresses["router"])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) >= 4


@pytest.mark.parametrize(
    "words",
    [*commands(".venv/bin/quire inspect"), *commands(".venv/bin/quire generate")],
    ids=lambda words: "-".join(words[1:3]),
)
def test_the_commands_run(words: list[str], quire: Quire) -> None:
    """`quire inspect` and `quire generate` as written, pointed at this test's router."""
    with nullcontext() if needs_compute(words) else live_request(quire):
        done = subprocess.run(
            [str(ROOT / words[0]), *words[1:], "--router-address", quire.addresses["router"]],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()
