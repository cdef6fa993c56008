"""Who lives in which row, kept beside the books: those have forgotten a sequence by the time that its end is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from memory_service.record import ReleaseReason, SessionEnded, SessionOpened, StepApplied

if TYPE_CHECKING:
    from memory_service.block_manager import BlockManager
    from memory_service.record import Change
    from memory_service.sequence_table import Sequence


@dataclass(slots=True)
class NamedSession:
    """A session and who lives in its rows."""

    session_id: str
    rows: dict[int, Sequence]


@dataclass(frozen=True, slots=True)
class Ended:
    """A sequence that a change ended."""

    row: int
    sequence: Sequence
    reason: ReleaseReason


class LiveNames:
    """The sequences of a manager as of the last change that was followed.

    It begins with the state that the manager is in, and must then be given every change, after the manager made it.
    """

    def __init__(self, manager: BlockManager) -> None:
        self._manager = manager
        self.sessions = {
            key: NamedSession(books.session_id, dict(books.table.items()))
            for key, books in manager.sessions
        }

    def follow(self, change: Change) -> list[Ended]:
        """Take the next change in; the sequences that it ended."""
        if isinstance(change, StepApplied):
            return self._follow_step(change)
        if isinstance(change, SessionOpened):
            self.sessions.setdefault(change.session_key, NamedSession(change.session_id, {}))
        elif isinstance(change, SessionEnded):
            session = self.sessions.pop(change.session_key)
            return [
                Ended(row, found, ReleaseReason.LAPSED)
                for row, found in sorted(session.rows.items())
            ]
        return []

    def _follow_step(self, change: StepApplied) -> list[Ended]:
        rows = self.sessions[change.session_key].rows
        ended = [
            Ended(row, rows.pop(row), ReleaseReason(reason))
            for row, reason in change.releases.tolist()
        ]
        if change.forks or change.admissions:
            table = self._manager.table(change.session_key)
            for fork in change.forks:
                rows[fork.dst_row] = table[fork.dst_row]
            for admission in change.admissions:
                rows[admission.row] = table[admission.row]
        return ended
