"""Where `quire up` keeps its sockets, so that other commands find them from the router's address alone."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from quire.serving import UNIX_PREFIX, StartupError

_LEFT_OVER_S = 60.0


def run_folder(router_address: str) -> Path:
    """Folder of the sockets that belong to the router at "host:port" or "unix:/path"."""
    if router_address.startswith(UNIX_PREFIX):
        name = hashlib.blake2b(router_address.encode(), digest_size=6).hexdigest()
    else:
        name = router_address.rpartition(":")[2]
    return Path(tempfile.gettempdir()) / f"quire-{os.getuid()}" / name


def memory_address(router_address: str) -> str:
    """Address of the memory service that `quire up` started for this router."""
    return f"{UNIX_PREFIX}{run_folder(router_address) / 'memory.sock'}"


def make_run_folder(router_address: str) -> Path:
    """Make the folder, for this user only; raises StartupError when somebody else made it first."""
    folder = run_folder(router_address)
    _remove_left_over(folder.parent)
    for found in (folder.parent, folder):
        found.mkdir(mode=0o700, exist_ok=True)
        status = found.lstat()
        is_private = status.st_uid == os.getuid() and not stat.S_IMODE(status.st_mode) & 0o077
        if not stat.S_ISDIR(status.st_mode) or not is_private:
            message = f"{found} belongs to another user or is open to others; remove it"
            raise StartupError(message)
    return folder


def _remove_left_over(parent: Path) -> None:
    """Remove empty folders of runs that were killed; the services of such a run took their sockets with them."""
    for found in parent.glob("*"):
        # Another `quire up` may have made its folder just now.
        with suppress(OSError):
            if time.time() - found.stat().st_mtime > _LEFT_OVER_S:
                found.rmdir()
