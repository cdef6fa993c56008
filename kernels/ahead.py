"""Compiling the CPU's kernels ahead of their first use, in processes of their own.

    python -m kernels.ahead GROUP... DTYPE

A first start compiles for half a minute; two processes do so while the model is loaded, and what they made is fetched
from the cache. Later starts find a mark there and begin no process.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from kernels import numba_layer, numba_linear, numba_sampling, numba_small_ops
from kernels.batch import AttentionParams, PagedBatch
from kernels.launcher import Kernels
from kernels.numba_setup import cache_folder
from kernels.sampling import Draws

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_BLOCK_SIZE, _HEAD_DIM = 16, 64


def _attention(dtype: torch.dtype) -> None:
    """The store, decodes and chunks, in the null block of a small pool."""
    kernels = Kernels.for_device(torch.device("cpu"))
    cache = torch.zeros(1, _BLOCK_SIZE, 1, _HEAD_DIM, dtype=dtype)
    batch = PagedBatch(
        block_tables=torch.zeros(2, 1, dtype=torch.int32),
        query_start=torch.tensor([0, 1, 3], dtype=torch.int32),
        context_lens=torch.tensor([1, 2], dtype=torch.int32),
        slot_mapping=torch.zeros(3, dtype=torch.int64),
        num_decodes=1,
        max_query_len=2,
        max_context_len=2,
    )
    tokens = torch.zeros(3, 1, _HEAD_DIM, dtype=dtype)
    kernels.store_kv(tokens, tokens, cache, cache.clone(), batch.slot_mapping)
    kernels.paged_attention(tokens, cache, cache, batch, AttentionParams(1.0))


def _products(dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16:
        weight = numba_linear.pack(torch.zeros(1, 1, dtype=dtype), None)
        for num_rows in (1, 2):
            numba_linear.linear(torch.zeros(num_rows, 1, dtype=dtype), weight)
        numba_small_ops.compile_all()
        numba_layer.compile_all()


def _sampling(dtype: torch.dtype) -> None:
    one = np.ones(1)
    numba_sampling.most_likely(torch.zeros(1, 2, dtype=dtype))
    numba_sampling.draw(torch.zeros(1, 2), Draws(one, one.astype(np.int64), one, one, np.zeros(1)))


_GROUPS: Final[dict[str, Callable[[torch.dtype], None]]] = {
    "attention": _attention,
    "products": _products,
    "sampling": _sampling,
}
# As long as each other, nearly: a process for each of two cores.
_PROCESSES: Final = (("attention", "sampling"), ("products",))


class Compilation:
    """The processes that compile, if there are any.

    Args:
        dtype: of weights and caches.
    """

    def __init__(self, dtype: str) -> None:
        self._processes = [
            _start(groups, dtype)
            for groups in _PROCESSES
            if not all(_mark(group, dtype).exists() for group in groups)
        ]

    @property
    def is_running(self) -> bool:
        """Whether somebody would wait."""
        return any(process.poll() is None for process in self._processes)

    def wait(self) -> None:
        """Wait for all. One that failed left no mark: whoever needs a kernel compiles it, and sees why."""
        for process in self._processes:
            process.wait()


def _start(groups: Sequence[str], dtype: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "kernels.ahead", *groups, dtype]
    # The pipe is never written to: it ends with us, and so does the process.
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)  # noqa: S603 -- ourselves


def _mark(group: str, dtype: str) -> Path:
    return cache_folder() / f"{group}-{dtype}"


def main() -> None:
    """Compile the groups named, and leave a mark for each; where another process is at it, wait for that."""
    *groups, dtype = sys.argv[1:]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cache_folder().mkdir(parents=True, exist_ok=True)
    for group in groups:
        mark = _mark(group, dtype)
        with mark.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not mark.exists():
                _GROUPS[group](getattr(torch, dtype))
                mark.touch()


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
