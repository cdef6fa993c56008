"""The answers of `quire inspect` for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from quire.cli.output import print_rows, printable, say
from quire.cli.pool_picture import draw_picture

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from quire import client

_SEQUENCE_COLUMNS = (
    "sequence_id",
    "request_id",
    "session_id",
    "tenant",
    "num_computed_tokens",
    "num_cached_tokens",
    "num_blocks",
    "age_seconds",
)
_ENTRY_COLUMNS = ("block_id", "ref_count", "sealed", "block_hash")
_BLOCK_COLUMNS = (
    "block_id",
    "state",
    "ref_count",
    "pinned",
    "sealed",
    "generation",
    "tenant",
    "idle_seconds",
    "retention_id",
    "priority",
    "block_hash",
)
_HOLDER_COLUMNS = ("sequence_id", "request_id", "session_id", "index")
_TENANT_COLUMNS = (
    "tenant",
    "num_blocks",
    "num_cached_blocks",
    "num_sequences",
    "soft_quota_blocks",
    "hard_quota_blocks",
)
_RETENTION_COLUMNS = ("retention_id", "tenant", "priority", "num_blocks", "expire_time")
_PREFIX_COLUMNS = ("prefix_id", "num_tokens", "num_present_blocks")
_EXPLANATION_COLUMNS = (
    "time",
    "kind",
    "num_times",
    "sequence_id",
    "num_needed_blocks",
    "num_available_blocks",
    "cause_sequence_id",
    "reason",
)


def draw_pool(console: Console, pool: client.Pool) -> None:
    """The pool as a picture, and what there is to say of it."""
    draw_picture(console, pool)
    facts = Table.grid(padding=(0, 2))
    for name, text in _facts(pool):
        facts.add_row(name, Text(printable(text), overflow="fold"))
    console.print(facts)
    for cost in pool.known_costs:
        say(console, f"known cost: {cost}")


def _facts(pool: client.Pool) -> Iterator[tuple[str, str]]:
    yield "pool", f"{pool.pool_id}, epoch {pool.epoch or '-'}, revision {pool.revision}"
    yield "hit rate", f"{_percent(pool.hit_rate)} of tokens looked up"
    yield "partial hits", f"{pool.num_partial_hit_tokens or 0} tokens, copied from a matching block"
    yield "slots", _slots(pool)
    yield "retained", f"{pool.num_retained_blocks} blocks"
    yield "pinned", f"{pool.num_pinned_blocks} blocks"
    yield "deduplicated", f"{pool.num_deduplicated_blocks or 0} blocks"
    writer = "connected" if pool.writer_alive else "not connected"
    yield "writer", f"generation {pool.writer_generation or 0}, {writer}"
    yield "sessions", f"{pool.num_sessions}"
    yield "bytes", f"{pool.placement.replace('_', ' ')}, {pool.block_mib:.3f} MiB a block"
    survives = "survives a restart" if pool.durable else "does not survive a restart"
    yield "log", f"{pool.log_mib:.1f} MiB since its snapshot; the pool {survives}"


def _slots(pool: client.Pool) -> str:
    held, reserved, unused = (
        int(count or 0)
        for count in (pool.num_token_slots, pool.num_reserved_slots, pool.num_unused_slots)
    )
    share = _percent(unused / max(1, held + reserved + unused))
    return f"{held} hold a token, {reserved} reserved, {unused} unused ({share} waste)"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def draw_sequences(console: Console, sequences: Sequence[client.Sequence]) -> None:
    """A row for each sequence."""
    print_rows(console, sequences, _SEQUENCE_COLUMNS)


def draw_sequence(console: Console, found: client.SequenceAnswer) -> None:
    """A sequence and, below it, its block table."""
    print_rows(console, [found.sequence], _SEQUENCE_COLUMNS)
    print_rows(console, found.block_table, _ENTRY_COLUMNS)


def draw_blocks(console: Console, blocks: Sequence[client.Block]) -> None:
    """A row for each block."""
    print_rows(console, blocks, _BLOCK_COLUMNS)


def draw_block(console: Console, found: client.BlockAnswer) -> None:
    """A block and, below it, who holds it."""
    print_rows(console, [found.block], _BLOCK_COLUMNS)
    if found.holders:
        print_rows(console, found.holders, _HOLDER_COLUMNS)
    else:
        say(console, "no sequence holds it")


def draw_tenants(console: Console, found: client.TenantsAnswer) -> None:
    """A row for each tenant."""
    print_rows(console, found.tenants, _TENANT_COLUMNS)


def draw_retentions(console: Console, found: client.RetentionsAnswer) -> None:
    """Retentions and, below them, published prefixes."""
    if found.retentions:
        print_rows(console, found.retentions, _RETENTION_COLUMNS)
    else:
        say(console, "nothing is retained")
    if found.published_prefixes:
        print_rows(console, found.published_prefixes, _PREFIX_COLUMNS)
    else:
        say(console, "no prefix is published")


def draw_probe(console: Console, found: client.ProbeAnswer, num_tokens: int) -> None:
    """What would hit, in sentences."""
    copied = found.num_cached_tokens - found.num_shared_tokens
    say(
        console,
        f"{found.num_cached_tokens} of {num_tokens} tokens would hit: {found.num_shared_tokens} in shared "
        f"blocks, {copied} by a copy; {found.num_needed_blocks} blocks would be needed",
    )
    if found.num_in_progress_tokens:
        say(
            console,
            f"{found.num_in_progress_tokens} tokens behind them are being computed; an admission would wait",
        )


def draw_explanations(console: Console, found: client.ExplainAnswer) -> None:
    """A row for each decision, newest first."""
    if found.explanations:
        print_rows(console, found.explanations, _EXPLANATION_COLUMNS)
    else:
        say(console, "no decision about it is remembered")
