"""State folders of small pools at random."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

from pool_driver import PoolDriver

from memory_service.block_hash import BlockHasher
from memory_service.block_manager import BlockManager
from memory_service.fold import Fold
from memory_service.identity_codec import encode_identity
from memory_service.log_file import FrameWriter
from memory_service.log_header import LogHeader, PoolDescription, encode_header
from memory_service.pool_identity import PoolIdentity
from memory_service.recovery import LogReader, new_books
from memory_service.state_folder import StateFolder
from memory_service.state_store import StateStore
from quire.pool_layout import LayerGeometry

if TYPE_CHECKING:
    from pathlib import Path

    from memory_service.record import Record

IDENTITY = PoolIdentity((LayerGeometry(2, 4, 4),), "float32", 4, (0, 1), "fingerprint")
POOL = PoolDescription(encode_identity(IDENTITY), 24, IDENTITY.size_bytes(24), 4, True, False)
POOL_ID = "pool"


def open_store(path: Path, **changes: Any) -> StateStore:
    """The store of a service that starts."""
    fields = {"compact_size_bytes": 1 << 30, "history_bytes": 1 << 30, **changes}
    return StateStore(path, **fields)


def begin(store: StateStore) -> BlockManager:
    """A new pool whose changes go to `store`."""
    store.begin(POOL_ID, POOL)
    manager = BlockManager(
        POOL.num_blocks,
        POOL.block_size,
        BlockHasher(store.secret, POOL_ID.encode()),
        min_partial_tokens=1,
    )
    manager.on_record = store.append
    return manager


def recover(store: StateStore) -> BlockManager:
    """The state that `store` finds."""
    found = store.recover(new_books(store.secret))
    assert found is not None
    return found.manager


def tables(manager: BlockManager) -> dict[tuple[int, int], tuple[int, ...]]:
    """Block tables by session and row."""
    return {
        (key, row): tuple(books.table.block_table(row).tolist())
        for key, books in manager.sessions
        for row, _ in books.table.items()
    }


def fold_of(path: Path, records: list[Record]) -> BlockManager:
    """The plain fold of `records`."""
    manager = new_books(StateFolder(path).secret())(LogHeader(POOL_ID, "", 0, "", POOL))
    fold = Fold(manager)
    for record in records:
        fold.apply(record)
    return manager


def records_of(folder: StateFolder) -> list[Record]:
    """The records of all logs."""
    return [record for start in folder.logs() for _, record in LogReader(folder.log(start))]


def drive(path: Path, seed: int, num_acts: int) -> list[tuple[int, int, dict]]:
    """Random acts on a new pool in `path`; after each: the log's size, the revision, and the tables that were told."""
    told = []
    with closing(open_store(path)) as store:
        manager = begin(store)
        driver = PoolDriver(manager, seed)
        for _ in range(num_acts):
            driver.act()
            told.append((store.num_tail_bytes, manager.revision, driver.told_tables()))
    return told


def three_logs(path: Path) -> StateFolder:
    """A folder with three logs behind each other, made from one, and no snapshot."""
    drive(path, 4, 30)
    folder = StateFolder(path)
    reader = LogReader(folder.log(0))
    records = list(reader)
    header, whole = reader.header, folder.log(0).read_bytes()
    third = len(records) // 3
    ends = [records[third][0], records[2 * third][0], len(whole)]
    folder.log(0).write_bytes(whole[: ends[0]])
    for begin, end, number in ((ends[0], ends[1], third), (ends[1], ends[2], 2 * third)):
        revised = LogHeader(header.pool_id, header.epoch, number, "", header.pool)
        FrameWriter.create(folder.log(number), encode_header(revised)).close()
        with folder.log(number).open("ab") as file:
            file.write(whole[begin:end])
    return folder
