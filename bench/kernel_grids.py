"""Shapes for `bench/kernels.py`, and what is hoped for."""

from __future__ import annotations

from dataclasses import dataclass, replace

MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class Heads:
    """Heads of a model."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.num_heads} / {self.num_kv_heads} x {self.head_dim}"

    @property
    def group(self) -> int:
        """Query heads a kv head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class Goal:
    """What decode should reach, and where."""

    share: float  # of the peak of memory
    context: int  # tokens, from there on
    group: int  # up to so many query heads a kv head


@dataclass(frozen=True, slots=True)
class Grid:
    """What is measured on a kind of device."""

    heads: tuple[Heads, ...]
    decodes: tuple[tuple[int, int], ...]  # (sequences, tokens of context each)
    prefills: tuple[tuple[int, int, int], ...]  # (sequences, tokens run each, of context each)
    product_size: int
    transfer_bytes: int  # of the large transfer
    rotated_bytes: int  # caches that calls take turns over
    decode_goal: Goal
    prefill_goal: float | None  # share of the product's peak


LLAMA, QWEN, SMALL = Heads(32, 8, 128), Heads(14, 2, 64), Heads(9, 3, 64)
GPU = Grid(
    (LLAMA,),
    tuple((b, n) for b in (1, 16, 64, 256) for n in (1024, 4096, 16_384, 65_536)),
    tuple(
        (1, tokens, context)
        for tokens, context in (
            (512, 512),
            (2048, 2048),
            (8192, 8192),
            (16_384, 16_384),
            (512, 16_384),
            (2048, 32_768),
        )
    ),
    8192,
    4 * GIB,
    GIB,
    Goal(0.9, 4096, LLAMA.group),
    0.6,
)
CPU = Grid(
    (Heads(8, 8, 128), Heads(16, 8, 128), LLAMA, QWEN, SMALL),
    tuple((b, n) for b in (1, 4, 16) for n in (2048, 4096, 16_384)),
    ((1, 512, 512), (1, 512, 4000), (1, 2048, 4000), (16, 128, 128)),
    1024,
    GIB // 4,
    GIB // 8,
    Goal(0.5, 2048, 4),
    None,
)
QUICK = replace(
    CPU,
    heads=(QWEN,),
    decodes=((1, 64), (3, 100)),
    prefills=((1, 8, 8), (2, 8, 40)),
    product_size=64,
    transfer_bytes=MIB,
    rotated_bytes=MIB,
)
