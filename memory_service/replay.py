"""`quire replay`: the pool at any revision that its log knows, as `quire inspect` shows the pool of now."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.message import Message
from rich.console import Console
from rich.progress import Progress

from memory_service.block_view import BlockFilter, BlockView
from memory_service.identity_codec import decode_identity
from memory_service.inspection_messages import block_message, sequence_message, table_messages
from memory_service.log_file import StateError
from memory_service.pool import Pool
from memory_service.pool_messages import pool_message
from memory_service.pool_view import PoolView
from memory_service.record_lines import kind_of, summary, time_of
from memory_service.recovery import LogReader, fold_folder, fold_log, new_books
from memory_service.state_folder import StateFolder
from memory_service.writer_place import Writer
from protos.memory.v1 import inspection_pb2 as pb
from quire.cli import inspect_tables as tables
from quire.cli.errors import reporting_errors
from quire.cli.output import make_console, print_json, printable
from quire.errors import SequenceNotFound
from quire.inspection_settings import ReplaySettings
from quire.settings_loader import USAGE_EXIT_CODE, load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from memory_service.record import Record
    from memory_service.recovery import FoldedState, OnRead

_PATIENCE_S: Final = 2.0  # what ends sooner needs no progress bar


def main(argv: Sequence[str]) -> int:
    """Show what was asked for; the process's exit status."""
    settings = load(ReplaySettings, argv, prog="quire replay")
    if (settings.what == "sequence") != (settings.sequence_id is not None):
        print("error: quire replay: `sequence` and only it takes a sequence id", file=sys.stderr)
        return USAGE_EXIT_CODE
    with reporting_errors(str(settings.log)) as outcome:
        try:
            _list_records(settings) if settings.what == "records" else _show(settings)
        except StateError as error:
            print(f"error: {error}", file=sys.stderr)
            outcome.status = 1
    return outcome.status


# Records


def _list_records(settings: ReplaySettings) -> None:
    line_of = _json_line if settings.output == "json" else _line
    for path in _logs(settings.log):
        for _, record in LogReader(path):
            if settings.revision is not None and record.revision > settings.revision:
                return
            print(line_of(record))


def _logs(log: Path) -> list[Path]:
    """The logs that are meant, oldest first."""
    folder = StateFolder(log)
    found = [folder.log(start) for start in folder.logs()] if log.is_dir() else [log]
    if not found or not log.exists():
        message = f"there is no log at {log}"
        raise StateError(message)
    return found


def _line(record: Record) -> str:
    words = printable(summary(record.change))
    return f"{record.revision:8}  {time_of(record)}  {kind_of(record.change):16}  {words}"


def _json_line(record: Record) -> str:
    fields = {
        "revision": str(record.revision),
        "time": time_of(record),
        "kind": kind_of(record.change),
        "summary": summary(record.change),
    }
    return json.dumps(fields)


# The pool of then


def _show(settings: ReplaySettings) -> None:
    past = PastPool(_fold(settings))
    questions: dict[str, tuple[Callable[[], Any], Callable[[Console, Any], None]]] = {
        "pool": (past.pool, tables.draw_pool),
        "sequences": (past.sequences, tables.draw_sequences),
        "sequence": (lambda: past.sequence(settings.sequence_id or ""), tables.draw_sequence),
        "blocks": (past.blocks, tables.draw_blocks),
    }
    ask, draw = questions[settings.what]
    answer = ask()
    if settings.output == "json":
        print_json([answer] if isinstance(answer, Message) else answer)
    else:
        draw(make_console(), answer)


def _fold(settings: ReplaySettings) -> FoldedState:
    log, until = settings.log, settings.revision
    with _progress(_logs(log)) as on_read:
        if log.is_dir():
            books = new_books(_secret(log))
            found = fold_folder(StateFolder(log), books, until=until, on_read=on_read)
            assert found is not None
        else:
            found = fold_log(log, new_books(_secret(log.parent)), until=until, on_read=on_read)
    if until is not None and found.manager.revision != until:
        message = f"{log} ends at revision {found.manager.revision}"
        raise StateError(message)
    return found


def _secret(folder: Path) -> bytes:
    """The folder's, or none: a log that was taken elsewhere is shown all the same, only nothing could be looked up."""
    return StateFolder(folder).secret() if (folder / "secret").exists() else b""


class PastPool:
    """A folded state, asked as `quire.memory.v1.InspectionService` is. Ages are as of the last change."""

    def __init__(self, found: FoldedState) -> None:
        self._header = found.header
        self._manager = found.manager
        last_used = max(found.manager.pool.last_used)  # a snapshot does not say when it was made
        self._now = max(found.manager.pool.now, last_used)
        found.manager.clock = lambda: self._now
        self._view = PoolView(found.manager, None)

    def pool(self) -> pb.GetPoolResponse:
        """Counts of blocks."""
        header, generation = self._header, self._manager.ledger.writer[0]
        pool = Pool(
            header.pool_id,
            decode_identity(header.pool.identity),
            self._manager,
            header.pool.size_bytes,
            header.pool.in_writers_memory,
        )
        found = pool_message(self._view, pool, Writer(generation), None)
        found.epoch, found.durable = header.epoch, True
        return found

    def sequences(self) -> list[pb.Sequence]:
        """The sequences that lived, by id."""
        found = sorted(self._view.sequences(), key=lambda live: live.key)
        return [sequence_message(live, self._now) for live in found]

    def sequence(self, sequence_id: str) -> pb.GetSequenceResponse:
        """One of them with its table; raises SequenceNotFound."""
        revision = self._manager.revision
        for live in self._view.sequences():
            if live.known.sequence_id == sequence_id:
                return pb.GetSequenceResponse(
                    revision=str(revision),
                    sequence=sequence_message(live, self._now),
                    block_table=table_messages(self._manager, live),
                )
        message = f"no sequence had the id {sequence_id!r} at revision {revision}"
        raise SequenceNotFound(message)

    def blocks(self) -> list[pb.Block]:
        """All blocks, by id."""
        blocks = BlockView(self._view)
        return [
            block_message(blocks.block(block_id))
            for block_id in blocks.matches(BlockFilter()).tolist()
        ]


@contextmanager
def _progress(logs: Sequence[Path]) -> Iterator[OnRead]:
    """A bar on a terminal's stderr, once it takes long enough."""
    sizes = {path: path.stat().st_size for path in logs}
    begins = dict(zip(logs, accumulate(sizes.values(), initial=0), strict=False))
    started = time.monotonic()
    with ExitStack() as shown:
        bar = Progress(console=Console(stderr=True), transient=True)
        task = bar.add_task("folding", total=sum(sizes.values()))

        def on_read(path: Path, end: int) -> None:
            bar.update(task, completed=begins[path] + end)
            is_late = time.monotonic() - started > _PATIENCE_S
            if is_late and sys.stderr.isatty() and not bar.live.is_started:
                shown.enter_context(bar)

        yield on_read


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
