"""Paged attention against what the device can do: decode against its memory, prefill against a matrix product and SDPA.

    python bench/kernels.py [--device cuda|cpu] [--quick] [--fp8]

Keys and values are bfloat16, in blocks of 16 in random order. On a GPU the shape is that of Llama-3.1-8B, 32 query heads
over 8 kv heads of 128, and every time is that of a CUDA graph, so that no launch waits for Python. Calls take turns over
caches that together exceed the device's own cache by far. Each row's output is compared with the reference first. The
peaks are those of a large transfer and a large product in the same run: on a GPU a copy, whose bytes are counted read and
written, on the CPU a plain read and a product in float32, the precision in which its kernels compute.

Goals: on a GPU decode at 90 % of the copy's peak from contexts of 4k on, prefill at 60 % of the product's; on the CPU
decode at half of the read's peak from contexts of 2k on, with up to four query heads a kv head.
"""

from __future__ import annotations

import argparse
import functools
import platform
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.attention.bias import causal_lower_right

# This file's own folder, which Python puts first, would make it the package of its name.
sys.path[0] = str(Path(__file__).parents[1])

from bench.kernel_grids import CPU, GPU, QUICK, Grid, Heads
from kernels import reference
from kernels.batch import AttentionParams, KvScales, PagedBatch
from kernels.checks import FP8
from kernels.launcher import Kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

BLOCK_SIZE = 16
ROUNDS = 15
MAX_TURNS = 32
CHECKED_TOKENS = 32


class Bench:
    """Measures on one device."""

    def __init__(self, device: torch.device, grid: Grid, *, is_fp8: bool) -> None:
        self._device, self._grid, self._is_fp8 = device, grid, is_fp8
        self._dtype = torch.bfloat16
        self._kernels = Kernels.for_device(device)
        self.memory_rate = self._memory_rate(grid.transfer_bytes)  # bytes per second
        self.product_rate = self._product_rate()  # operations per second

    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        """Median time of one of `calls`, which take turns."""
        for call in calls:
            call()
        if self._device.type == "cuda":
            return _graph_seconds(calls)
        times = []
        for index in range(max(ROUNDS, len(calls))):
            started = time.perf_counter()
            calls[index % len(calls)]()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def _memory_rate(self, num_bytes: int) -> float:
        turns = max(1, min(MAX_TURNS, self._grid.rotated_bytes // num_bytes))
        pairs = [
            torch.randint(0, 255, (2, num_bytes // 16), dtype=torch.int64, device=self._device)
            for _ in range(turns)
        ]
        calls: list[Callable[[], object]] = [
            functools.partial(p[0].copy_, p[1])
            if self._device.type == "cuda"
            else functools.partial(torch.sum, p)
            for p in pairs
        ]
        return num_bytes / self.seconds(calls)

    def _product_rate(self) -> float:
        size = self._grid.product_size
        dtype = self._dtype if self._device.type == "cuda" else torch.float32
        a, b = (self._random(size, size).to(dtype) for _ in range(2))
        return 2 * size**3 / self.seconds([functools.partial(torch.nn.functional.linear, a, b)])

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self._dtype, device=self._device)

    def decode(self, heads: Heads, num_sequences: int, context_len: int) -> tuple[str, ...]:
        """One row of the table; raises MemoryError where it does not fit."""
        element = 1 if self._is_fp8 else 2
        num_bytes = 2 * num_sequences * context_len * heads.num_kv_heads * heads.head_dim * element
        turns = max(1, min(MAX_TURNS, self._grid.rotated_bytes // num_bytes))
        self._check_room(turns * num_bytes)
        calls, error = self._attention_calls(heads, [1] * num_sequences, context_len, turns)
        rate = num_bytes / self.seconds(calls)
        del calls
        same_size = self._memory_rate(num_bytes) if num_bytes < self._grid.transfer_bytes else None
        share, goal = rate / self.memory_rate, self._grid.decode_goal
        has_goal = context_len >= goal.context and heads.group <= goal.group
        return (
            f"{heads}",
            f"{num_sequences}",
            f"{context_len}",
            f"{num_bytes / rate * 1e6:.1f}",
            f"{rate / 1e9:.1f}",
            f"{share:.1%}",
            f"{rate / same_size:.1%}" if same_size else "-",
            _verdict(share, goal.share if has_goal else None),
            f"{error:.1e}",
        )

    def prefill(
        self, heads: Heads, num_sequences: int, num_tokens: int, context_len: int
    ) -> tuple[str, ...]:
        """One row of the table."""
        seen = num_tokens * context_len - num_tokens * (num_tokens - 1) // 2
        operations = 4 * heads.num_heads * heads.head_dim * seen * num_sequences
        calls, error = self._attention_calls(heads, [num_tokens] * num_sequences, context_len, 1)
        rate = operations / self.seconds(calls)
        sdpa = self._sdpa_call(heads, num_sequences, num_tokens, context_len)
        sdpa_rate = operations / self.seconds([sdpa])
        share = rate / self.product_rate
        return (
            f"{heads}",
            f"{num_sequences}",
            f"{num_tokens}",
            f"{context_len}",
            f"{operations / rate * 1e3:.3f}",
            f"{rate / 1e12:.2f}",
            f"{share:.1%}",
            f"{rate / sdpa_rate:.2f}",
            _verdict(share, self._grid.prefill_goal),
            f"{error:.1e}",
        )

    def _check_room(self, num_bytes: int) -> None:
        if self._device.type == "cuda" and num_bytes > 0.85 * torch.cuda.mem_get_info()[0]:
            raise MemoryError

    def _attention_calls(
        self, heads: Heads, queries: list[int], context_len: int, turns: int
    ) -> tuple[list[functools.partial[Tensor]], float]:
        """A call for each of `turns` caches, and the relative error of the first sequence of the first."""
        batch = self._batch(queries, context_len)
        num_blocks = 1 + len(queries) * -(-context_len // BLOCK_SIZE)
        calls = []
        for _ in range(turns):
            key_cache, value_cache = (self._cache(heads, num_blocks) for _ in range(2))
            query = self._random(sum(queries), heads.num_heads, heads.head_dim)
            arguments = (query, key_cache, value_cache, batch, self._params(heads))
            calls.append(functools.partial(self._kernels.paged_attention, *arguments))
        return calls, _relative_error(calls[0])

    def _batch(self, queries: list[int], context_len: int) -> PagedBatch:
        count, width = len(queries), -(-context_len // BLOCK_SIZE)
        tables = torch.randperm(count * width, device=self._device).int().view(count, width) + 1
        starts = torch.tensor([0, *queries]).cumsum(0).int().to(self._device)
        return PagedBatch(
            block_tables=tables,
            query_start=starts,
            context_lens=torch.full((count,), context_len, dtype=torch.int32, device=self._device),
            slot_mapping=torch.zeros(sum(queries), dtype=torch.int64, device=self._device),
            num_decodes=queries.count(1),
            max_query_len=max(queries),
            max_context_len=context_len,
        )

    def _cache(self, heads: Heads, num_blocks: int) -> Tensor:
        cache = self._random(num_blocks, BLOCK_SIZE, heads.num_kv_heads, heads.head_dim)
        return cache.to(FP8) if self._is_fp8 else cache

    def _params(self, heads: Heads) -> AttentionParams:
        one, scale = torch.ones(heads.num_kv_heads, device=self._device), heads.head_dim**-0.5
        return AttentionParams(scale, kv_scales=KvScales(one, one) if self._is_fp8 else None)

    def _sdpa_call(
        self, heads: Heads, num_sequences: int, num_tokens: int, context_len: int
    ) -> Callable[[], object]:
        query = self._random(num_sequences, heads.num_heads, num_tokens, heads.head_dim)
        shape = (num_sequences, heads.num_kv_heads, context_len, heads.head_dim)
        key, value = (self._random(*shape) for _ in range(2))
        return functools.partial(
            torch.nn.functional.scaled_dot_product_attention,
            query,
            key,
            value,
            attn_mask=causal_lower_right(num_tokens, context_len),
            enable_gqa=True,
        )


def _verdict(share: float, goal: float | None) -> str:
    if goal is None:
        return "-"
    return "met" if share >= goal else "missed"


def _graph_seconds(calls: Sequence[Callable[[], object]]) -> float:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) * 1e-3 / len(calls))
    return statistics.median(times)


def _relative_error(call: functools.partial[Tensor]) -> float:
    """Against the reference, in float32: the last tokens of the first sequence, which see most."""
    query, key_cache, value_cache, batch, params = call.args
    end = int(batch.query_start[1])
    begin = max(0, end - CHECKED_TOKENS)
    last = replace(
        batch,
        block_tables=batch.block_tables[:1],
        query_start=torch.tensor([0, end - begin], dtype=torch.int32),
        context_lens=batch.context_lens[:1],
    )
    expected = reference.paged_attention(query[begin:end], key_cache, value_cache, last, params)
    difference = call()[begin:end].float() - expected.float()
    return float(difference.norm() / expected.float().norm())


def _print_table(
    console: Console, title: str, headings: Sequence[str], rows: Sequence[tuple[str, ...]]
) -> None:
    table = Table(*headings, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--fp8", action="store_true", help="keys and values in fp8")
    arguments = parser.parse_args()
    grid = QUICK if arguments.quick else GPU if arguments.device == "cuda" else CPU
    console = Console(width=None if sys.stdout.isatty() else 110)
    bench = Bench(torch.device(arguments.device), grid, is_fp8=arguments.fp8)
    console.print(
        f"{_device_name(arguments.device)}, torch {torch.__version__}: memory moves "
        f"{bench.memory_rate / 1e9:.1f} GB/s, a product of {grid.product_size} "
        f"squared runs at {bench.product_rate / 1e12:.2f} TFLOP/s"
    )
    sizes = [(heads, size) for heads in grid.heads for size in grid.decodes]
    decodes = [
        _or_too_large(bench.decode, heads, *size) for heads, size in _tracked(sizes, "decode")
    ]
    cache = "fp8" if arguments.fp8 else "bfloat16"
    headings: tuple[str, ...] = (
        "heads",
        "sequences",
        "context",
        "us",
        "GB/s",
        "of memory's peak",
        "of as much moved",
        "goal",
        "error",
    )
    _print_table(console, f"decode, {cache} cache", headings, decodes)
    chunks = [(heads, size) for heads in grid.heads for size in grid.prefills]
    prefills = [
        _or_too_large(bench.prefill, heads, *size) for heads, size in _tracked(chunks, "prefill")
    ]
    headings = (
        "heads",
        "sequences",
        "tokens",
        "context",
        "ms",
        "TFLOP/s",
        "of the product",
        "of SDPA, contiguous",
        "goal",
        "error",
    )
    _print_table(console, f"prefill, {cache} cache", headings, prefills)


def _tracked(
    sizes: Sequence[tuple[Heads, tuple[int, ...]]], what: str
) -> Sequence[tuple[Heads, tuple[int, ...]]]:
    return track(sizes, what, console=Console(stderr=True), transient=True)  # type: ignore[return-value]


def _or_too_large(
    measure: Callable[..., tuple[str, ...]], heads: Heads, *size: int
) -> tuple[str, ...]:
    try:
        return measure(heads, *size)
    except (MemoryError, torch.OutOfMemoryError):
        return (f"{heads}", *map(str, size), "does not fit")


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
