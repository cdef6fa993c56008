"""How blocks look on a terminal. The sign tells what the colour tells, so that nobody needs colours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class Glyph:
    """One kind of block."""

    name: str
    sign: str
    ascii_sign: str  # where the terminal cannot show the other
    style: str

    def on(self, console: Console) -> str:
        """The sign that `console` can show."""
        return self.ascii_sign if console.options.ascii_only else self.sign


FREE = Glyph("free", "·", ".", "bright_black")
CACHED = Glyph("cached", "▒", ":", "cyan")
SHARED = Glyph("shared", "▓", "%", "magenta")
OWNED = Glyph("owned", "█", "#", "green")
NULL = Glyph("null", "∅", "0", "bright_black")
