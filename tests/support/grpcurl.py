"""Calls of grpcurl, as documents show them, made by `buf curl`: that is what can be installed here."""

from __future__ import annotations

import subprocess
from pathlib import Path

_BUF = Path(__file__).parents[2] / "node_modules" / ".bin" / "buf"


def as_buf_curl(words: list[str]) -> list[str]:
    """A command line of grpcurl in the words of `buf curl`."""
    rest = iter(words[1:])
    flags: list[str] = []
    positional: list[str] = []
    is_unix = False
    for word in rest:
        if word == "-d":
            flags += ["--data", next(rest)]
        elif word == "-H":
            flags += ["--header", next(rest)]
        elif word == "-unix":
            is_unix = True
        elif word != "-plaintext":
            positional.append(word)
    address, method = positional
    if is_unix:
        flags += ["--unix-socket", address]
    host = "localhost" if is_unix else address
    return [
        "buf",
        "curl",
        "--protocol",
        "grpc",
        "--http2-prior-knowledge",
        *flags,
        f"http://{host}/{method}",
    ]


def run_buf(words: list[str]) -> str:
    """What `buf` prints, which must succeed."""
    done = subprocess.run(
        [str(_BUF), *words[1:]], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
