"""A picture of the pool on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from quire.cli.glyphs import CACHED, FREE, OWNED, SHARED

if TYPE_CHECKING:
    from rich.console import Console

    from quire.client import Pool

_WIDTH = 72  # a little more comes from rounding up


def draw_picture(console: Console, pool: Pool) -> None:
    """Draw the blocks by kind, each kind that exists with at least one character, and count them below."""
    parts = (
        (FREE, pool.num_free_blocks),
        (CACHED, pool.num_cached_blocks),
        (SHARED, pool.num_shared_blocks),
        (OWNED, pool.num_used_blocks - pool.num_shared_blocks),
    )
    console.print(
        f"{pool.num_blocks} blocks of {pool.block_size} tokens, {pool.size_mib:.1f} MiB, "
        f"{pool.num_sequences} sequences",
        soft_wrap=True,
    )
    line = Text()
    for glyph, count in parts:
        line.append(glyph.on(console) * -(-count * _WIDTH // pool.num_blocks), glyph.style)
    console.print(line)
    console.print(
        "  ".join(f"{glyph.on(console)} {glyph.name} {count}" for glyph, count in parts),
        soft_wrap=True,
    )
    console.print(
        f"prefix hits: {pool.num_prefix_hit_tokens or 0} of {pool.num_prefix_query_tokens or 0} "
        f"tokens looked up, {pool.num_evictions or 0} blocks evicted",
        soft_wrap=True,
    )
