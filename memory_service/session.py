"""Sessions: who may speak for a router, and until when its sequences live without it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from quire.errors import BrokenContract, SessionFenced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


@dataclass(slots=True)
class Session:
    """One router's lease."""

    key: int  # of its books in the block manager
    session_id: str
    max_num_rows: int
    generation: int = 0  # of its newest stream
    last_applied_step: int = 0
    lapses_at: float | None = None  # seconds of the clock; None while a stream stands


class SessionRegistry:
    """Sessions by id. Pure: the clock is given, whoever owns the registry asks for what lapsed."""

    def __init__(
        self, clock: Callable[[], float], time_to_live_s: float, *, first_generation: int = 1
    ) -> None:
        self._clock = clock
        self._time_to_live_s = time_to_live_s
        self._sessions: dict[str, Session] = {}
        self._keys = count(1)
        # One counter for all sessions: the compute service, which serves one of them at a time, compares generations.
        self._generations = count(first_generation)

    def __len__(self) -> int:
        """Live sessions."""
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        """The live sessions, oldest first."""
        return iter(list(self._sessions.values()))

    def open(self, session_id: str, max_num_rows: int) -> tuple[Session, bool]:
        """Open a session or resume it; any older stream of it is fenced. Also whether it is new.

        Raises:
            BrokenContract: when a resumed session asks for another number of rows.
        """
        session = self._sessions.get(session_id)
        is_new = session is None
        if session is None:
            session = Session(next(self._keys), session_id, max_num_rows)
            self._sessions[session_id] = session
        elif session.max_num_rows != max_num_rows:
            message = f"session {session_id!r} has {session.max_num_rows} rows, not {max_num_rows}"
            raise BrokenContract(message)
        session.generation = next(self._generations)
        session.lapses_at = None
        return session, is_new

    def restore(self, sessions: Iterable[Session], last_key: int, last_generation: int) -> None:
        """Take up the sessions of before a restart: their streams are gone, their leases run from now.

        `last_key` and `last_generation` are the highest that were ever given.
        """
        for session in sessions:
            self._sessions[session.session_id] = session
            self.detach(session, session.generation)
        self._keys = count(last_key + 1)
        self._generations = count(last_generation + 1)

    def check_step(self, session: Session, generation: int, step: int) -> None:
        """Whether a step may be applied.

        Raises:
            SessionFenced: when a newer stream took over, or the session ended.
            BrokenContract: when the step's number does not rise.
        """
        is_live = self._sessions.get(session.session_id) is session
        if not is_live or generation != session.generation:
            message = (
                f"session {session.session_id!r} has another owner than generation {generation}"
            )
            raise SessionFenced(
                message, metadata={"session_id": session.session_id, "generation": generation}
            )
        if step <= session.last_applied_step:
            message = f"step {step} does not rise above {session.last_applied_step}"
            raise BrokenContract(message, metadata={"step": step})

    def detach(self, session: Session, generation: int) -> None:
        """The stream of `generation` broke; without a newer one the lease runs from now."""
        if generation == session.generation:
            session.lapses_at = self._clock() + self._time_to_live_s

    def is_current(self, session: Session, generation: int) -> bool:
        """Whether the stream of `generation` speaks for the session."""
        is_live = self._sessions.get(session.session_id) is session
        return is_live and session.generation == generation

    def end(self, session: Session) -> None:
        """The session is over."""
        if self._sessions.get(session.session_id) is session:
            del self._sessions[session.session_id]

    def lapsed(self) -> list[Session]:
        """Sessions whose lease ran out."""
        now = self._clock()
        return [
            found
            for found in self._sessions.values()
            if found.lapses_at is not None and found.lapses_at <= now
        ]
