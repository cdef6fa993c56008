"""How answers are printed: tables for people, JSON for machines."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import MessageToJson
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from google.protobuf.message import Message

# What is piped must not be cut to a width that nobody sees.
_UNCUT = 1 << 20
_ABSENT = "-"


def make_console() -> Console:
    """Standard output, where text is text: what others chose as a name is no markup."""
    width = None if sys.stdout.isatty() else _UNCUT
    return Console(highlight=False, markup=False, emoji=False, width=width)


def say(console: Console, text: str) -> None:
    """Print a sentence, which wraps only where a terminal does it."""
    console.print(printable(text), soft_wrap=True)


def print_json(messages: Iterable[Message]) -> None:
    """One JSON document a line, with the names that grpcurl prints."""
    for message in messages:
        print(MessageToJson(message, indent=None), flush=True)


def print_rows(console: Console, messages: Sequence[Message], columns: Sequence[str]) -> None:
    """A table with a row for each message and a column for each of its fields that `columns` names."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        is_number = messages and isinstance(getattr(messages[0], column), int | float)
        table.add_column(
            column.removeprefix("num_"), justify="right" if is_number else "left", overflow="fold"
        )
    for message in messages:
        table.add_row(*(Text(cell_of(message, column)) for column in columns))
    console.print(table)


def cell_of(message: Message, column: str) -> str:
    """A field of `message` in words."""
    field, value = message.DESCRIPTOR.fields_by_name[column], getattr(message, column)
    if field.has_presence and not message.HasField(column):
        return _ABSENT
    if field.enum_type is not None:
        name = field.enum_type.values_by_number[value].name
        return enum_in_words(field.enum_type.name, name)
    return printable(_in_words(value)) or _ABSENT


def printable(text: str) -> str:
    """`text` without what would move a terminal's cursor or change its colours."""
    return "".join(
        sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in text
    )


def _in_words(value: Any) -> str:  # noqa: ANN401 -- any field's
    if isinstance(value, Timestamp):
        return value.ToDatetime().strftime("%Y-%m-%d %H:%M:%SZ")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1f}"
    return str(value)


def enum_in_words(enum: str, name: str) -> str:
    """BLOCK_STATE_FREE of BlockState as "free"."""
    prefix = "".join(f"_{sign}" if sign.isupper() else sign for sign in enum).upper().lstrip("_")
    return name.removeprefix(f"{prefix}_").lower()
