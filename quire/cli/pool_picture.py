"""A picture of the pool on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from quire.client import Pool

_WIDTH = 72  # a little more comes from rounding up


def draw_pool(console: Console, pool: Pool) -> None:
    """Draw the blocks by kind, each kind that exists with at least one character, and count them below."""
    owned = pool.num_used_blocks - pool.num_shared_blocks
    parts = (
        ("free", "·", pool.num_free_blocks),
        ("cached", "▒", pool.num_cached_blocks),
        ("shared", "▓", pool.num_shared_blocks),
        ("owned", "█", owned),
    )
    console.print(
        f"{pool.num_blocks} blocks of {pool.block_size} tokens, {pool.size_mib:.1f} MiB, "
        f"{pool.num_sequences} sequences"
    )
    console.print("".join(sign * -(-count * _WIDTH // pool.num_blocks) for _, sign, count in parts))
    console.print("  ".join(f"{sign} {name} {count}" for name, sign, count in parts))
    console.print(
        f"prefix hits: {pool.num_prefix_hit_tokens} of {pool.num_prefix_query_tokens} tokens looked up, "
        f"{pool.num_evictions} blocks evicted",
        soft_wrap=True,
    )
