"""What a memory service keeps of its pool in the state folder: it recovers it, appends to it and keeps it small."""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import structlog

from memory_service.compaction import CompactionProcess
from memory_service.log_codec import encode_record
from memory_service.log_file import FrameWriter
from memory_service.log_header import LogHeader, encode_header
from memory_service.recovery import fold_folder, nobody_observes
from memory_service.state_folder import StateFolder
from quire import __version__

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from memory_service.block_manager import BlockManager
    from memory_service.log_header import PoolDescription
    from memory_service.record import Record
    from memory_service.recovery import FoldedState, NewManager

_RETRY_S: Final = 60.0
_SNAPSHOT_SHARE: Final = 4

_logger = structlog.get_logger()


class StateStore:
    """The state folder of a service that runs.

    `append` writes a record before it returns: whoever tells of a change after that tells nothing that the log does not
    know. `tend`, called now and then, begins a new log when the last one is long, has another process fold what is closed
    into a snapshot, and removes what is older than the history.

    Args:
        path: the folder.
        compact_size_bytes: how long a log may get; a quarter of the last snapshot where that is more, so that the work of
            making snapshots stays in proportion to the changes.
        history_bytes: most bytes of closed logs and older snapshots that are kept for `quire replay`.
        clock: seconds, monotonic.

    Raises:
        StateError: when the folder cannot be used, or another service uses it.
    """

    def __init__(
        self,
        path: Path,
        *,
        compact_size_bytes: int,
        history_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = StateFolder(path)
        self._compact_size_bytes = compact_size_bytes
        self._history_bytes = history_bytes
        self._clock = clock
        self._lock = self._folder.prepare()
        self.secret = self._folder.make_secret()
        self._header: LogHeader | None = None  # of the log that is written
        self._writer: FrameWriter | None = None
        self._revision = 0  # of the last record
        self._num_closed_bytes = 0  # of logs that no snapshot shows yet
        self._num_snapshot_bytes = 0
        self._compaction: CompactionProcess | None = None
        self.retry_at = 0.0  # seconds of the clock: no compaction begins before

    @property
    def epoch(self) -> str:
        """Epoch of the pool's revisions; empty without a pool."""
        return self._header.epoch if self._header else ""

    @property
    def num_tail_bytes(self) -> int:
        """Bytes of the log that is written."""
        return self._writer.size_bytes if self._writer else 0

    @property
    def num_log_bytes(self) -> int:
        """Bytes of all logs behind the last snapshot."""
        return self._num_closed_bytes + self.num_tail_bytes

    def recover(
        self,
        new_manager: NewManager,
        on_base: Callable[[BlockManager], None] = nobody_observes,
    ) -> FoldedState | None:
        """The state of before, and go on behind it; None when there is none.

        `on_base` gets the books as the last snapshot shows them, before the changes since then are applied.

        Raises:
            StateError: when it cannot be told what the state was.
        """
        found = fold_folder(self._folder, new_manager, on_base=on_base)
        if found is not None:
            self._header, self._revision = found.header, found.manager.revision
            self._writer = FrameWriter.resume(found.tail, found.tail_end)
            self._num_closed_bytes = self._folder.num_log_bytes() - found.tail_end
            self._num_snapshot_bytes = self._folder.num_snapshot_bytes()
        return found

    def begin(self, pool_id: str, pool: PoolDescription) -> None:
        """A new pool, with an epoch of its own; raises LogUnwritable."""
        self.drop()
        self._revision = 0
        self._open_log(LogHeader(pool_id, secrets.token_hex(8), 0, __version__, pool))

    def drop(self) -> None:
        """The pool is over: nothing of it is kept; raises LogUnwritable."""
        self._stop_compaction()
        if self._writer is not None:
            self._writer.close()
        self._writer = self._header = None
        self._num_closed_bytes = self._num_snapshot_bytes = 0
        self._folder.clear()

    def append(self, record: Record) -> None:
        """Write one change; raises LogUnwritable, and then nothing may be told that depends on it."""
        assert self._writer is not None
        self._writer.append([encode_record(record)])
        self._revision = record.revision

    def close(self) -> None:
        """End what runs and give the folder up."""
        self._stop_compaction()
        if self._writer is not None:
            self._writer.close()
        os.close(self._lock)

    # Compaction

    def tend(self) -> None:
        """Take one look at what is to be done; a compaction that fails is tried again later. Raises LogUnwritable."""
        if self._header is None:
            return
        if self._compaction is None and self._clock() >= self.retry_at:
            self._rotate_if_long(self._header)
        try:
            self._tend_compaction(self._header.revision)
        except OSError as error:
            self._compaction_failed(str(error))

    def _rotate_if_long(self, header: LogHeader) -> None:
        most = max(self._compact_size_bytes, self._num_snapshot_bytes // _SNAPSHOT_SHARE)
        is_long = self.num_tail_bytes > most
        if is_long and self._revision > header.revision:
            assert self._writer is not None
            self._num_closed_bytes += self.num_tail_bytes
            self._writer.close()
            self._open_log(replace(header, revision=self._revision, quire_version=__version__))

    def _open_log(self, header: LogHeader) -> None:
        path = self._folder.log(header.revision)
        self._writer = FrameWriter.create(path, encode_header(header))
        self._header = header

    def _tend_compaction(self, revision: int) -> None:
        """Fold the closed logs when no snapshot shows where they end, which is `revision`."""
        if self._compaction is not None:
            self._reap(self._compaction)
        elif self._num_closed_bytes and self._clock() >= self.retry_at:
            self._compaction = CompactionProcess(self._folder, revision)

    def _reap(self, compaction: CompactionProcess) -> None:
        failure = compaction.poll()
        if failure is None:
            return
        if failure:
            self._compaction_failed(failure)
        else:
            self._compaction = None
            self._num_closed_bytes = 0
            self._num_snapshot_bytes = self._folder.num_snapshot_bytes()
            _logger.info(
                "compacted", revision=compaction.revision, num_bytes=self._num_snapshot_bytes
            )
            self._folder.forget(self._history_bytes)

    def _compaction_failed(self, reason: str) -> None:
        self._compaction = None
        self.retry_at = self._clock() + _RETRY_S
        _logger.error("compaction_failed", reason=reason, retry_after_s=_RETRY_S)

    def _stop_compaction(self) -> None:
        if self._compaction is not None:
            self._compaction.stop()
            self._compaction = None
