"""A map of the pool: a sign for each run of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from rich.text import Text

from quire.cli.glyphs import CACHED, FREE, NULL, OWNED, SHARED
from quire.client import BlockState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from quire.cli.glyphs import Glyph
    from quire.client import MirrorView

Cells: TypeAlias = np.ndarray[tuple[int], np.dtype[np.intp]]

# Of kinds that are equally many in a cell, the first one is drawn.
KINDS = (SHARED, OWNED, CACHED, FREE, NULL)


@dataclass(frozen=True, slots=True)
class PoolMap:
    """Cell i stands for the blocks `[i * blocks_per_cell, (i + 1) * blocks_per_cell)`, the last one for what is left."""

    blocks_per_cell: int
    cells: Cells  # index into KINDS: what most blocks of the cell are

    def rows(self, width: int, console: Console) -> Iterator[Text]:
        """Lines of `width` cells, by block id."""
        for start in range(0, len(self.cells), width):
            yield _line([KINDS[kind] for kind in self.cells[start : start + width]], console)


def draw_map(view: MirrorView, max_num_cells: int) -> PoolMap:
    """The map of all blocks in at most so many cells."""
    kinds = _kinds(view)
    blocks_per_cell = -(-len(kinds) // max_num_cells)
    starts = np.arange(0, len(kinds), blocks_per_cell)
    counts = [np.add.reduceat(kinds == kind, starts, dtype=np.int64) for kind in range(len(KINDS))]
    return PoolMap(blocks_per_cell, np.argmax(counts, axis=0))


def _kinds(view: MirrorView) -> Cells:
    used = view.states == BlockState.USED
    return np.select(
        [
            used & (view.ref_counts > 1),
            used,
            view.states == BlockState.CACHED,
            view.states == BlockState.FREE,
        ],
        [KINDS.index(SHARED), KINDS.index(OWNED), KINDS.index(CACHED), KINDS.index(FREE)],
        KINDS.index(NULL),
    )


def _line(glyphs: list[Glyph], console: Console) -> Text:
    line = Text(no_wrap=True)
    for glyph, run in groupby(glyphs):
        line.append(glyph.on(console) * len(list(run)), glyph.style)
    return line
