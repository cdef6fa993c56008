"""One picture of `quire top`: what is seen, laid out for a width and a height."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from quire.cli.glyphs import CACHED, FREE, OWNED, SHARED
from quire.cli.output import printable
from quire.cli.pool_map import draw_map
from quire.cli.top_tables import sequence_table, tenant_table
from quire.errors import NoPool

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console, RenderableType

    from quire.cli.glyphs import Glyph
    from quire.client import Link, MirrorView, Pool

_MIN_BAR = 4
_NAME_WIDTH = 7
_COUNT_WIDTH = 18
_MAP_ROWS_WITHOUT_HEIGHT = 12
_MAP_SHARE = 3  # of the rows that are not taken the map gets at most one in so many
_TENANT_SHARE = 4
_GAP = "   "


@dataclass(frozen=True, slots=True)
class Sight:
    """All that a picture shows."""

    link: Link
    view: MirrorView | None
    pool: Pool | None  # what a Watch does not tell; None until it was asked
    num_missed: int = 0


def frame(sight: Sight, console: Console, width: int, height: int | None) -> RenderableType:
    """The picture in lines of at most `width`, so that it fits `height` where that can be.

    A height of None shows all there is, each table as wide as it is: for what is no screen.
    """
    header = _flow(_header(sight), width)
    if sight.view is None:
        return Group(*header)
    left = None if height is None else height - len(header)
    return Group(*header, *_body(sight.view, console, width, left))


def _body(
    view: MirrorView, console: Console, width: int, height: int | None
) -> list[RenderableType]:
    numbers = [*_bars(view, console, width), *_flow(_rates(view), width)]
    if height is None:
        pool_map = _map(view, console, width, _MAP_ROWS_WITHOUT_HEIGHT)
        tables = [*tenant_table(view, None, None), *sequence_table(view, None, None)]
        return [*pool_map, *numbers, *tables]
    left = height - len(numbers)
    pool_map = _map(view, console, width, max(1, left // _MAP_SHARE))
    left -= len(pool_map)
    num_tenant_rows = min(len(view.tenants) + 1, left // _TENANT_SHARE)
    tenants = tenant_table(view, width, num_tenant_rows)
    left -= num_tenant_rows if tenants else 0
    return [*pool_map, *numbers, *tenants, *sequence_table(view, width, left)]


def _map(view: MirrorView, console: Console, width: int, max_num_rows: int) -> list[Text]:
    pool_map = draw_map(view, width * max_num_rows)
    legend = _flow(_legend(console, pool_map.blocks_per_cell), width)
    return [*pool_map.rows(width, console), *legend]


def _header(sight: Sight) -> list[Text]:
    pieces = [Text("quire top", "bold"), _status(sight)]
    if sight.pool is not None:
        pieces.append(_text(f"pool {sight.pool.pool_id}"))
        pieces.append(_text(f"{sight.pool.size_mib:.1f} MiB"))
    if sight.view is not None:
        view = sight.view
        pieces.append(_text(f"{view.counts.num_blocks} blocks of {view.block_size} tokens"))
        pieces.append(_text(f"epoch {view.epoch}"))
        pieces.append(_text(f"revision {view.revision}"))
    if sight.num_missed:
        pieces.append(_text(f"fell behind {sight.num_missed} times"))
    return pieces


def _status(sight: Sight) -> Text:
    link = sight.link
    if isinstance(link.error, NoPool):
        return Text("no pool yet: waiting for a compute service", "bold yellow")
    if link.is_up:
        return Text("up" if sight.view is not None else "up, waiting for a picture", "green")
    if link.was_up:
        return Text(f"memory service away for {link.away_s:.0f} s", "bold red")
    return Text("connecting", "bold yellow")


def _legend(console: Console, blocks_per_cell: int) -> list[Text]:
    pieces = [_sample(glyph, console) for glyph in (FREE, CACHED, OWNED, SHARED)]
    if blocks_per_cell > 1:
        pieces.append(Text(f"a sign for {blocks_per_cell} blocks", "bright_black"))
    return pieces


def _sample(glyph: Glyph, console: Console) -> Text:
    return Text.assemble((glyph.on(console), glyph.style), f" {glyph.name}")


def _bars(view: MirrorView, console: Console, width: int) -> list[Text]:
    counts = view.counts
    num_shared = int((view.ref_counts > 1).sum())
    kinds = (
        ("free", ((FREE, counts.num_free_blocks),)),
        ("cached", ((CACHED, counts.num_cached_blocks),)),
        ("used", ((SHARED, num_shared), (OWNED, counts.num_used_blocks - num_shared))),
    )
    return [_bar(name, parts, counts.num_blocks, console, width) for name, parts in kinds]


def _bar(
    name: str, parts: tuple[tuple[Glyph, int], ...], num_blocks: int, console: Console, width: int
) -> Text:
    total = sum(count for _, count in parts)
    room = max(_MIN_BAR, width - _NAME_WIDTH - _COUNT_WIDTH)
    line = Text(f"{name:{_NAME_WIDTH}}", no_wrap=True)
    length = 0
    for glyph, count in parts:
        # Each kind that exists is seen; both together are not longer than the room.
        part = min(-(-count * room // num_blocks), room - length)
        line.append(glyph.on(console) * part, glyph.style)
        length += part
    line.append(" " * (room - length))
    line.append(f"{total:>9} {100 * total / max(1, num_blocks):5.1f} %")
    return line


def _rates(view: MirrorView) -> list[Text]:
    rates = view.rates
    hit_rate = "-" if rates.hit_rate is None else f"{100 * rates.hit_rate:.0f} %"
    return [
        _text(f"{rates.steps_per_s:.1f} steps/s"),
        _text(f"{rates.tokens_per_s:.0f} tokens/s"),
        _text(f"hit rate {hit_rate}"),
        _text(f"{rates.evictions_per_s:.1f} evictions/s"),
        Text(f"over {rates.seconds:.1f} s", "bright_black"),
    ]


def _text(text: str) -> Text:
    return Text(printable(text))


def _flow(pieces: Iterable[Text], width: int) -> list[Text]:
    """`pieces` side by side, in as many lines as they need; one that is wider than a line is cut."""
    lines: list[Text] = []
    for piece in pieces:
        if lines and len(lines[-1]) + len(_GAP) + len(piece) <= width:
            lines[-1].append(_GAP).append_text(piece)
        else:
            lines.append(Text().append_text(piece))
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return lines
