"""What watchers send, as messages of `quire.memory.v1`; and the token that resumes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from memory_service.inspection_messages import timestamp
from memory_service.record import ReleaseReason
from memory_service.watch_hub import ResumePoint
from protos.memory.v1 import inspection_pb2 as pb
from quire.errors import FieldViolation, InvalidRequest

if TYPE_CHECKING:
    from memory_service.watch_snapshot import Snapshot, SnapshotPart
    from memory_service.watched_change import (
        WatchedChange,
        WatchedCounts,
        WatchedEnd,
        WatchedSequence,
        WatchedStep,
        WatchedTenant,
    )

_MAX_DIGITS: Final = 18  # those of an int64
_REASONS: Final = {reason: reason.name.lower() for reason in ReleaseReason}


def resume_token(epoch: str, revision: int) -> str:
    """What a watcher says to go on after `revision`."""
    return f"{epoch}:{revision}"


def parse_resume_token(token: str) -> ResumePoint | None:
    """What a token means, None for none; raises InvalidRequest for one that was never given."""
    if not token:
        return None
    epoch, _, revision = token.rpartition(":")
    is_number = revision.isascii() and revision.isdecimal() and len(revision) <= _MAX_DIGITS
    if not epoch or not is_number:
        violation = FieldViolation("resume_token", "was not given by this service")
        raise InvalidRequest.of([violation])
    return ResumePoint(epoch, int(revision))


class WatchMessages:
    """Makes the answers of Watch."""

    def of_change(self, epoch: str, change: WatchedChange) -> pb.WatchResponse:
        """One change."""
        return pb.WatchResponse(
            epoch=epoch,
            revision=str(change.revision),
            resume_token=resume_token(epoch, change.revision),
            delta=_delta(change),
        )

    def of_part(self, epoch: str, snapshot: Snapshot, part: SnapshotPart) -> pb.WatchResponse:
        """A part of a snapshot; the last one can be resumed from."""
        found = pb.WatchSnapshot(
            block_runs=[
                pb.BlockRun(
                    first_block_id=first,
                    num_blocks=num_blocks,
                    state=pb.BlockState.ValueType(state),
                    ref_count=ref_count,
                )
                for first, num_blocks, state, ref_count in part.block_runs
            ],
            sequences=[_sequence(found) for found in part.sequences],
        )
        if part.is_last:
            found.MergeFrom(_last_part(snapshot))
        token = resume_token(epoch, snapshot.revision) if part.is_last else ""
        return pb.WatchResponse(
            epoch=epoch, revision=str(snapshot.revision), resume_token=token, snapshot=found
        )

    def of_missed(self, epoch: str, last_revision: int | None) -> pb.WatchResponse:
        """Changes were missed. It cannot be resumed from: the state that follows is not there yet."""
        last = "" if last_revision is None else str(last_revision)
        missed = pb.WatchMissed(last_revision=last)
        return pb.WatchResponse(epoch=epoch, revision=last, missed=missed)


def _last_part(snapshot: Snapshot) -> pb.WatchSnapshot:
    return pb.WatchSnapshot(
        counts=_counts(snapshot.counts),
        tenants=[_tenant(found) for found in snapshot.tenants],
        last=True,
        block_size=snapshot.block_size,
    )


def _delta(change: WatchedChange) -> pb.WatchDelta:
    found = pb.WatchDelta(
        time=timestamp(change.time),
        session_id=change.session_id,
        step="0",
        ended=[_ended(each) for each in change.ended],
        changed_block_ids=change.changed_block_ids.tolist(),
        changed_states=change.changed_states.tolist(),
        changed_ref_counts=change.changed_ref_counts.tolist(),
        evicted_block_ids=change.evicted_block_ids,
        counts=_counts(change.counts),
        tenants=[_tenant(each) for each in change.tenants],
        event=change.event,
    )
    if change.step is not None:
        _add_step(found, change.step)
    return found


def _add_step(delta: pb.WatchDelta, step: WatchedStep) -> None:
    delta.step = str(step.number)
    delta.started.extend(_sequence(each) for each in step.started)
    delta.progressed_rows.extend(step.progressed_rows.tolist())
    delta.progressed_num_computed_tokens.extend(step.progressed_num_computed.tolist())
    delta.table_rows.extend(row for row, _, _ in step.table_changes)
    delta.table_indexes.extend(index for _, index, _ in step.table_changes)
    delta.table_block_ids.extend(block_id for _, _, block_id in step.table_changes)


def _ended(found: WatchedEnd) -> pb.EndedSequence:
    return pb.EndedSequence(
        row=found.row, sequence_id=found.sequence_id, reason=_REASONS[found.reason]
    )


def _sequence(found: WatchedSequence) -> pb.WatchedSequence:
    return pb.WatchedSequence(
        sequence=pb.Sequence(
            sequence_id=found.sequence_id,
            request_id=found.request_id,
            session_id=found.session_id,
            row=found.row,
            incarnation=found.incarnation,
            num_computed_tokens=found.num_computed_tokens,
            num_cached_tokens=found.num_cached_tokens,
            num_blocks=len(found.block_table),
            age_seconds=found.age_s,
            tenant=found.tenant,
        ),
        block_table=found.block_table.tolist(),
    )


def _counts(found: WatchedCounts) -> pb.PoolCounts:
    return pb.PoolCounts(
        num_blocks=found.num_blocks,
        num_free_blocks=found.num_free_blocks,
        num_cached_blocks=found.num_cached_blocks,
        num_used_blocks=found.num_used_blocks,
        num_sequences=found.num_sequences,
        num_prefix_query_tokens=str(found.num_query_tokens),
        num_prefix_hit_tokens=str(found.num_hit_tokens),
        num_evictions=str(found.num_evictions),
    )


def _tenant(found: WatchedTenant) -> pb.Tenant:
    return pb.Tenant(
        tenant=found.name,
        num_blocks=found.num_blocks,
        num_cached_blocks=found.num_cached_blocks,
        num_sequences=found.num_sequences,
        soft_quota_blocks=found.soft_blocks,
        hard_quota_blocks=found.hard_blocks,
    )
