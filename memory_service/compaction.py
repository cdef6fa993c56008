"""`python -m memory_service.compaction`: fold closed logs into a snapshot, in a process of its own beside the service."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from memory_service.integrity import check_integrity
from memory_service.log_file import TEMPORARY_SUFFIX, FrameWriter, StateError
from memory_service.log_header import encode_columns, encode_header
from memory_service.recovery import fold_folder, new_books
from memory_service.snapshot import export_state
from memory_service.state_folder import StateFolder
from quire import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

_LOWEST_PRIORITY: Final = 19


class CompactionProcess:
    """A process that makes the snapshot of `revision`, where the closed logs end.

    It writes a file of its own, which gets its name here: one that outlives a killed service leaves nothing that counts.
    """

    def __init__(self, folder: StateFolder, revision: int) -> None:
        self.revision = revision
        self._target = folder.snapshot(revision)
        self._temporary = self._target.with_name(
            f"{self._target.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
        )
        arguments = [str(folder.path), str(revision), str(self._temporary)]
        # Never a fork: a copy of a process with gRPC's threads stands still.
        self._process = subprocess.Popen(  # noqa: S603 -- our own module
            [sys.executable, "-m", "memory_service.compaction", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def poll(self) -> str | None:
        """None while it runs; then why there is no snapshot, or an empty text when there is one."""
        status = self._process.poll()
        if status is None:
            return None
        assert self._process.stderr is not None
        *_, last = self._process.stderr.read().decode(errors="replace").splitlines() or [""]
        self._process.stderr.close()
        if status:
            self._temporary.unlink(missing_ok=True)
            return f"status {status}, {last or 'without a word'}"
        self._temporary.rename(self._target)
        return ""

    def stop(self) -> None:
        """End it, with nothing left behind."""
        assert self._process.stderr is not None
        self._process.kill()
        self._process.wait()
        self._process.stderr.close()
        self._temporary.unlink(missing_ok=True)


def write_snapshot(folder: StateFolder, revision: int, target: Path) -> None:
    """Fold up to `revision` and write the state to `target`.

    Raises:
        StateError: when the logs do not tell that state, its books disagree, or it cannot be written.
    """
    found = fold_folder(folder, new_books(folder.secret()), until=revision)
    if found is None or found.manager.revision != revision:
        message = f"{folder.path} does not tell of revision {revision}"
        raise StateError(message)
    findings = check_integrity(found.manager)
    if findings:
        message = f"the books of revision {revision} disagree: {findings[0]}"
        raise StateError(message)
    header = replace(found.header, revision=revision, quire_version=__version__)
    writer = FrameWriter.create(target, encode_header(header))
    for payload in encode_columns(export_state(found.manager)):
        writer.append([payload])
    writer.close()


def main(arguments: Sequence[str]) -> int:
    """Write the snapshot that the arguments name: folder, revision, file; the process's exit status."""
    folder, revision, target = arguments
    os.nice(_LOWEST_PRIORITY)
    try:
        write_snapshot(StateFolder(Path(folder)), int(revision), Path(target))
    except StateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
