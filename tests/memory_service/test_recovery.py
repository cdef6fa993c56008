"""A state is the fold of what was written: cut anywhere it is found, changed anywhere it is refused."""

from __future__ import annotations

import os
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from state_folders import (
    POOL,
    POOL_ID,
    drive,
    fold_of,
    open_store,
    records_of,
    recover,
    tables,
    three_logs,
)

from memory_service.compaction import write_snapshot
from memory_service.log_file import FRAME, FrameReader, FrameWriter, LogCorrupt, StateError
from memory_service.log_header import LogHeader, encode_header
from memory_service.record import Record, SessionEnded, SessionOpened
from memory_service.recovery import fold_folder, new_books
from memory_service.snapshot import export_state
from memory_service.state_folder import StateFolder
from protos.memory.v1 import log_pb2

if TYPE_CHECKING:
    from pathlib import Path


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10**6))
def test_crash_at_every_write_point(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Cut anywhere, the log gives a state that knows every answer whose write was complete, with its tables."""
    path = tmp_path_factory.mktemp("state")
    told = drive(path, seed, 30)
    folder = StateFolder(path)
    whole, records = folder.log(0).read_bytes(), records_of(folder)
    tables_at = {revision: found for _, revision, found in told}
    *begins, end = [offset for offset, _ in FrameReader(folder.log(0))] + [len(whole)]
    cuts = {
        begin + inside
        for begin, after in zip(begins[1:], [*begins[2:], end], strict=True)
        for inside in (0, 1, FRAME.size, FRAME.size + 1, after - begin - 1)
    }
    for cut in sorted(cuts | {end}):
        folder.log(0).write_bytes(whole[:cut])
        with closing(open_store(path)) as store:
            found = recover(store)
        num_whole = sum(after <= cut for after in [*begins[2:], end])
        assert found.revision == num_whole
        assert found.revision >= max((rev for size, rev, _ in told if size <= cut), default=0)
        assert tables(found) == tables_at.get(found.revision, {})
        expected = fold_of(path, records[:num_whole])
        assert export_state(found) == export_state(expected)


def test_service_goes_on_behind_a_torn_tail(tmp_path: Path) -> None:
    """After a cut the log goes on with the next revision, and all of it is found at the next start."""
    drive(tmp_path, 1, 20)
    log = StateFolder(tmp_path).log(0)
    os.truncate(log, log.stat().st_size - 3)
    with closing(open_store(tmp_path)) as store:
        manager = recover(store)
        manager.on_record = store.append
        manager.open_session(99, 4, "another", 99)
        expected, epoch = export_state(manager), store.epoch
    with closing(open_store(tmp_path)) as store:
        assert export_state(recover(store)) == expected
        assert store.epoch == epoch


def test_cut_bytes_are_counted(tmp_path: Path) -> None:
    """Recovery says how many bytes of a torn tail it cut."""
    drive(tmp_path, 2, 20)
    log = StateFolder(tmp_path).log(0)
    with log.open("ab") as file:
        file.write(b"1234567")
    found = fold_folder(StateFolder(tmp_path), new_books(b""))
    assert found is not None
    assert found.num_torn_bytes == 7


# Refusals


@pytest.mark.parametrize("mask", [0x01, 0xFF])
def test_flipped_byte_is_refused_where_it_lies(tmp_path: Path, mask: int) -> None:
    """Whatever byte of the log is changed, the service refuses to start and names the file and the frame's offset."""
    drive(tmp_path, 3, 5)
    log = StateFolder(tmp_path).log(0)
    whole = log.read_bytes()
    begins = [offset for offset, _ in FrameReader(log)]
    for at in range(len(whole)):
        log.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
        offset = max(begin for begin in begins if begin <= at)
        message = rf"log-0\.quire is corrupt at byte {offset}: "
        with closing(open_store(tmp_path)) as store, pytest.raises(LogCorrupt, match=message):
            store.recover(new_books(store.secret))
        assert log.stat().st_size == len(whole)


def test_record_that_cannot_follow_is_refused(tmp_path: Path) -> None:
    """Whole frames that disagree with the state before them are refused with their offset."""
    with closing(open_store(tmp_path)) as store:
        store.begin(POOL_ID, POOL)
        store.append(Record(1, 1.0, SessionOpened(1, "a", 4, 1)))
        offset = store.num_tail_bytes
        store.append(Record(2, 1.0, SessionEnded(7)))
        store.append(Record(3, 1.0, SessionEnded(1)))
    message = f"at byte {offset}: revision 2 does not fit"
    with closing(open_store(tmp_path)) as store, pytest.raises(LogCorrupt, match=message):
        store.recover(new_books(store.secret))


def test_unknown_format_version_is_refused_by_name(tmp_path: Path) -> None:
    """A log of a later version is not read, and the sentence says which version wrote it."""
    with closing(open_store(tmp_path)) as store:
        later = log_pb2.LogHeader(format_version=7, quire_version="9.9").SerializeToString()
        FrameWriter.create(tmp_path / "log-0.quire", later).close()
        with pytest.raises(StateError, match=r"log-0\.quire: .* version 7, written by quire 9\.9"):
            store.recover(new_books(store.secret))


def test_logs_follow_each_other(tmp_path: Path) -> None:
    """A state is folded through all logs behind its snapshot."""
    folder = three_logs(tmp_path)
    found = fold_folder(folder, new_books(folder.secret()))
    assert found is not None
    expected = fold_of(tmp_path, records_of(folder))
    assert export_state(found.manager) == export_state(expected)


def test_any_past_revision_is_found(tmp_path: Path) -> None:
    """A fold up to a revision is the state of then, whichever snapshot it begins with."""
    folder = three_logs(tmp_path)
    _, middle, last = folder.logs()
    write_snapshot(folder, middle, folder.snapshot(middle))
    records = records_of(folder)
    for revision in (1, middle - 1, middle, middle + 1, last, len(records)):
        found = fold_folder(folder, new_books(folder.secret()), until=revision)
        assert found is not None
        assert export_state(found.manager) == export_state(fold_of(tmp_path, records[:revision]))


def test_past_before_a_corrupt_byte_is_found(tmp_path: Path) -> None:
    """Whatever stands behind a revision does not keep it from being shown."""
    folder = three_logs(tmp_path)
    records, last = records_of(folder), folder.logs()[-1]
    offsets = [offset for offset, _ in FrameReader(folder.log(last))]
    whole = folder.log(last).read_bytes()
    for which, offset in enumerate(offsets[1:]):
        flipped = bytes([whole[offset] ^ 1])
        folder.log(last).write_bytes(whole[:offset] + flipped + whole[offset + 1 :])
        books = new_books(folder.secret())
        found = fold_folder(folder, books, until=last + which)
        assert found is not None
        expected = fold_of(tmp_path, records[: last + which])
        assert export_state(found.manager) == export_state(expected)
        with pytest.raises(LogCorrupt, match=f"at byte {offset}: "):
            fold_folder(folder, books)


@pytest.mark.parametrize("which", [0, 1])
def test_missing_log_is_refused(tmp_path: Path, which: int) -> None:
    """When a log in the middle, or the first, is not there, the service refuses to start."""
    folder = three_logs(tmp_path)
    folder.log(folder.logs()[which]).unlink()
    with pytest.raises(StateError, match="missing"):
        fold_folder(folder, new_books(folder.secret()))


def test_snapshot_without_its_log_is_refused(tmp_path: Path) -> None:
    """The log that begins at a snapshot is begun before it, so its absence is a loss."""
    folder = three_logs(tmp_path)
    last = folder.logs()[-1]
    write_snapshot(folder, last, folder.snapshot(last))
    folder.log(last).unlink()
    with pytest.raises(StateError, match=rf"log-{last}\.quire is missing"):
        fold_folder(folder, new_books(folder.secret()))


def test_closed_log_with_a_torn_tail_is_refused(tmp_path: Path) -> None:
    """Only the last log may end within a frame."""
    folder = three_logs(tmp_path)
    with folder.log(0).open("ab") as file:
        file.write(b"123")
    with pytest.raises(LogCorrupt, match="ends within a frame, though another log follows"):
        fold_folder(folder, new_books(folder.secret()))


def test_log_of_another_epoch_is_refused(tmp_path: Path) -> None:
    """Logs that tell of different pools are not folded together."""
    folder = three_logs(tmp_path)
    last = folder.logs()[-1]
    strange = LogHeader(POOL_ID, "another", last, "", POOL)
    FrameWriter.create(folder.log(last), encode_header(strange)).close()
    with pytest.raises(LogCorrupt, match="tells of another pool"):
        fold_folder(folder, new_books(folder.secret()))


def test_corrupt_snapshot_is_passed_over(tmp_path: Path) -> None:
    """While older files tell the same state a corrupt snapshot is not needed; without them it is refused."""
    folder = three_logs(tmp_path)
    expected = export_state(fold_of(tmp_path, records_of(folder)))
    last = folder.logs()[-1]
    write_snapshot(folder, last, folder.snapshot(last))
    whole = folder.snapshot(last).read_bytes()
    folder.snapshot(last).write_bytes(whole[:-5] + b"?" + whole[-4:])
    found = fold_folder(folder, new_books(folder.secret()))
    assert found is not None
    assert export_state(found.manager) == expected
    folder.log(0).unlink()
    with pytest.raises(LogCorrupt, match=rf"snapshot-{last}\.quire is corrupt at byte"):
        fold_folder(folder, new_books(folder.secret()))


def test_snapshot_that_is_cut_is_refused(tmp_path: Path) -> None:
    """A snapshot has an end; one that lacks it, at whatever byte, is none."""
    folder = three_logs(tmp_path)
    last = folder.logs()[-1]
    write_snapshot(folder, last, folder.snapshot(last))
    folder.log(0).unlink()
    whole = folder.snapshot(last).read_bytes()
    for size in range(0, len(whole), 7):
        folder.snapshot(last).write_bytes(whole[:size])
        with pytest.raises(LogCorrupt, match=rf"snapshot-{last}\.quire is corrupt at byte"):
            fold_folder(folder, new_books(folder.secret()))
