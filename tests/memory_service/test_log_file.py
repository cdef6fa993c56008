"""Framed files: torn tails are cut, anything else that nobody wrote is refused where it lies."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_service.log_file import (
    FrameReader,
    FrameWriter,
    LogCorrupt,
    LogUnwritable,
    StateError,
    pack_frame,
)

if TYPE_CHECKING:
    from pathlib import Path

PAYLOADS = [b"header", b"", b"first record", bytes(range(256)), b"last"]


def write_file(path: Path, payloads: list[bytes] = PAYLOADS) -> list[int]:
    """A file of these payloads; the offsets at which its frames begin, and its end."""
    writer = FrameWriter.create(path, payloads[0])
    ends = [0, writer.size_bytes]
    for payload in payloads[1:]:
        writer.append([payload])
        ends.append(writer.size_bytes)
    writer.close()
    return ends


def read_until_refused(path: Path) -> tuple[list[bytes], int | None]:
    """The payloads that were read, and the offset that was refused, if any."""
    found: list[bytes] = []
    try:
        found.extend(payload for _, payload in FrameReader(path))
    except LogCorrupt as error:
        return found, error.offset
    return found, None


@given(st.lists(st.binary(max_size=300), min_size=1))
def test_frames_come_back(tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes]) -> None:
    """Payloads are read back with the offset of each."""
    path = tmp_path_factory.mktemp("log") / "log"
    *begins, end = write_file(path, payloads)
    reader = FrameReader(path)
    assert list(reader) == list(zip(begins, payloads, strict=True))
    assert (reader.end, reader.num_torn_bytes) == (end, 0)
    assert path.stat().st_mode & 0o777 == 0o600


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    """Cut anywhere, the file has exactly the frames that are whole, and the rest is counted as torn."""
    ends = write_file(tmp_path / "log")
    whole = (tmp_path / "log").read_bytes()
    for size in range(len(whole) + 1):
        (tmp_path / "cut").write_bytes(whole[:size])
        reader = FrameReader(tmp_path / "cut")
        num_whole = sum(end <= size for end in ends[1:])
        assert [payload for _, payload in reader] == PAYLOADS[:num_whole]
        assert reader.num_torn_bytes == size - ends[num_whole]


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_flip_of_every_byte(tmp_path: Path, mask: int) -> None:
    """A changed byte anywhere in whole frames is refused, with the offset of its frame and the frames before it read."""
    ends = write_file(tmp_path / "log")
    whole = (tmp_path / "log").read_bytes()
    for at in range(len(whole)):
        (tmp_path / "flipped").write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
        frame = sum(end <= at for end in ends[1:])
        found: list[bytes] = []
        with pytest.raises(LogCorrupt) as caught:
            found.extend(payload for _, payload in FrameReader(tmp_path / "flipped"))
        assert caught.value.offset == ends[frame]
        assert f"flipped is corrupt at byte {ends[frame]}: " in str(caught.value)


def test_flip_in_a_torn_frame(tmp_path: Path) -> None:
    """A changed byte of a frame that is cut anyway is never taken in: refused there, or cut with the rest."""
    ends = write_file(tmp_path / "log")
    whole = (tmp_path / "log").read_bytes()
    for size in range(ends[-2] + 1, ends[-1]):
        for at in range(ends[-2], size):
            flipped = whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 : size]
            (tmp_path / "cut").write_bytes(flipped)
            found, refused_at = read_until_refused(tmp_path / "cut")
            assert found == PAYLOADS[:-1]
            assert refused_at in {None, ends[-2]}


def test_zeros_are_no_frames(tmp_path: Path) -> None:
    """Zeros behind the last frame, as a file system may leave them, are refused."""
    ends = write_file(tmp_path / "log")
    with (tmp_path / "log").open("ab") as file:
        file.write(bytes(100))
    with pytest.raises(LogCorrupt, match=f"at byte {ends[-1]}: the checksum of a frame's length"):
        list(FrameReader(tmp_path / "log"))


def test_resumed_file_goes_on_behind_the_cut(tmp_path: Path) -> None:
    """What is appended after a recovery follows the last whole frame."""
    ends = write_file(tmp_path / "log")
    os.truncate(tmp_path / "log", ends[-1] - 1)
    reader = FrameReader(tmp_path / "log")
    assert len(list(reader)) == len(PAYLOADS) - 1
    writer = FrameWriter.resume(tmp_path / "log", reader.end)
    writer.append([b"new", b"newer"])
    writer.close()
    found = [payload for _, payload in FrameReader(tmp_path / "log")]
    assert found == [*PAYLOADS[:-1], b"new", b"newer"]


def test_one_append_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All frames of an append go to the system in one call, whole."""
    writer = FrameWriter.create(tmp_path / "log", b"header")
    calls: list[bytes] = []

    def write(_fd: int, data: bytes) -> int:
        calls.append(data)
        return len(data)

    monkeypatch.setattr(os, "write", write)
    writer.append([b"one", b"two"])
    assert calls == [pack_frame(b"one") + pack_frame(b"two")]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that takes only a part is followed by one with the rest."""
    writer, write = FrameWriter.create(tmp_path / "log", b"header"), os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:5]))
    writer.append([b"a long payload", b"another"])
    found = [payload for _, payload in FrameReader(tmp_path / "log")]
    assert found == [b"header", b"a long payload", b"another"]


def test_no_space_is_an_error_for_good(tmp_path: Path) -> None:
    """When the disk is full the append says so, and so does every later one, though there be space again."""
    fd = os.open("/dev/full", os.O_WRONLY)
    writer = FrameWriter(tmp_path / "log", fd, 0)
    with pytest.raises(LogUnwritable, match=r"cannot write .*log: No space left on device"):
        writer.append([b"record"])
    with pytest.raises(LogUnwritable):
        writer.append([b"record"])
    assert writer.size_bytes == 0


def test_write_that_ends_within_a_frame_leaves_a_torn_tail(tmp_path: Path) -> None:
    """A file that may grow no further keeps what was written whole; the rest is cut when it is read."""
    writer = FrameWriter.create(tmp_path / "log", b"header")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (writer.size_bytes + 25, limits[1]))
    try:
        with pytest.raises(LogUnwritable, match="File too large"):
            writer.append([b"eight888", b"never whole"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    reader = FrameReader(tmp_path / "log")
    assert [payload for _, payload in reader] == [b"header", b"eight888"]
    assert reader.num_torn_bytes == 5


def test_unreadable_file_is_one_sentence(tmp_path: Path) -> None:
    """A file that is not there is told of in one line."""
    with pytest.raises(StateError, match=r"cannot read .*absent: No such file"):
        FrameReader(tmp_path / "absent")


_WRITE_FOREVER = """
import sys
from pathlib import Path
from memory_service.log_file import FrameWriter
writer = FrameWriter.create(Path(sys.argv[1]), b"header")
number = 0
while True:
    number += 1
    writer.append([b"%d" % number * 1000])
    print(number, flush=True)
"""


def test_kill_in_the_middle_of_writing(tmp_path: Path) -> None:
    """Killed at any moment, a writer leaves every frame that it told of, in order, and at most a torn tail."""
    for delay_s in (0.02, 0.05, 0.1):
        path = tmp_path / f"log-{delay_s}"
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITE_FOREVER, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(delay_s)
        writer.send_signal(signal.SIGKILL)
        told = [1, *map(int, writer.stdout.read().split("\n")[:-1])]
        writer.wait()
        writer.stdout.close()
        found = [payload for _, payload in FrameReader(path)][1:]
        assert found == [b"%d" % number * 1000 for number in range(1, len(found) + 1)]
        assert len(found) >= told[-1]
