"""`quire inspect`: the pool, sequences, a block table, an integrity check."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from google.protobuf.json_format import MessageToJson
from rich.console import Console
from rich.table import Table

from quire.cli.errors import reporting_errors
from quire.cli.pool_picture import draw_pool
from quire.client import PoolInspector
from quire.run_folder import memory_address
from quire.settings import InspectSettings
from quire.settings_loader import load

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.message import Message

_PIPED_WIDTH = 200
_SEQUENCE_COLUMNS = (
    "sequence_id",
    "request_id",
    "session_id",
    "num_computed_tokens",
    "num_cached_tokens",
    "num_blocks",
    "age_seconds",
)
_ENTRY_COLUMNS = ("block_id", "ref_count", "sealed", "block_hash")


def inspect(argv: Sequence[str]) -> int:
    """Print what was asked for; the process's exit status."""
    settings = load(InspectSettings, argv, prog="quire inspect")
    if (settings.what == "sequence") != (settings.sequence_id is not None):
        print("error: quire inspect: `sequence` and only it takes a sequence id", file=sys.stderr)
        return 2
    address = settings.memory_address or memory_address(settings.router_address)
    with (
        reporting_errors(address) as outcome,
        PoolInspector(address, timeout_s=settings.timeout_s) as inspector,
    ):
        # What is piped must not be cut to a width that nobody sees.
        width = None if sys.stdout.isatty() else _PIPED_WIDTH
        outcome.status = _show(settings, inspector, Console(highlight=False, width=width))
    return outcome.status


def _show(settings: InspectSettings, inspector: PoolInspector, console: Console) -> int:
    as_json = settings.output == "json"
    if settings.what == "integrity":
        return _show_integrity(inspector, console, as_json=as_json)
    if settings.what == "pool":
        pool = inspector.get_pool()
        _print_json([pool]) if as_json else draw_pool(console, pool)
    elif settings.what == "sequences":
        sequences = list(inspector.list_sequences())
        _print_rows(console, sequences, _SEQUENCE_COLUMNS, as_json=as_json)
    else:
        assert settings.sequence_id is not None
        found = inspector.get_sequence(settings.sequence_id)
        if as_json:
            _print_json([found])
        else:
            _print_rows(console, [found.sequence], _SEQUENCE_COLUMNS, as_json=False)
            _print_rows(console, list(found.block_table), _ENTRY_COLUMNS, as_json=False)
    return 0


def _show_integrity(inspector: PoolInspector, console: Console, *, as_json: bool) -> int:
    findings = inspector.check_integrity()
    if as_json:
        console.print_json(data=findings)
    else:
        console.print("\n".join(findings) or "the pool's books agree", soft_wrap=True)
    return 1 if findings else 0


def _print_rows(
    console: Console, messages: Sequence[Message], columns: Sequence[str], *, as_json: bool
) -> None:
    if as_json:
        _print_json(messages)
        return
    table = Table(*(column.removeprefix("num_") for column in columns), box=None)
    for message in messages:
        table.add_row(*(_cell(getattr(message, column)) for column in columns))
    console.print(table)


def _cell(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _print_json(messages: Sequence[Message]) -> None:
    """One JSON document a line, as grpcurl's fields are named."""
    for message in messages:
        print(MessageToJson(message, indent=None))
