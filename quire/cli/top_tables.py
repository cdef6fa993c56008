"""The tables of `quire top`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from quire.cli.output import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from quire.client import MirroredSequence, MirroredTenant, MirrorView

_WIDE = 72  # from here on there is room for more than the id
_SHORTEST_NAME = 6
_GAP_WIDTH = 2
_NUMBER_WIDTH = 9  # a column of numbers with its gap
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86_400
_ABSENT = "-"


def sequence_table(view: MirrorView, width: int | None, height: int | None) -> list[RenderableType]:
    """Sequences, those with most blocks first, in at most so many lines; None: all of them, as wide as they are."""
    found = sorted(
        view.sequences.values(), key=lambda one: (-len(one.block_table), one.sequence_id)
    )
    is_wide = width is None or width >= _WIDE
    names = ("sequence", "request", "tenant") if is_wide else ("sequence",)
    numbers = ("tokens", "cached", "blocks", "age") if is_wide else ("tokens", "blocks", "age")
    rows = [_sequence_cells(sequence, view.now) for sequence in found]
    return _table(names, numbers, rows, width, height)


def tenant_table(view: MirrorView, width: int | None, height: int | None) -> list[RenderableType]:
    """Tenants with their quotas, those with most blocks first; nothing while nobody but the nameless one is there."""
    found = sorted(view.tenants.values(), key=lambda one: (-one.num_blocks, one.name))
    if all(not tenant.name and not tenant.has_quota for tenant in found):
        return []
    is_wide = width is None or width >= _WIDE
    numbers = (
        ("sequences", "cached", "blocks", "soft", "hard") if is_wide else ("blocks", "soft", "hard")
    )
    return _table(("tenant",), numbers, [_tenant_cells(tenant) for tenant in found], width, height)


def _table(
    names: Sequence[str],
    numbers: Sequence[str],
    rows: Sequence[dict[str, str]],
    width: int | None,
    height: int | None,
) -> list[RenderableType]:
    """A line of titles, rows, and where not all fit a line that says how many are left out."""
    fits = height is None or len(rows) < height
    num_shown = len(rows) if fits or height is None else height - 2
    if not rows or num_shown < 1:
        return []
    shown = rows[:num_shown]
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    room = None if width is None else width - _NUMBER_WIDTH * len(numbers)
    for name, max_width in zip(names, _name_widths(names, shown, room), strict=True):
        table.add_column(name, no_wrap=True, max_width=max_width, overflow="ellipsis")
    for name in numbers:
        table.add_column(name, no_wrap=True, justify="right", min_width=_NUMBER_WIDTH - 2)
    for row in shown:
        table.add_row(*(Text(row[name]) for name in (*names, *numbers)))
    left_out = len(rows) - num_shown
    return [table, Text(f"and {left_out} more", "bright_black")] if left_out else [table]


def _name_widths(
    names: Sequence[str], rows: Sequence[dict[str, str]], room: int | None
) -> list[int]:
    """Widths of the columns of names: what they need, where there is room; else the widest ones give way."""
    needed = {name: max(map(cell_len, [name, *(row[name] for row in rows)])) for name in names}
    if room is None:
        return list(needed.values())
    left, given = room - _GAP_WIDTH * len(names), {}
    for position, name in enumerate(sorted(needed, key=lambda name: needed[name])):
        given[name] = max(_SHORTEST_NAME, min(needed[name], left // (len(names) - position)))
        left -= given[name]
    return [given[name] for name in names]


def _sequence_cells(found: MirroredSequence, now: float) -> dict[str, str]:
    return {
        "sequence": printable(found.sequence_id),
        "request": printable(found.request_id),
        "tenant": printable(found.tenant) or _ABSENT,
        "tokens": str(found.num_computed_tokens),
        "cached": str(found.num_cached_tokens),
        "blocks": str(len(found.block_table)),
        "age": _age(now - found.admitted_at),
    }


def _tenant_cells(found: MirroredTenant) -> dict[str, str]:
    return {
        "tenant": printable(found.name) or _ABSENT,
        "sequences": str(found.num_sequences),
        "cached": str(found.num_cached_blocks),
        "blocks": str(found.num_blocks),
        "soft": _quota(found.soft_quota_blocks),
        "hard": _quota(found.hard_quota_blocks),
    }


def _quota(blocks: int | None) -> str:
    return _ABSENT if blocks is None else str(blocks)


def _age(seconds: float) -> str:
    whole = max(0, int(seconds))
    if whole < _MINUTE_S:
        return f"{whole}s"
    if whole < _HOUR_S:
        return f"{whole // _MINUTE_S}m{whole % _MINUTE_S:02}s"
    if whole < _DAY_S:
        return f"{whole // _HOUR_S}h{whole % _HOUR_S // _MINUTE_S:02}m"
    return f"{whole // _DAY_S}d{whole % _DAY_S // _HOUR_S:02}h"
