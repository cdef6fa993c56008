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
            else:
                say(console, line_of(answer))
    return outcome.status


def line_of(answer: client.WatchAnswer) -> str:
    """One answer of the stream in one line."""
    kind = answer.WhichOneof("content")
    if kind == "missed":
        words = [f"changes after revision {answer.missed.last_revision or '-'} were missed"]
    elif kind == "snapshot":
        words = list(_of_snapshot(answer))
    else:
        words = list(_of_delta(answer))
    return f"{answer.revision}  " + "; ".join(words)


def _of_snapshot(answer: client.WatchAnswer) -> Iterator[str]:
    part = answer.snapshot
    num_blocks = sum(run.num_blocks for run in part.block_runs)
    yield f"snapshot of {num_blocks} blocks and {len(part.sequences)} sequences"
    if part.last:
        yield _of_counts(answer.snapshot.counts)


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
