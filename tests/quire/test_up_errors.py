"""`quire up` that cannot work says why in one line and ends."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from processes import QUIRE, free_port

from quire import demo_model


def run_up(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [QUIRE, "up", *flags], capture_output=True, text=True, timeout=90, check=False
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--modle", "x"), "unknown flag --modle; did you mean --model?"),
        (("--memory-budget", "much"), "--memory-budget"),
        (("--model", "/nowhere/at-all"), "there is no model folder /nowhere/at-all"),
        (("--memory-budget", "100KiB"), "cannot hold one sequence of 1024 tokens"),
        (("--block-size", "12"), "power of two"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(flags: tuple[str, ...], expected: str) -> None:
    """Non-zero status, the reason on stderr, no trace."""
    listen = () if "--modle" in flags else ("--listen", f"127.0.0.1:{free_port()}")
    ended = run_up(*listen, "--log-level", "error", *flags)
    assert ended.returncode != 0
    assert expected in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


def test_a_taken_port_is_named() -> None:
    """A port that somebody listens on is an error that names it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = run_up("--listen", address)
    assert ended.returncode == 1
    assert ended.stderr.strip() == f"error: cannot listen on {address}: Address already in use"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("tokenizer.json", "{", "tokenizer.json cannot be read"),
        ("chat_template.jinja", "{% for %}", "the chat template of"),
        ("config.json", "{", "its config cannot be read"),
        ("model.safetensors", "x", "it cannot be loaded"),
    ],
)
def test_a_broken_file_is_one_clear_line(
    name: str, content: str, expected: str, tmp_path: Path
) -> None:
    """A checkpoint with a malformed file ends the start, in one line that says which."""
    folder = tmp_path / "model"
    shutil.copytree(demo_model.path(), folder)
    (folder / name).write_text(content)
    listen = f"127.0.0.1:{free_port()}"
    ended = run_up("--listen", listen, "--model", str(folder), "--log-level", "error")
    assert ended.returncode == 1
    assert expected in ended.stderr
    assert len(ended.stderr.splitlines()) == 1, ended.stderr


def test_the_demo_model_is_small_and_whole() -> None:
    """At most 6 MB: config, tokenizer, safetensors."""
    files = {found.name: found.stat().st_size for found in Path(demo_model.path()).iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(files)
    assert sum(files.values()) <= 6_000_000
