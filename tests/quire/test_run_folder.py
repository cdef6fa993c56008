"""The folder of `quire up`'s sockets."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

import pytest

from quire.run_folder import make_run_folder, memory_address, run_folder
from quire.serving import StartupError

if TYPE_CHECKING:
    from pathlib import Path

ADDRESS = "127.0.0.1:7071"


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_it_is_found_from_the_routers_address_alone() -> None:
    """Another command computes the same path, and nobody else may look in."""
    folder = make_run_folder(ADDRESS)
    assert folder == run_folder("127.0.0.1:7071")
    assert memory_address(ADDRESS) == f"unix:{folder}/memory.sock"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_what_killed_runs_left_is_removed() -> None:
    """An old empty folder goes; one with something in it, or a new one, stays."""
    old, used, new = (run_folder(f"127.0.0.1:{port}") for port in (1, 2, 3))
    for folder in (old, used, new):
        folder.mkdir(parents=True)
    used.parent.chmod(0o700)
    (used / "memory.sock").touch()
    for folder in (old, used):
        os.utime(folder, (0, 0))
    make_run_folder(ADDRESS)
    assert (old.exists(), used.exists(), new.exists()) == (False, True, True)


def test_a_folder_open_to_others_is_refused() -> None:
    """Somebody else could have put a socket there."""
    folder = run_folder(ADDRESS)
    folder.mkdir(parents=True)
    folder.parent.chmod(0o777)
    with pytest.raises(StartupError, match="open to others"):
        make_run_folder(ADDRESS)
