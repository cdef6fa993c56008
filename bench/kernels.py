"""Paged attention against what the device can do: decode against a copy, prefill against a matrix product and SDPA.

    python bench/kernels.py [--device cuda|cpu] [--quick] [--fp8]

The shape is that of Llama-3.1-8B: 32 query heads, 8 kv heads of 128, bfloat16, blocks of 16 in random order. On a GPU
every time is that of a CUDA graph, so that no launch waits for Python; calls take turns over caches that together exceed
the device's own cache by far. Each row's output is compared with the reference first. A copy moves as many bytes, read
and written, as decode reads; the peaks are those of a large copy and a large product in the same run.

Goals, on a GPU: decode at 90 % of the copy's peak from contexts of 4k on, prefill at 60 % of the product's.
On the CPU the same code runs smaller, through the CPU's own kernels.
"""

from __future__ import annotations

import argparse
import functools
import platform
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.attention.bias import causal_lower_right

# This file's own folder, which Python puts first, would make it the package of its name.
sys.path[0] = str(Path(__file__).parents[1])

from kernels import reference
from kernels.batch import AttentionParams, KvScales, PagedBatch
from kernels.checks import FP8
from kernels.launcher import Kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
SCALE = HEAD_DIM**-0.5
DECODE_GOAL, PREFILL_GOAL, GOAL_FROM = 0.90, 0.60, 4096
ROUNDS = 15
MAX_TURNS = 32
CHECKED_TOKENS = 32
MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class Grid:
    """What is measured on a kind of device."""

    decodes: tuple[tuple[int, int], ...]  # (sequences, tokens of context each)
    prefills: tuple[tuple[int, int], ...]  # (tokens run, tokens of context, those included)
    product_size: int
    copy_bytes: int  # of the large copy, read and written
    rotated_bytes: int  # caches that calls take turns over


GPU = Grid(
    tuple((b, n) for b in (1, 16, 64, 256) for n in (1024, 4096, 16_384, 65_536)),
    ((512, 512), (2048, 2048), (8192, 8192), (16_384, 16_384), (512, 16_384), (2048, 32_768)),
    8192,
    4 * GIB,
    GIB,
)
CPU = Grid(
    tuple((b, n) for b in (1, 4, 16) for n in (1024, 4096)),
    ((256, 256), (1024, 1024)),
    1024,
    GIB,
    512 * MIB,
)
QUICK = Grid(((1, 64), (3, 100)), ((8, 8), (8, 40)), 64, MIB, MIB)


class Bench:
    """Measures on one device."""

    def __init__(self, device: torch.device, grid: Grid, *, is_fp8: bool) -> None:
        self._device, self._grid, self._is_fp8 = device, grid, is_fp8
        self._dtype = torch.bfloat16
        self._kernels = Kernels.for_device(device)
        self.copy_rate = self._copy_rate(grid.copy_bytes)  # bytes per second, read and written
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

    def _copy_rate(self, num_bytes: int) -> float:
        turns = max(1, min(MAX_TURNS, self._grid.rotated_bytes // num_bytes))
        pairs = [
            torch.randint(0, 255, (2, num_bytes // 2), dtype=torch.uint8, device=self._device)
            for _ in range(turns)
        ]
        return num_bytes / self.seconds([functools.partial(p[0].copy_, p[1]) for p in pairs])

    def _product_rate(self) -> float:
        size = self._grid.product_size
        a, b = (self._random(size, size) for _ in range(2))
        return 2 * size**3 / self.seconds([functools.partial(torch.nn.functional.linear, a, b)])

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self._dtype, device=self._device)

    def decode(self, num_sequences: int, context_len: int) -> tuple[str, ...]:
        """One row of the table; raises MemoryError where it does not fit."""
        element = 1 if self._is_fp8 else 2
        num_bytes = 2 * num_sequences * context_len * NUM_KV_HEADS * HEAD_DIM * element
        turns = max(1, min(MAX_TURNS, self._grid.rotated_bytes // num_bytes))
        self._check_room(turns * num_bytes)
        calls, error = self._attention_calls([1] * num_sequences, context_len, turns)
        rate = num_bytes / self.seconds(calls)
        del calls
        same_size = self._copy_rate(num_bytes) if num_bytes < self._grid.copy_bytes else None
        share = rate / self.copy_rate
        return (
            f"{num_sequences}",
            f"{context_len}",
            f"{num_bytes / rate * 1e6:.1f}",
            f"{rate / 1e9:.0f}",
            f"{share:.1%}",
            f"{rate / same_size:.1%}" if same_size else "-",
            self._verdict(share, DECODE_GOAL) if context_len >= GOAL_FROM else "-",
            f"{error:.1e}",
        )

    def prefill(self, num_tokens: int, context_len: int) -> tuple[str, ...]:
        """One row of the table."""
        seen = num_tokens * context_len - num_tokens * (num_tokens - 1) // 2
        operations = 4 * NUM_HEADS * HEAD_DIM * seen
        calls, error = self._attention_calls([num_tokens], context_len, 1)
        rate = operations / self.seconds(calls)
        sdpa_rate = operations / self.seconds([self._sdpa_call(num_tokens, context_len)])
        share = rate / self.product_rate
        return (
            f"{num_tokens}",
            f"{context_len}",
            f"{operations / rate * 1e3:.3f}",
            f"{rate / 1e12:.2f}",
            f"{share:.1%}",
            f"{rate / sdpa_rate:.2f}",
            self._verdict(share, PREFILL_GOAL),
            f"{error:.1e}",
        )

    def _verdict(self, share: float, goal: float) -> str:
        if self._device.type != "cuda":
            return "-"
        return "met" if share >= goal else "missed"

    def _check_room(self, num_bytes: int) -> None:
        if self._device.type == "cuda" and num_bytes > 0.85 * torch.cuda.mem_get_info()[0]:
            raise MemoryError

    def _attention_calls(
        self, queries: list[int], context_len: int, turns: int
    ) -> tuple[list[functools.partial[Tensor]], float]:
        """A call for each of `turns` caches, and the relative error of the first sequence of the first."""
        batch = self._batch(queries, context_len)
        num_blocks = 1 + len(queries) * -(-context_len // BLOCK_SIZE)
        calls = []
        for _ in range(turns):
            key_cache, value_cache = (self._cache(num_blocks) for _ in range(2))
            query = self._random(sum(queries), NUM_HEADS, HEAD_DIM)
            arguments = (query, key_cache, value_cache, batch, self._params())
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

    def _cache(self, num_blocks: int) -> Tensor:
        cache = self._random(num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
        return cache.to(FP8) if self._is_fp8 else cache

    def _params(self) -> AttentionParams:
        one = torch.ones(NUM_KV_HEADS, device=self._device)
        return AttentionParams(SCALE, kv_scales=KvScales(one, one) if self._is_fp8 else None)

    def _sdpa_call(self, num_tokens: int, context_len: int) -> Callable[[], object]:
        query = self._random(1, NUM_HEADS, num_tokens, HEAD_DIM)
        key, value = (self._random(1, NUM_KV_HEADS, context_len, HEAD_DIM) for _ in range(2))
        return functools.partial(
            torch.nn.functional.scaled_dot_product_attention,
            query,
            key,
            value,
            attn_mask=causal_lower_right(num_tokens, context_len),
            enable_gqa=True,
        )


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
        f"{_device_name(arguments.device)}, torch {torch.__version__}: a large copy moves "
        f"{bench.copy_rate / 1e9:.0f} GB/s (read and written), a product of {grid.product_size} "
        f"squared runs at {bench.product_rate / 1e12:.2f} TFLOP/s"
    )
    decodes = [_or_too_large(bench.decode, *size) for size in _tracked(grid.decodes, "decode")]
    cache = "fp8" if arguments.fp8 else "bfloat16"
    headings = (
        "sequences",
        "context",
        "us",
        "GB/s",
        "of the copy's peak",
        "of a copy as large",
        "goal",
        "error",
    )
    _print_table(console, f"decode, {cache} cache", headings, decodes)
    prefills = [_or_too_large(bench.prefill, *size) for size in _tracked(grid.prefills, "prefill")]
    headings = (
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


def _tracked(sizes: Sequence[tuple[int, int]], what: str) -> Sequence[tuple[int, int]]:
    return track(sizes, what, console=Console(stderr=True), transient=True)  # type: ignore[return-value]


def _or_too_large(
    measure: Callable[[int, int], tuple[str, ...]], first: int, second: int
) -> tuple[str, ...]:
    try:
        return measure(first, second)
    except (MemoryError, torch.OutOfMemoryError):
        return (f"{first}", f"{second}", "does not fit")


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
