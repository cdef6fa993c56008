"""Ports of tests' processes, which several test processes start side by side."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def claim_ports(bases: Sequence[int], offsets: Iterable[int]) -> int:
    """One of `bases` at which every port `base + offset` is free; no other process of a test gets it, or asks again.

    Args:
        bases: further apart than `offsets` reach; below what the system gives out by itself, which begins at 32768.
        offsets: the ports wanted, from the base.
    """
    offsets = tuple(offsets)
    first = os.getpid() % len(bases)
    for base in (*bases[first:], *bases[:first]):
        if _claim(base, offsets):
            return base
    raise AssertionError("no free ports")


def _claim(base: int, offsets: tuple[int, ...]) -> bool:
    # An abstract Unix socket ends with its process, and is seen by others while nobody listens on the ports yet.
    claim = socket.socket(socket.AF_UNIX)
    with suppress(OSError), ExitStack() as held:
        claim.bind(f"\0quire-test-ports-{base}")
        for offset in offsets:
            held.enter_context(socket.create_server(("127.0.0.1", base + offset)))
        claim.detach()  # it stays open until this process ends
        return True
    claim.close()
    return False
