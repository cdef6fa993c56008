"""The state folder: which files lie in it, its secret, and the lock that makes it one service's own.

    secret                     32 random bytes that key the hashes of blocks
    lock                       held for as long as the service lives
    snapshot-<revision>.quire  the whole state at that revision
    log-<revision>.quire       the changes behind that revision, up to the next log's

A log is begun before the snapshot of the same revision is made, so every snapshot has a log behind it. A new pool begins
with `log-0`, which needs no snapshot.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from typing import TYPE_CHECKING, Final

from memory_service.log_file import TEMPORARY_SUFFIX, LogUnwritable, StateError

if TYPE_CHECKING:
    from pathlib import Path

_SECRET_BYTES: Final = 32
_NAME: Final = re.compile(r"(log|snapshot)-(\d+)\.quire")


class StateFolder:
    """A state folder, by its path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # Names

    def log(self, revision: int) -> Path:
        """The log that begins after `revision`."""
        return self.path / f"log-{revision}.quire"

    def snapshot(self, revision: int) -> Path:
        """The snapshot that shows `revision`."""
        return self.path / f"snapshot-{revision}.quire"

    def logs(self) -> list[int]:
        """Revisions that logs begin after, lowest first."""
        return [revision for revision, path in self._files() if path == self.log(revision)]

    def bases(self) -> list[int]:
        """Revisions at which a fold may begin, lowest first: those of snapshots, and 0 where a new pool's log is."""
        snapshots = {revision for revision, path in self._files() if path != self.log(revision)}
        return sorted(snapshots | ({0} & {*self.logs()}))

    def num_log_bytes(self) -> int:
        """Bytes of the logs behind the newest base."""
        first = self.bases()[-1]
        return sum(self.log(start).stat().st_size for start in self.logs() if start >= first)

    def num_snapshot_bytes(self) -> int:
        """Bytes of the newest snapshot; 0 when there is none."""
        newest = self.snapshot(self.bases()[-1])
        return newest.stat().st_size if newest.exists() else 0

    def _files(self) -> list[tuple[int, Path]]:
        """All logs and snapshots with their revisions, lowest first."""
        names = (_NAME.fullmatch(found.name) for found in self.path.glob("*.quire"))
        return sorted((int(name[2]), self.path / name[0]) for name in names if name)

    # Use by a service

    def prepare(self) -> int:
        """Make the folder, lock it and tidy it up; the lock is held until the descriptor is closed.

        Raises:
            StateError: when another service holds it, or it cannot be written.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._tidy()
        except BlockingIOError as error:
            message = f"the state folder {self.path} belongs to another memory service that runs"
            raise StateError(message) from error
        except OSError as error:
            message = f"cannot use {self.path} as state folder: {error.strerror}"
            raise StateError(message) from error
        return lock

    def _tidy(self) -> None:
        for unfinished in self.path.glob(f"*{TEMPORARY_SUFFIX}"):
            unfinished.unlink(missing_ok=True)
        if self._clearing.exists():
            self.clear()

    @property
    def _clearing(self) -> Path:
        return self.path / "clearing"

    def clear(self) -> None:
        """Remove all logs and snapshots. What is interrupted, `prepare` ends: a part would tell of the past."""
        try:
            self._clearing.touch(0o600)
            for _, path in self._files():
                path.unlink()
            self._clearing.unlink()
        except OSError as error:
            message = f"cannot clear {self.path}: {error.strerror}"
            raise LogUnwritable(message) from error

    def forget(self, history_bytes: int) -> None:
        """Keep the newest base, the logs behind it, and of what is older at most `history_bytes`, newest first."""
        *older, first = self.bases()
        num_bytes = 0
        for base in reversed(older):
            between = [path for revision, path in self._files() if base <= revision < first]
            num_bytes += sum(path.stat().st_size for path in between)
            if num_bytes > history_bytes:
                break
            first = base
        for revision, path in self._files():
            if revision < first:
                path.unlink()

    # Secret

    def secret(self) -> bytes:
        """The secret; raises StateError when there is none."""
        path = self.path / "secret"
        try:
            secret = path.read_bytes()
        except OSError as error:
            message = f"cannot read {path}: {error.strerror}"
            raise StateError(message) from error
        if len(secret) != _SECRET_BYTES:
            message = f"{path} has {len(secret)} bytes, not {_SECRET_BYTES}"
            raise StateError(message)
        return secret

    def make_secret(self) -> bytes:
        """The secret, drawn when there is none; raises StateError."""
        path = self.path / "secret"
        if not path.exists():
            temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
            try:
                fd = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
                with os.fdopen(fd, "wb") as file:
                    file.write(secrets.token_bytes(_SECRET_BYTES))
                temporary.rename(path)
            except OSError as error:
                message = f"cannot write {path}: {error.strerror}"
                raise StateError(message) from error
        return self.secret()
