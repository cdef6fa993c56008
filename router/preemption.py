"""Whom to preempt when running sequences need blocks that are not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from router.request import Sequence


def choose_victims(running: Iterable[Sequence], missing: Mapping[int, int]) -> list[Sequence]:
    """Victims whose blocks make up for what is missing; never the most urgent sequence, so that somebody always ends.

    The least urgent priority goes first, then who has computed least, then who came last.

    Args:
        running: the running sequences.
        missing: blocks that refused rows lack, by row. A victim's own needs vanish with it.
    """
    candidates = sorted(running, key=_expendability)
    still_missing = sum(missing.values())
    victims: list[Sequence] = []
    while still_missing > 0 and len(candidates) > 1:
        victim = candidates.pop()
        victims.append(victim)
        # Blocks shared with others do not come free; a later step notices and preempts again.
        still_missing -= len(victim.block_table) + missing.get(victim.row, 0)
    return victims


def _expendability(sequence: Sequence) -> tuple[int, int, int, int]:
    request = sequence.request
    return (
        request.priority,
        -sequence.num_computed_tokens,
        request.arrival,
        sequence.sample_index,
    )
