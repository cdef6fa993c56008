"""Whom to preempt when running sequences need blocks that are not there, or that their tenant may not have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.step import RefusalReason

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from router.request import Sequence
    from router.step import MemoryAnswer, Work


def victims_of(
    refused: Iterable[Work], running: Iterable[Sequence], answer: MemoryAnswer, block_size: int
) -> list[Sequence]:
    """Whom to preempt for running sequences that memory refused in `answer`.

    What a quota asks for goes first and alone: the blocks that it frees may do for everybody, and the next answer tells.
    """
    missing: dict[RefusalReason, dict[int, int]] = {}
    for work in refused:
        reason = answer.refusals[work.sequence.row]
        missing.setdefault(reason, {})[work.sequence.row] = _num_missing_blocks(work, block_size)
    everybody = list(running)
    over_quota = list(_victims_by_tenant(everybody, missing.get(RefusalReason.OVER_QUOTA, {})))
    return over_quota or choose_victims(everybody, missing.get(RefusalReason.NO_BLOCKS, {}))


def _victims_by_tenant(running: list[Sequence], missing: Mapping[int, int]) -> Iterator[Sequence]:
    """A tenant's own sequences make room for it, nobody else's."""
    tenants = {found.request.tenant for found in running if found.row in missing}
    for tenant in sorted(tenants):
        own = [found for found in running if found.request.tenant == tenant]
        yield from choose_victims(
            own, {found.row: missing[found.row] for found in own if found.row in missing}
        )


def choose_victims(running: Iterable[Sequence], missing: Mapping[int, int]) -> list[Sequence]:
    """Victims whose blocks make up for what is missing; never the most urgent sequence, so that somebody always ends.

    The least urgent priority goes first, then who has computed least, then who came last.

    Args:
        running: the running sequences that may be preempted.
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


def _num_missing_blocks(work: Work, block_size: int) -> int:
    num_blocks = -(-(work.start + work.num_tokens) // block_size)
    # At least one: a shared last block needs a copy even when the table is long enough.
    return max(1, num_blocks - len(work.sequence.block_table))


def _expendability(sequence: Sequence) -> tuple[int, int, int, int]:
    request = sequence.request
    return (
        request.priority,
        -sequence.next_position,
        request.arrival,
        sequence.sample_index,
    )
