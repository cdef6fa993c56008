"""`quire inspect watch`: every change of the pool, a line each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.cli.memory import address_of, reporting_memory_errors
from quire.cli.output import make_console, print_json, say
from quire.client import PoolInspector

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quire import client
    from quire.inspection_settings import InspectWatchSettings


def watch(settings: InspectWatchSettings) -> int:
    """Print changes until Ctrl-C, which is how it ends well; the process's exit status."""
    console = make_console()
    with (
        reporting_memory_errors(settings, interrupted=0) as outcome,
        PoolInspector(address_of(settings)) as inspector,
        inspector.watch(resume_token=settings.resume_token) as answers,
    ):
        for answer in answers:
            if settings.output == "json":
                print_json([answer])
            elif (line := line_of(answer)) is not None:
                say(console, line)
    return outcome.status


def line_of(answer: client.WatchAnswer) -> str | None:
    """One answer of the stream in one line; None for the parts of a snapshot before the last one."""
    kind = answer.WhichOneof("content")
    if kind == "missed":
        words = [f"changes after revision {answer.missed.last_revision or '-'} were missed"]
    elif kind == "snapshot":
        if not answer.snapshot.last:
            return None
        words = list(_of_snapshot(answer.snapshot.counts))
    else:
        words = list(_of_delta(answer))
    return f"{answer.revision}  " + "; ".join(words)


def _of_snapshot(counts: client.PoolCounts) -> Iterator[str]:
    yield f"snapshot of {counts.num_blocks} blocks and {counts.num_sequences} sequences"
    yield _of_counts(counts)


def _of_delta(answer: client.WatchAnswer) -> Iterator[str]:
    delta = answer.delta
    if delta.event:
        yield delta.event
    if int(delta.step or 0):
        yield f"step {delta.step}"
    for ended in delta.ended:
        yield f"{ended.sequence_id} ended ({ended.reason})"
    for started in delta.started:
        yield f"{started.sequence.sequence_id} started with {len(started.block_table)} blocks"
    if delta.progressed_rows:
        yield f"{len(delta.progressed_rows)} rows went on"
    if delta.changed_block_ids:
        yield f"{len(delta.changed_block_ids)} blocks changed"
    if delta.evicted_block_ids:
        yield f"{len(delta.evicted_block_ids)} evicted"
    yield _of_counts(delta.counts)


def _of_counts(counts: client.PoolCounts) -> str:
    return (
        f"{counts.num_free_blocks} free, {counts.num_cached_blocks} cached, "
        f"{counts.num_used_blocks} used"
    )
