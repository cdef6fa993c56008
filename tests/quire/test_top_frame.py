"""Pictures of `quire top` at several sizes."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from naive_pool import NaivePool, NaiveSequence
from rich.cells import cell_len
from rich.console import Console
from rich.screen import Screen

from quire.cli.pool_map import draw_map
from quire.cli.top_frame import Sight, frame
from quire.client import BlockState, Link, MirrorCounts, MirrorView, Pool, PoolMirror
from quire.errors import NoPool

UP = Link(is_up=True, was_up=True)
POOL = Pool(pool_id="6f1e2d", size_mib=4.0)
F, C, U, N = BlockState.FREE, BlockState.CACHED, BlockState.USED, BlockState.NULL


def busy_pool(num_blocks: int = 512, num_sequences: int = 14) -> NaivePool:
    """Sequence i holds i + 2 blocks, the first two of them shared by all; a tenant has a quota."""
    pool = NaivePool(num_blocks)
    blocks = iter(range(3, num_blocks))
    for row in range(num_sequences):
        table = [1, 2, *(next(blocks) for _ in range(row))]
        tenant = ("", "alice", "bob")[row % 3]
        pool.sequences["s", row] = NaiveSequence(f"request-{row:02}/0", tenant, table, 16, 32)
    pool.cached = {next(blocks) for _ in range(40)}
    pool.quotas = {"alice": 100}
    return pool


def view_of(pool: NaivePool) -> MirrorView:
    mirror = PoolMirror()
    mirror.take(pool.snapshot()[0])
    view = mirror.look()
    assert view is not None
    return view


def drawn(sight: Sight, width: int, height: int | None, encoding: str = "utf-8") -> list[str]:
    """What is on a screen of that size, without colours; without a height, all of it."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(
        file=file, width=width, height=height or 50, color_system=None, highlight=False
    )
    picture = frame(sight, console, width, height)
    console.print(picture if height is None else Screen(picture))
    file.seek(0)
    return [line.rstrip() for line in file.read().splitlines()]


SIZES = [
    (40, 12),
    (40, 15),
    (40, 50),
    (60, 24),
    (80, 24),
    (100, 30),
    (200, 60),
    (400, 120),
    (20, 6),
]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_picture_fits_its_screen(width: int, height: int) -> None:
    """No line is wider, there are not more of them, and the state of the service is always seen."""
    lines = drawn(Sight(UP, view_of(busy_pool()), POOL), width, height)
    assert len(lines) <= height
    assert max(map(cell_len, lines)) <= width
    assert re.match(r"quire top +up\b", lines[0])


@pytest.mark.parametrize(("width", "height"), SIZES[:-1])
def test_the_numbers_are_whole_at_any_size(width: int, height: int) -> None:
    """Bars carry their counts: 93 used of 512, 40 cached, the rest but the null block free."""
    text = "\n".join(drawn(Sight(UP, view_of(busy_pool()), POOL), width, height))
    assert re.search(r"^free .* 378 +73\.8 %$", text, re.MULTILINE)
    assert re.search(r"^cached .* 40 +7\.8 %$", text, re.MULTILINE)
    assert re.search(r"^used .* 93 +18\.2 %$", text, re.MULTILINE)
    assert "steps/s" in text
    assert "evictions/s" in text


def test_the_largest_sequences_come_first() -> None:
    """Sorted by blocks; what has no room is counted."""
    lines = drawn(Sight(UP, view_of(busy_pool()), POOL), 100, 24)
    title = next(index for index, line in enumerate(lines) if line.startswith("sequence "))
    assert lines[title].split() == [
        "sequence",
        "request",
        "tenant",
        "tokens",
        "cached",
        "blocks",
        "age",
    ]
    rows = lines[title + 1 :]
    assert rows[0].split() == ["request-13/0", "request-13", "alice", "16", "32", "15", "3s"]
    shown = [row.split()[0] for row in rows if row.startswith("request-")]
    assert shown == [f"request-{13 - index:02}/0" for index in range(len(shown))]
    assert rows[len(shown)] == f"and {14 - len(shown)} more"
    assert len(lines) == 24


def test_a_narrow_screen_leaves_names_out_and_no_number() -> None:
    """At 40 columns a sequence is its id, tokens, blocks and age."""
    lines = drawn(Sight(UP, view_of(busy_pool()), POOL), 40, 30)
    assert ["request-13…", "16", "15", "3s"] in [line.split() for line in lines]


def test_tenants_stand_with_their_quotas() -> None:
    """Blocks and both quotas; a tenant without a name is a dash."""
    lines = [line.split() for line in drawn(Sight(UP, view_of(busy_pool()), POOL), 100, 60)]
    assert ["tenant", "sequences", "cached", "blocks", "soft", "hard"] in lines
    assert ["alice", "5", "0", "37", "-", "100"] in lines
    assert any(line[:2] == ["-", "5"] for line in lines)


def test_one_nameless_tenant_is_no_table() -> None:
    """Who has no tenants sees none."""
    pool = NaivePool(9)
    pool.sequences["s", 0] = NaiveSequence("a/0", "", [1], 4)
    assert "tenant  " not in "\n".join(drawn(Sight(UP, view_of(pool), POOL), 40, 24))


def test_without_a_height_nothing_is_left_out() -> None:
    """All sequences, none of their names cut."""
    pool = busy_pool(1024, 40)
    pool.sequences["s", 99] = NaiveSequence("x" * 90 + "/0", "", [1], 4)
    text = "\n".join(drawn(Sight(UP, view_of(pool), POOL), 400, None))
    assert text.count("request-") == 80
    assert "x" * 90 + "/0" in text
    assert " more" not in text


def test_a_name_is_no_markup() -> None:
    """What a client chose as its request id is shown as it is, control characters replaced."""
    pool = NaivePool(9)
    pool.sequences["s", 0] = NaiveSequence("[bold]\x1b[2J/0", "", [1], 4)
    text = "\n".join(drawn(Sight(UP, view_of(pool), POOL), 100, 24))
    assert "[bold]\N{REPLACEMENT CHARACTER}[2J/0" in text


def test_a_service_that_is_away_is_said_to_be() -> None:
    """The last picture stays below the line that says since when."""
    link = Link(is_up=False, was_up=True, away_s=3.2)
    lines = drawn(Sight(link, view_of(busy_pool()), POOL, num_missed=2), 80, 24)
    assert "memory service away for 3 s" in lines[0]
    assert any("fell behind 2 times" in line for line in lines[:3])
    assert any(line.startswith("used ") for line in lines)


def test_a_pool_that_is_not_there_yet_is_waited_for() -> None:
    """Before a compute service attached there is one line."""
    lines = drawn(Sight(Link(error=NoPool("none")), None, None), 80, 24)
    assert lines[0] == "quire top   no pool yet: waiting for a compute service"


def test_each_kind_has_a_sign_of_its_own() -> None:
    """Without colours, on a terminal with blocks and on one that knows ASCII only."""
    pool = NaivePool(6)
    pool.sequences["s", 0] = NaiveSequence("a/0", "", [1, 2], 4)
    pool.sequences["s", 1] = NaiveSequence("b/0", "", [1], 4)
    pool.cached = {3}
    assert "∅▓█▒··" in drawn(Sight(UP, view_of(pool), POOL), 80, 24)
    in_ascii = drawn(Sight(UP, view_of(pool), POOL), 80, 24, encoding="ascii")
    assert "0%#:.." in in_ascii
    assert "".join(in_ascii).isascii()


def map_view(states: list[BlockState], ref_counts: list[int] | None = None) -> MirrorView:
    counts = np.array(ref_counts or [int(state is U) for state in states], dtype=np.int32)
    return MirrorView(
        "1", "1", 16, MirrorCounts(len(states)), np.array(states, dtype=np.int8), counts, {}, {}
    )


@pytest.mark.parametrize(
    ("states", "ref_counts", "num_cells", "expected"),
    [
        ([N, F, C, U, U], [0, 0, 0, 1, 2], 5, "∅·▒█▓"),
        ([N, F, F, C, C, C], None, 2, "·▒"),
        ([F, C, C, F, F, F], None, 3, "▒▒·"),  # of kinds that are equally many, the busier one
        ([F, F, F, U, F, F, F], None, 3, "···"),
        ([F, F, F, F, U], None, 3, "··█"),  # the last cell stands for what is left
        ([U], None, 100, "█"),
    ],
)
def test_a_sign_stands_for_what_most_of_its_blocks_are(
    states: list[BlockState], ref_counts: list[int] | None, num_cells: int, expected: str
) -> None:
    """Runs of equal length, as many as there are cells at most."""
    pool_map = draw_map(map_view(states, ref_counts), num_cells)
    (row,) = pool_map.rows(100, Console())
    assert row.plain == expected


@pytest.mark.parametrize("num_blocks", [1, 79, 80, 81, 12_345, 1_000_000])
def test_a_map_has_room_for_any_number_of_blocks(num_blocks: int) -> None:
    """Eight lines of 80 are never exceeded, and every block is in a cell."""
    pool_map = draw_map(map_view([C] * num_blocks), 8 * 80)
    rows = list(pool_map.rows(80, Console()))
    assert len(rows) <= 8
    num_cells = sum(len(row.plain) for row in rows)
    assert (num_cells - 1) * pool_map.blocks_per_cell < num_blocks
    assert num_cells * pool_map.blocks_per_cell >= num_blocks
