"""The one place of the pool's writer: who holds it, who may take it, and the tickets in between."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from memory_service.writer_process import UNKNOWN_PROCESS, WriterProcess, is_running
from quire.errors import PoolMismatch, WriterAlive

if TYPE_CHECKING:
    from collections.abc import Callable

    from memory_service.record import WriterAttached

_TICKET_LIFE_S: Final = 30.0
_RETURN_GRACE_S: Final = 10.0  # for a writer whose process cannot be seen from here


class TicketRefused(Exception):
    """A ticket does not open the pool; the message says why, in one line."""


@dataclass(slots=True)
class Writer:
    """The compute service that was let in last."""

    generation: int
    ticket: str = ""
    ticket_expires_at: float = 0.0  # seconds of the clock
    is_resuming: bool = (
        False  # the ticket is that of a writer which held the place before a restart
    )
    is_connected: bool = False  # it fetched the descriptor and keeps the socket open
    process: WriterProcess = UNKNOWN_PROCESS
    returns_until: float | None = None  # it held the place before a restart, and may come back


class WriterPlace:
    """One writer at a time: a new one is let in when the old one is known dead, or has long not been heard of.

    After a restart the old writer counts as alive for as long as its process runs; where that cannot be seen, for a
    grace time.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.writer: Writer | None = None

    def restore(self, attached: WriterAttached) -> None:
        """Before a restart `attached` held the place."""
        self.writer = Writer(
            attached.generation,
            process=WriterProcess(attached.pid, attached.started_ticks),
            returns_until=self._clock() + _RETURN_GRACE_S,
        )

    def check_free(self) -> None:
        """Raise WriterAlive while the writer lives."""
        writer = self.writer
        if writer is None:
            return
        if writer.is_connected or self._may_fetch(writer) or self._may_return(writer):
            message = "another compute service writes to this pool; it is waited for until it ends"
            raise WriterAlive(message, metadata={"writer_generation": writer.generation})

    def _may_fetch(self, writer: Writer) -> bool:
        return bool(writer.ticket) and self._clock() < writer.ticket_expires_at

    def _may_return(self, writer: Writer) -> bool:
        if writer.returns_until is None:
            return False
        is_alive = is_running(writer.process)
        return self._clock() < writer.returns_until if is_alive is None else is_alive

    def is_awaited(self) -> bool:
        """Whether it is worth waiting for what only the writer of before the restart can bring."""
        writer = self.writer
        if writer is None or writer.returns_until is None:
            return False
        if self._may_fetch(writer):
            return True
        return self._clock() < writer.returns_until and is_running(writer.process) is not False

    def give_up(self) -> None:
        """The writer of before the restart is not waited for any more; its generation stays taken."""
        if self.writer is not None:
            self.writer.returns_until = None
            self.writer.ticket = ""

    def let_in(self) -> Writer:
        """A ticket for a new writer."""
        self.writer = Writer(self.writer.generation + 1 if self.writer else 1)
        return self._with_ticket(self.writer)

    def resume(self, generation: int) -> Writer:
        """A ticket for the writer that held the place before.

        Raises:
            PoolMismatch: when another one took the place since.
            WriterAlive: when that writer is connected.
        """
        writer = self.writer
        current = writer.generation if writer else 0
        if writer is None or generation != current:
            message = f"writer {generation} is not the last one, which is {current}"
            raise PoolMismatch(message, metadata={"writer_generation": current})
        if writer.is_connected:
            message = f"writer {generation} is connected, it has nothing to resume"
            raise WriterAlive(message, metadata={"writer_generation": generation})
        writer.is_resuming = True
        return self._with_ticket(writer)

    def _with_ticket(self, writer: Writer) -> Writer:
        writer.ticket = secrets.token_urlsafe(24)
        writer.ticket_expires_at = self._clock() + _TICKET_LIFE_S
        return writer

    def redeem(self, ticket: str) -> Writer:
        """Who holds `ticket`, once; raises TicketRefused."""
        writer = self.writer
        if (
            writer is None
            or not self._may_fetch(writer)
            or not secrets.compare_digest(ticket.encode(), writer.ticket.encode())
        ):
            raise TicketRefused("the ticket is unknown, used or too old")
        writer.ticket = ""
        return writer

    def connect(self, writer: Writer, process: WriterProcess) -> bool:
        """The writer may write from now on; whether that is news."""
        is_news = not writer.is_resuming or process != writer.process
        writer.is_connected, writer.is_resuming = True, False
        writer.process, writer.returns_until = process, None
        return is_news

    def gone(self, generation: int) -> None:
        """The writer's socket ended, and its process, as far as that can be told."""
        if self.writer is not None and self.writer.generation == generation:
            self.writer.is_connected = False
