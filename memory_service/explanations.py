"""What was decided lately about sequences and blocks, so that somebody who asks later can be told why."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeAlias

from memory_service.decisions import (
    Admitted,
    Cause,
    Decision,
    Evicted,
    Forked,
    Preempted,
    Refused,
    Released,
)
from memory_service.demand import RefusalReason
from memory_service.live_names import LiveNames
from memory_service.record import ReleaseReason, SessionEnded, StepApplied

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memory_service.block_manager import BlockManager
    from memory_service.block_pool import Eviction
    from memory_service.decisions import DecisionKind
    from memory_service.demand import Shortage, StepAnswer
    from memory_service.live_names import Ended
    from memory_service.record import Record

MAX_SEQUENCES: Final = 4096
MAX_EVICTIONS: Final = 16_384
MAX_DECISIONS: Final = 16  # about one sequence or block
_PREEMPTS: Final = {RefusalReason.NO_BLOCKS, RefusalReason.OVER_QUOTA}


@dataclass(frozen=True, slots=True)
class Explanation:
    """A decision as its reader is told of it."""

    kind: DecisionKind
    reason: str
    revision: int  # of the newest such decision
    time: float  # of it, in seconds since the epoch
    num_times: int  # in a row
    sequence_id: str
    num_needed_blocks: int | None
    num_available_blocks: int | None
    cause_sequence_id: str


@dataclass(slots=True)
class _Noted:
    """A decision and when it was taken last."""

    decision: Decision
    revision: int
    time: float
    num_times: int = 1

    def again(self, newer: _Noted) -> None:
        """It was taken once more."""
        self.decision, self.revision, self.time = newer.decision, newer.revision, newer.time
        self.num_times += newer.num_times


# Revision, time, eviction, id of the sequence that got the block. Kept as it was met: a full pool evicts for every block
# that it gives, and few of them are asked about.
_NotedEviction: TypeAlias = "tuple[int, float, Eviction, str]"


class Explanations:
    """Listens to a pool's books, and remembers a bounded number of decisions.

    Evictions lie in one ring, the newest of the whole pool. Of sequences the last ones are kept about which something
    was decided. The oldest are forgotten, so how far back one can ask depends on how much was decided since.

    Args:
        max_sequences: sequences that are remembered.
        max_evictions: evictions that are remembered.
    """

    def __init__(
        self, max_sequences: int = MAX_SEQUENCES, max_evictions: int = MAX_EVICTIONS
    ) -> None:
        self._max_sequences = max_sequences
        self._sequences: OrderedDict[tuple[str, str], list[_Noted]] = OrderedDict()
        self._evictions: deque[_NotedEviction] = deque(maxlen=max_evictions)
        self._lacking: dict[int, tuple[int, list[Shortage]]] = {}  # running ones, by session
        self._manager: BlockManager  # set when there is one to listen to
        self._names: LiveNames

    def listen_to(self, manager: BlockManager) -> None:
        """Remember what happens in these books from now on, and nothing of others."""
        self._manager, self._names = manager, LiveNames(manager)
        self._sequences.clear()
        self._evictions.clear()
        self._lacking.clear()
        manager.observers.append(self._hear)

    def answered(self, session_key: int, answer: StepAnswer) -> None:
        """What the answer to a step refused; its record, if it has one, was heard before."""
        if not answer.shortages:
            return
        rows = self._names.sessions[session_key].rows
        lacking = []
        for (row, _), shortage in zip(answer.refusals, answer.shortages, strict=True):
            is_running = row in rows
            if is_running and shortage.reason in _PREEMPTS:
                lacking.append(shortage)
            decision = Refused(shortage, is_running)
            noted = _Noted(decision, self._manager.revision, self._manager.pool.now)
            self._note(shortage.tenant, shortage.sequence_id, noted)
        self._lacking[session_key] = (answer.step, lacking)

    # What is heard

    def _hear(self, record: Record) -> None:
        change = record.change
        if isinstance(change, SessionEnded):
            self._lacking.pop(change.session_key, None)
        for ended in self._names.follow(change):
            self._note_end(record, ended)
        if isinstance(change, StepApplied):
            self._note_starts(record, change)
            if self._manager.pool.evictions:
                self._note_evictions(record, change, self._manager.pool.evictions)

    def _note_end(self, record: Record, ended: Ended) -> None:
        sequence = ended.sequence
        decision: Decision
        if ended.reason is ReleaseReason.PREEMPTED:
            shortage = self._preempted_for(record.change, sequence.tenant.name)
            decision = Preempted(sequence.sequence_id, shortage)
        else:
            decision = Released(ended.reason, max(0.0, record.time - sequence.admitted_at))
        noted = _Noted(decision, record.revision, record.time)
        self._note(sequence.tenant.name, sequence.sequence_id, noted)

    def _preempted_for(self, change: object, tenant: str) -> Shortage | None:
        """The most urgent sequence that lacked blocks in the step before: one of a quota preempts within its tenant."""
        assert isinstance(change, StepApplied)
        step, lacking = self._lacking.get(change.session_key, (0, []))
        if step != change.step - 1:
            return None
        for shortage in lacking:
            if shortage.reason is RefusalReason.OVER_QUOTA and shortage.tenant == tenant:
                return shortage
        return next((found for found in lacking if found.reason is RefusalReason.NO_BLOCKS), None)

    def _note_starts(self, record: Record, change: StepApplied) -> None:
        rows = self._names.sessions[change.session_key].rows
        for fork in change.forks:
            decision = Forked(rows[fork.src_row].sequence_id, fork.num_tokens)
            noted = _Noted(decision, record.revision, record.time)
            self._note(rows[fork.dst_row].tenant.name, fork.sequence_id, noted)
        for found in change.admissions:
            num_new_blocks = len(found.block_table) - found.num_hit_blocks
            admitted = Admitted(
                found.num_tokens, found.num_cached_tokens, found.num_hit_blocks, num_new_blocks
            )
            noted = _Noted(admitted, record.revision, record.time)
            self._note(found.tenant, found.sequence_id, noted)

    def _note(self, tenant: str, sequence_id: str, noted: _Noted) -> None:
        key = (tenant, sequence_id)
        history = self._sequences.setdefault(key, [])
        self._sequences.move_to_end(key)
        if len(self._sequences) > self._max_sequences:
            self._sequences.popitem(last=False)
        if history and history[-1].decision.is_like(noted.decision):
            history[-1].again(noted)
            return
        history.append(noted)
        del history[:-MAX_DECISIONS]

    def _note_evictions(
        self, record: Record, change: StepApplied, evictions: list[Eviction]
    ) -> None:
        rows = self._names.sessions[change.session_key].rows
        takers = dict(zip(change.takes[:, 2].tolist(), change.takes[:, 0].tolist(), strict=True))
        for admission in change.admissions:
            given = admission.block_table[admission.num_hit_blocks :].tolist()
            takers.update(dict.fromkeys(given, admission.row))
        revision, now = record.revision, record.time
        self._evictions.extend(
            (revision, now, found, rows[takers[found.block_id]].sequence_id) for found in evictions
        )

    # What is told

    def of_sequence(self, sequence_id: str, tenant: str | None) -> list[Explanation]:
        """Decisions about all sequences of this id, newest first; those of one tenant, or of all (None)."""
        found = [
            noted
            for (owner, name), history in self._sequences.items()
            if name == sequence_id and tenant in {None, owner}
            for noted in reversed(history)
        ]
        found.sort(
            key=lambda noted: -noted.revision
        )  # stable: of one revision the last stays first
        return [_explain(noted, sequence_id, tenant) for noted in found]

    def of_block(self, block_id: int, tenant: str | None) -> list[Explanation]:
        """Evictions of the block, newest first; those of what one tenant lost, or all (None)."""
        found = islice(self._evictions_of(block_id, tenant), MAX_DECISIONS)
        return [_explain(noted, "", tenant) for noted in found]

    def _evictions_of(self, block_id: int, tenant: str | None) -> Iterator[_Noted]:
        for revision, now, found, taker_id in reversed(self._evictions):
            if found.block_id == block_id and tenant in {None, found.tenant}:
                taker = Cause(taker_id, found.for_tenant)
                idle_s = max(0.0, now - found.last_used)
                decision = Evicted(found.cause, found.tenant, found.priority, idle_s, taker)
                yield _Noted(decision, revision, now)


def _explain(noted: _Noted, sequence_id: str, tenant: str | None) -> Explanation:
    decision, cause = noted.decision, noted.decision.cause
    # What another tenant's sequence needed, and might have had, is not told either.
    is_open = cause is None or tenant in {None, cause.tenant}
    return Explanation(
        decision.kind,
        decision.sentence(names_cause=is_open),
        noted.revision,
        noted.time,
        noted.num_times,
        sequence_id,
        decision.num_needed_blocks if is_open else None,
        decision.num_available_blocks if is_open else None,
        cause.sequence_id if cause and is_open else "",
    )
