"""The state of a folder at any revision that it still knows: a snapshot, and the changes behind it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import structlog

from memory_service.block_hash import BlockHasher
from memory_service.block_manager import BlockManager
from memory_service.fold import Fold, FoldError
from memory_service.log_codec import decode_record
from memory_service.log_file import FrameReader, LogCorrupt, StateError
from memory_service.log_header import LogHeader, decode_columns, decode_header
from memory_service.snapshot import import_state
from memory_service.state_folder import StateFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from memory_service.record import Record

    NewManager = Callable[[LogHeader], BlockManager]  # books in which nothing stands yet
    OnRead = Callable[[Path, int], None]  # a log, and the byte up to which its records are applied

_logger = structlog.get_logger()


class LogReader:
    """A log: its header, then its records with the offset of each.

    Raises:
        LogCorrupt: for bytes that nobody wrote.
        StateError: for a format that this version does not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.frames = FrameReader(path)
        self.header = _read_header(self.frames)

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        """The records that are whole."""
        for offset, payload in self.frames:
            try:
                record = decode_record(payload)
            except ValueError as error:
                raise LogCorrupt(self.path, offset, str(error)) from error
            yield offset, record


def _read_header(frames: FrameReader) -> LogHeader:
    _, payload = next(iter(frames), (0, None))
    if payload is None:
        raise LogCorrupt(frames.path, 0, "its header is not whole")
    try:
        return decode_header(payload)
    except ValueError as error:
        message = f"cannot read {frames.path}: {error}"
        raise StateError(message) from error


def read_snapshot(path: Path) -> tuple[LogHeader, dict[str, bytes]]:
    """Header and columns of a snapshot; raises as `LogReader` does."""
    frames = FrameReader(path)
    header = _read_header(frames)
    try:
        return header, decode_columns(payload for _, payload in frames)
    except ValueError as error:
        raise LogCorrupt(path, frames.end, str(error)) from error


@dataclass(frozen=True, slots=True)
class FoldedState:
    """A state, and where it ends."""

    header: LogHeader  # of the log that was read last
    manager: BlockManager
    tail: Path  # that log
    tail_end: int  # byte behind its last whole frame that was read
    num_torn_bytes: int  # behind that, of a frame that is not whole


def _nobody_waits(_path: Path, _end: int) -> None:
    pass


def nobody_observes(_: BlockManager) -> None:
    """For those who recover books that nobody listens to."""


def new_books(secret: bytes) -> NewManager:
    """Makes books to fold into. They decide nothing, so they need no setting that only decisions need."""

    def make(header: LogHeader) -> BlockManager:
        pool = header.pool
        hasher = BlockHasher(secret, header.pool_id.encode())
        return BlockManager(
            pool.num_blocks,
            pool.block_size,
            hasher,
            prefix_cache_enabled=pool.prefix_cache_enabled,
        )

    return make


def fold_folder(
    folder: StateFolder,
    new_manager: NewManager,
    *,
    until: int | None = None,
    on_base: Callable[[BlockManager], None] = nobody_observes,
    on_read: OnRead = _nobody_waits,
) -> FoldedState | None:
    """The state at revision `until`, or the last one; None in a folder without logs.

    A snapshot that is corrupt is passed over, with a warning, while an older one and the changes behind it are there.
    `on_base` gets the books as the snapshot shows them, before the changes behind it are applied.

    Raises:
        LogCorrupt: where a file holds what nobody wrote, or changes that do not follow each other.
        StateError: when a file is missing, or of a format that this version does not read.
    """
    if not folder.logs():
        return None
    refused: LogCorrupt | None = None
    for base in reversed([found for found in folder.bases() if until is None or found <= until]):
        try:
            header, manager = _load_base(folder, base, new_manager)
        except LogCorrupt as error:
            _logger.warning("snapshot_corrupt", path=str(error.path), offset=error.offset)
            refused = refused or error
            continue
        on_base(manager)
        return _fold_logs(folder, manager, header, base, until, on_read)
    if refused is not None:
        raise refused
    raise StateError(_why_no_base(folder, until))


def _why_no_base(folder: StateFolder, until: int | None) -> str:
    bases = folder.bases()
    if bases:
        return f"{folder.path} does not know revision {until}; it begins at {bases[0]}"
    return f"the snapshot that the logs in {folder.path} follow is missing"


def _load_base(
    folder: StateFolder, revision: int, new_manager: NewManager
) -> tuple[LogHeader, BlockManager]:
    if not revision:
        header = LogReader(folder.log(0)).header
        return header, new_manager(header)
    path = folder.snapshot(revision)
    header, columns = read_snapshot(path)
    manager = new_manager(header)
    try:
        import_state(manager, columns)
    except (KeyError, ValueError) as error:
        raise LogCorrupt(path, 0, f"its columns do not fit together: {error!r}") from error
    if not header.revision == manager.revision == revision:
        raise LogCorrupt(path, 0, f"it shows revision {manager.revision}")
    return header, manager


def _fold_logs(
    folder: StateFolder,
    manager: BlockManager,
    header: LogHeader,
    base: int,
    until: int | None,
    on_read: OnRead,
) -> FoldedState:
    """Apply the logs from `base` on, which must follow each other without a gap."""
    starts = [
        start for start in folder.logs() if start >= base and (until is None or start <= until)
    ]
    if not starts or starts[0] != base:
        message = f"{folder.log(base)} is missing"
        raise StateError(message)
    fold = Fold(manager)
    for start in starts:
        reader = LogReader(folder.log(start))
        _check_follows(reader, header, start, manager.revision)
        if manager.revision != until:  # what is behind it may be corrupt and still need not be read
            _apply_all(fold, reader, until, on_read)
        is_last = start == starts[-1]
        if reader.frames.num_torn_bytes and not is_last:
            why = "it ends within a frame, though another log follows"
            raise LogCorrupt(reader.path, reader.frames.end, why)
    return FoldedState(
        reader.header, manager, reader.path, reader.frames.end, reader.frames.num_torn_bytes
    )


def _apply_all(fold: Fold, reader: LogReader, until: int | None, on_read: OnRead) -> None:
    for offset, record in reader:
        if until is not None and record.revision > until:
            return
        try:
            fold.apply(record)
        except FoldError as error:
            raise LogCorrupt(reader.path, offset, str(error)) from error
        on_read(reader.path, reader.frames.end)
        if record.revision == until:
            return


def _check_follows(reader: LogReader, first: LogHeader, start: int, revision: int) -> None:
    header = reader.header
    if replace(header, quire_version="", revision=0) != replace(
        first, quire_version="", revision=0
    ):
        raise LogCorrupt(reader.path, 0, "it tells of another pool than the files before it")
    if header.revision != start:
        raise LogCorrupt(reader.path, 0, f"it begins after revision {header.revision}")
    if start != revision:
        message = f"the changes from revision {revision} to {start}, where {reader.path} begins, are missing"
        raise StateError(message)


def fold_log(
    path: Path,
    new_manager: NewManager,
    *,
    until: int | None = None,
    on_read: OnRead = _nobody_waits,
) -> FoldedState:
    """The state at revision `until` of one log, or where that log ends; what is before it comes from its folder.

    Raises:
        StateError: as `fold_folder`, or when the log does not know that revision.
    """
    reader = LogReader(path)
    start = reader.header.revision
    manager = _before(reader, new_manager)
    if until is not None and until < start:
        message = f"{path} begins after revision {start}"
        raise StateError(message)
    _apply_all(Fold(manager), reader, until, on_read)
    return FoldedState(reader.header, manager, path, reader.frames.end, 0)


def _before(reader: LogReader, new_manager: NewManager) -> BlockManager:
    start = reader.header.revision
    if not start:
        return new_manager(reader.header)
    found = fold_folder(StateFolder(reader.path.parent), new_manager, until=start)
    if found is None or found.manager.revision != start:
        message = f"beside {reader.path} there is nothing that tells of revision {start}"
        raise StateError(message)
    return found.manager
