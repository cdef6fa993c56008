"""The file of the pool: where it lies, and how it is known again."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pools import folder_on_tmpfs

from memory_service.pool_bytes import POOL_FILE, create_pool_file, is_on_tmpfs, reopen_pool_file
from quire.pool_trailer import TRAILER_BYTES, WrongPoolBytesError, verify_pool_descriptor
from quire.serving import StartupError

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE_BYTES = 3 * 4096


@pytest.fixture
def on_tmpfs() -> Iterator[Path]:
    with folder_on_tmpfs() as found:
        yield found


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    if is_on_tmpfs(tmp_path):
        pytest.skip("the temporary folder of this machine is tmpfs")
    return tmp_path


def test_the_type_of_a_file_system_is_known(on_tmpfs: Path) -> None:
    """A folder below a tmpfs mount is on tmpfs, /proc is not."""
    assert is_on_tmpfs(on_tmpfs)
    assert not is_on_tmpfs(Path("/proc"))


def test_on_tmpfs_the_file_outlives_its_descriptor(on_tmpfs: Path) -> None:
    """What was written through one descriptor is read through a later one; all pages are reserved, a trailer included."""
    fd = create_pool_file(SIZE_BYTES, on_tmpfs, "pool-1")
    os.pwrite(fd, b"kept", 4096)
    status = os.fstat(fd)
    assert status.st_size == SIZE_BYTES + TRAILER_BYTES
    assert status.st_blocks * 512 >= status.st_size
    os.close(fd)
    again = reopen_pool_file(SIZE_BYTES, on_tmpfs, "pool-1")
    assert os.pread(again, 4, 4096) == b"kept"
    assert os.fstat(again).st_ino == status.st_ino
    assert not os.get_inheritable(again)
    os.close(again)


def test_on_a_disk_the_bytes_are_anonymous(on_disk: Path) -> None:
    """Nothing is written to a disk; the bytes are shared memory with the same trailer."""
    fd = create_pool_file(SIZE_BYTES, on_disk, "pool-1")
    assert list(on_disk.iterdir()) == []
    assert Path(f"/proc/self/fd/{fd}").readlink().name.startswith("memfd:quire-kv-pool")
    verify_pool_descriptor(fd, SIZE_BYTES, "pool-1")
    os.close(fd)


@pytest.mark.parametrize(
    ("size_bytes", "pool_id", "why"),
    [
        (SIZE_BYTES, "pool-2", "holds pool pool-1 of 12288 bytes, not pool-2"),
        (2 * SIZE_BYTES, "pool-1", "has 16384 bytes, not 24576 and a trailer of 4096"),
    ],
)
def test_a_file_of_another_pool_is_left_alone(
    on_tmpfs: Path, size_bytes: int, pool_id: str, why: str
) -> None:
    """A file with another id or size is refused in words, and stays as it is."""
    os.close(create_pool_file(SIZE_BYTES, on_tmpfs, "pool-1"))
    with pytest.raises(WrongPoolBytesError, match=why):
        reopen_pool_file(size_bytes, on_tmpfs, pool_id)
    os.close(reopen_pool_file(SIZE_BYTES, on_tmpfs, "pool-1"))


def test_no_file_and_half_a_file_are_refused(on_tmpfs: Path) -> None:
    """A file whose maker died before the trailer was written is as good as none."""
    with pytest.raises(WrongPoolBytesError, match=r"pool\.kv: No such file"):
        reopen_pool_file(SIZE_BYTES, on_tmpfs, "pool-1")
    (on_tmpfs / POOL_FILE).write_bytes(bytes(SIZE_BYTES + TRAILER_BYTES))
    with pytest.raises(WrongPoolBytesError, match="has no trailer of a pool"):
        reopen_pool_file(SIZE_BYTES, on_tmpfs, "pool-1")


def test_a_new_pool_does_not_cut_the_old_one_under_its_writer(on_tmpfs: Path) -> None:
    """Whoever still maps the file of an earlier pool keeps it; the name belongs to the new one."""
    old = create_pool_file(SIZE_BYTES, on_tmpfs, "pool-1")
    with mmap.mmap(old, SIZE_BYTES) as mapped:
        mapped[:4] = b"mine"
        os.close(create_pool_file(SIZE_BYTES, on_tmpfs, "pool-2"))
        assert mapped[:4] == b"mine"
    os.close(old)
    os.close(reopen_pool_file(SIZE_BYTES, on_tmpfs, "pool-2"))


def test_too_little_memory_leaves_no_file(on_tmpfs: Path) -> None:
    """A pool that does not fit is one error with its size, and nothing is left of it."""
    with pytest.raises(StartupError, match=f"cannot reserve {1 << 50} bytes"):
        create_pool_file(1 << 50, on_tmpfs, "pool-1")
    assert list(on_tmpfs.iterdir()) == []


def test_only_a_file_open_for_both_ways_is_a_pool(on_tmpfs: Path) -> None:
    """A pipe and a descriptor that cannot write are refused before anybody maps them."""
    reading, writing = os.pipe()
    with pytest.raises(WrongPoolBytesError, match="no regular file"):
        verify_pool_descriptor(reading, SIZE_BYTES, "pool-1")
    os.close(create_pool_file(SIZE_BYTES, on_tmpfs, "pool-1"))
    read_only = os.open(on_tmpfs / POOL_FILE, os.O_RDONLY)
    with pytest.raises(WrongPoolBytesError, match="not open for reading and writing"):
        verify_pool_descriptor(read_only, SIZE_BYTES, "pool-1")
    for fd in (reading, writing, read_only):
        os.close(fd)
