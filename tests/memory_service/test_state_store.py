"""The state folder of a service that runs: one owner, one pool, a log that stays short and knows all that was told."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pool_driver import PoolDriver
from state_folders import begin, drive, fold_of, open_store, recover, tables, three_logs

from memory_service import compaction
from memory_service.compaction import write_snapshot
from memory_service.log_file import LogUnwritable, StateError
from memory_service.recovery import fold_folder, new_books
from memory_service.snapshot import export_state
from memory_service.state_folder import StateFolder

if TYPE_CHECKING:
    from collections.abc import Callable

    from memory_service.record import Record
    from memory_service.state_store import StateStore


class Clock:
    """Seconds that pass when a test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_new_folder_is_empty(tmp_path: Path) -> None:
    """There is nothing to recover in a new folder; it is open to nobody else and keeps its secret."""
    path = tmp_path / "state"
    with closing(open_store(path)) as store:
        assert store.recover(new_books(store.secret)) is None
        secret = store.secret
    with closing(open_store(path)) as store:
        assert store.secret == secret
    assert path.stat().st_mode & 0o777 == 0o700
    assert (path / "secret").stat().st_mode & 0o777 == 0o600


def test_two_services_cannot_share_a_folder(tmp_path: Path) -> None:
    """While one holds the folder another gets an error; afterwards it is free."""
    message = "belongs to another memory service that runs"
    with closing(open_store(tmp_path)), pytest.raises(StateError, match=message):
        open_store(tmp_path)
    open_store(tmp_path).close()


def test_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    """A path through a file is refused in words."""
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match=r"cannot use .*file/state as state folder"):
        open_store(tmp_path / "file" / "state")


# New pools


def test_new_pool_begins_anew(tmp_path: Path) -> None:
    """A pool that takes the place of another one has another epoch, and nothing of the old one is left."""
    drive(tmp_path, 5, 10)
    with closing(open_store(tmp_path)) as store:
        recover(store)
        before = store.epoch
        manager = begin(store)
        assert store.epoch not in {before, ""}
        manager.open_session(1, 4, "router", 1)
    with closing(open_store(tmp_path)) as store:
        assert recover(store).revision == 1


def test_dropped_pool_leaves_nothing(tmp_path: Path) -> None:
    """After a pool is dropped there is nothing to recover."""
    drive(tmp_path, 5, 10)
    with closing(open_store(tmp_path)) as store:
        recover(store)
        store.drop()
        assert store.epoch == ""
    with closing(open_store(tmp_path)) as store:
        assert store.recover(new_books(store.secret)) is None


def test_interrupted_removal_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it removes a pool, a service leaves no part that would tell of the past at the next start."""
    folder = three_logs(tmp_path)
    removed: list[Path] = []
    unlink = Path.unlink

    def dying_unlink(path: Path, **arguments: Any) -> None:
        if removed:
            raise KeyboardInterrupt
        removed.append(path)
        unlink(path, **arguments)

    monkeypatch.setattr(Path, "unlink", dying_unlink)
    with pytest.raises(KeyboardInterrupt):
        folder.clear()
    monkeypatch.undo()
    assert len(folder.logs()) == 2
    with closing(open_store(tmp_path)) as store:
        assert store.recover(new_books(store.secret)) is None
        assert folder.logs() == []


# Compaction


def tend_until(store: StateStore, is_done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_done():
        assert time.monotonic() < deadline
        store.tend()
        time.sleep(0.02)


def test_compaction_beside_writing(tmp_path: Path) -> None:
    """However often logs are closed and folded while changes go on, the state is that of the plain fold."""
    records: list[Record] = []
    with closing(open_store(tmp_path, compact_size_bytes=4096, history_bytes=0)) as store:
        manager = begin(store)

        def keep(record: Record) -> None:
            store.append(record)
            records.append(record)

        manager.on_record = keep
        driver, folder = PoolDriver(manager, 6), StateFolder(tmp_path)
        deadline = time.monotonic() + 60
        while len(records) < 200 or not folder.bases() or folder.bases()[-1] < 100:
            assert time.monotonic() < deadline
            driver.act()
            store.tend()
            time.sleep(0.002)
        assert tables(manager) == driver.told_tables()
    assert len(folder.bases()) == 1
    with closing(open_store(tmp_path)) as store:
        found = recover(store)
    assert export_state(found) == export_state(fold_of(tmp_path, records))
    assert not list(tmp_path.glob("*.tmp"))


def test_history_is_kept_up_to_its_size(tmp_path: Path) -> None:
    """Closed logs stay for replay together with the snapshot in front of them, newest first, and no more than allowed."""
    folder = three_logs(tmp_path)
    _, middle, last = folder.logs()
    for revision in (middle, last):
        write_snapshot(folder, revision, folder.snapshot(revision))
    middle_bytes = folder.log(middle).stat().st_size + folder.snapshot(middle).stat().st_size
    folder.forget(1 << 30)
    assert (folder.logs(), folder.bases()) == ([0, middle, last], [0, middle, last])
    folder.forget(middle_bytes)
    assert (folder.logs(), folder.bases()) == ([middle, last], [middle, last])
    folder.forget(middle_bytes - 1)
    assert (folder.logs(), folder.bases()) == ([last], [last])


def test_log_grows_with_the_snapshot(tmp_path: Path) -> None:
    """A log is closed when it is longer than a quarter of the snapshot before it, however short it may be by itself."""
    folder = three_logs(tmp_path)
    last = folder.logs()[-1]
    write_snapshot(folder, last, folder.snapshot(last))
    quarter = folder.snapshot(last).stat().st_size // 4
    with closing(open_store(tmp_path, compact_size_bytes=0)) as store:
        manager = recover(store)
        manager.on_record = store.append
        while store.num_tail_bytes <= quarter:
            store.tend()
            assert folder.logs()[-1] == last
            manager.attach_writer(1, 2, 3)
        store.tend()
        assert folder.logs()[-1] == manager.revision


def test_failed_compaction_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compaction that fails stops nothing; a minute later another one is begun, though the log has not grown."""
    clock = Clock()
    with closing(open_store(tmp_path, compact_size_bytes=2048, clock=clock)) as store:
        driver, folder = PoolDriver(begin(store), 7), StateFolder(tmp_path)
        while store.num_tail_bytes <= 2048:
            driver.act()
        monkeypatch.setattr(compaction.sys, "executable", "/bin/false")
        tend_until(store, lambda: store.retry_at > clock.now)
        monkeypatch.undo()
        driver.act()
        store.tend()
        assert len(folder.logs()) == 2
        assert folder.bases() == [0]
        clock.now += 61
        tend_until(store, lambda: len(folder.bases()) == 2)


def test_compaction_of_a_corrupt_log_says_so(tmp_path: Path) -> None:
    """The process ends with status 1 and the file and offset in one line; no snapshot is made."""
    folder = three_logs(tmp_path)
    middle = folder.logs()[1]
    whole = folder.log(0).read_bytes()
    folder.log(0).write_bytes(whole[:-1] + b"?")
    target = tmp_path / "target.tmp"
    command = [sys.executable, "-m", "memory_service.compaction", str(tmp_path), str(middle)]
    done = subprocess.run(
        [*command, str(target)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {folder.log(0)} is corrupt at byte ")
    assert done.stderr.count("\n") == 1
    assert not target.exists()


def test_compaction_ends_with_the_store(tmp_path: Path) -> None:
    """Closing the store ends a compaction that runs, and leaves no unfinished file."""
    with closing(open_store(tmp_path, compact_size_bytes=512)) as store:
        driver = PoolDriver(begin(store), 8)
        while store.num_tail_bytes <= 512:
            driver.act()
        store.tend()
    assert not list(tmp_path.glob("*.tmp"))
    with closing(open_store(tmp_path, compact_size_bytes=1 << 20)) as store:
        # What that compaction left undone is begun again.
        recover(store)
        folder = StateFolder(tmp_path)
        tend_until(store, lambda: len(folder.bases()) == 2)


# Ends


def test_unwritable_log_is_told(tmp_path: Path) -> None:
    """When the log cannot grow the change that was made is not told: the manager's own caller gets the error."""
    with closing(open_store(tmp_path)) as store:
        manager = begin(store)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (store.num_tail_bytes + 5, limits[1]))
        try:
            with pytest.raises(LogUnwritable, match=r"cannot write .*log-0\.quire: File too large"):
                manager.open_session(1, 4, "router", 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        with pytest.raises(LogUnwritable):
            manager.open_session(2, 4, "router", 2)
    with closing(open_store(tmp_path)) as store:
        assert recover(store).revision == 0


_SERVE = """
import json, sys
from pathlib import Path
from pool_driver import PoolDriver
from state_folders import begin, open_store
store = open_store(Path(sys.argv[1]), compact_size_bytes=16384)
manager = begin(store)
driver = PoolDriver(manager, int(sys.argv[2]))
while True:
    driver.act()
    tables = sorted([*where, *table] for where, table in driver.told_tables().items())
    print(json.dumps([manager.revision, tables]), flush=True)
    store.tend()
"""


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kill_in_the_middle_of_serving(tmp_path: Path, seed: int) -> None:
    """Killed at any moment, compaction running or not, the folder knows at least what was told last."""
    here = Path(__file__)
    paths = os.pathsep.join(map(str, (here.parents[1] / "support", here.parents[2])))
    serving = subprocess.Popen(
        [sys.executable, "-c", _SERVE, str(tmp_path), str(seed)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert serving.stdout is not None
    with serving.stdout:
        told = [serving.stdout.readline() for _ in range(150 * seed)]
        serving.send_signal(signal.SIGKILL)
        # A line that a kill cut off was not told.
        told += [line for line in serving.stdout if line.endswith("\n")]
    serving.wait()
    revision, expected = json.loads(told[-1])
    with closing(open_store(tmp_path)) as store:
        found = recover(store)
    assert found.revision >= revision
    if found.revision == revision:
        assert sorted([*where, *table] for where, table in tables(found).items()) == expected
    past = fold_folder(StateFolder(tmp_path), new_books(b""), until=revision)
    assert past is not None
    assert sorted([*where, *table] for where, table in tables(past.manager).items()) == expected
