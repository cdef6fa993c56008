"""A pool kept in plain dictionaries, and the answers of a Watch that tell of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from protos.memory.v1 import inspection_pb2 as pb

BLOCK_SIZE = 16


@dataclass
class NaiveSequence:
    sequence_id: str
    tenant: str
    table: list[int]
    num_computed_tokens: int
    num_cached_tokens: int = 0


@dataclass
class NaivePool:
    """States and reference counts follow from the tables and from what is cached."""

    num_blocks: int
    epoch: str = "1"
    revision: int = 0
    sequences: dict[tuple[str, int], NaiveSequence] = field(default_factory=dict)
    cached: set[int] = field(default_factory=set)  # content is in the index, held or not
    quotas: dict[str, int] = field(default_factory=dict)
    num_query_tokens: int = 0
    num_hit_tokens: int = 0
    num_evictions: int = 0
    # Rows that the next change ends, with what it acknowledges of them before.
    parting: dict[int, int] = field(default_factory=dict)

    def copy(self) -> NaivePool:
        return copy.deepcopy(self)

    def ref_count(self, block_id: int) -> int:
        return sum(one.table.count(block_id) for one in self.sequences.values())

    def state(self, block_id: int) -> pb.BlockState:
        if block_id == 0:
            return pb.BLOCK_STATE_NULL
        if self.ref_count(block_id):
            return pb.BLOCK_STATE_USED
        return pb.BLOCK_STATE_CACHED if block_id in self.cached else pb.BLOCK_STATE_FREE

    def states(self) -> list[int]:
        return [self.state(block_id) for block_id in range(self.num_blocks)]

    def ref_counts(self) -> list[int]:
        return [self.ref_count(block_id) for block_id in range(self.num_blocks)]

    def blocks_in(self, state: pb.BlockState) -> list[int]:
        return [block_id for block_id, found in enumerate(self.states()) if found == state]

    def counts(self) -> pb.PoolCounts:
        return pb.PoolCounts(
            num_blocks=self.num_blocks,
            num_free_blocks=len(self.blocks_in(pb.BLOCK_STATE_FREE)),
            num_cached_blocks=len(self.blocks_in(pb.BLOCK_STATE_CACHED)),
            num_used_blocks=len(self.blocks_in(pb.BLOCK_STATE_USED)),
            num_sequences=len(self.sequences),
            num_prefix_query_tokens=str(self.num_query_tokens),
            num_prefix_hit_tokens=str(self.num_hit_tokens),
            num_evictions=str(self.num_evictions),
        )

    def tenants(self) -> dict[str, pb.Tenant]:
        names = {one.tenant for one in self.sequences.values()} | self.quotas.keys()
        return {
            name: pb.Tenant(
                tenant=name,
                num_blocks=len(
                    {
                        block_id
                        for one in self.sequences.values()
                        if one.tenant == name
                        for block_id in one.table
                    }
                ),
                num_sequences=sum(one.tenant == name for one in self.sequences.values()),
                hard_quota_blocks=self.quotas.get(name),
            )
            for name in names
        }

    def snapshot(self, num_parts: int = 1) -> list[pb.WatchResponse]:
        """The whole state in so many parts."""
        runs = [
            pb.BlockRun(first_block_id=block_id, num_blocks=1, state=state, ref_count=ref_count)
            for block_id, (state, ref_count) in enumerate(
                zip(self.states(), self.ref_counts(), strict=True)
            )
        ]
        sequences = [_watched(key, one) for key, one in self.sequences.items()]
        parts = [
            pb.WatchSnapshot(block_runs=runs[part::num_parts], sequences=sequences[part::num_parts])
            for part in range(num_parts)
        ]
        last = parts[-1]
        last.last, last.block_size = True, BLOCK_SIZE
        last.counts.CopyFrom(self.counts())
        last.tenants.extend(self.tenants().values())
        answers = [self._answer(snapshot=part) for part in parts]
        answers[-1].resume_token = self.token
        return answers

    def missed(self) -> pb.WatchResponse:
        return self._answer(missed=pb.WatchMissed(last_revision=str(self.revision)))

    @property
    def token(self) -> str:
        return f"{self.epoch}:{self.revision}"

    def change_since(
        self, before: NaivePool, session_id: str = "", step: int = 0
    ) -> pb.WatchResponse:
        """The delta that leads from `before` to this state, in which one session may have changed."""
        delta = pb.WatchDelta(session_id=session_id, step=str(step), counts=self.counts())
        _tell_sequences(delta, before, self)
        _tell_blocks(delta, before, self)
        old, new = before.tenants(), self.tenants()
        for name in old.keys() | new.keys():
            found = new.get(name, pb.Tenant(tenant=name))
            if found != old.get(name):
                delta.tenants.append(found)
        answer = self._answer(delta=delta)
        answer.resume_token = self.token
        return answer

    def _answer(
        self, **content: pb.WatchSnapshot | pb.WatchDelta | pb.WatchMissed
    ) -> pb.WatchResponse:
        return pb.WatchResponse(epoch=self.epoch, revision=str(self.revision), **content)


def _tell_sequences(delta: pb.WatchDelta, before: NaivePool, after: NaivePool) -> None:
    delta.progressed_rows.extend(after.parting)
    delta.progressed_num_computed_tokens.extend(after.parting.values())
    after.parting.clear()
    for key, old in before.sequences.items():
        new = after.sequences.get(key)
        if new is None or new.sequence_id != old.sequence_id:
            delta.ended.add(row=key[1], sequence_id=old.sequence_id, reason="finished")
            continue
        if new.num_computed_tokens != old.num_computed_tokens:
            delta.progressed_rows.append(key[1])
            delta.progressed_num_computed_tokens.append(new.num_computed_tokens)
        for index, block_id in enumerate(new.table):
            if index >= len(old.table) or old.table[index] != block_id:
                delta.table_rows.append(key[1])
                delta.table_indexes.append(index)
                delta.table_block_ids.append(block_id)
    for key, new in after.sequences.items():
        old_one = before.sequences.get(key)
        if old_one is None or old_one.sequence_id != new.sequence_id:
            delta.started.append(_watched(key, new))


def _tell_blocks(delta: pb.WatchDelta, before: NaivePool, after: NaivePool) -> None:
    old = zip(before.states(), before.ref_counts(), strict=True)
    new = zip(after.states(), after.ref_counts(), strict=True)
    for block_id, (was, found) in enumerate(zip(old, new, strict=True)):
        if was != found:
            delta.changed_block_ids.append(block_id)
            delta.changed_states.append(found[0])
            delta.changed_ref_counts.append(found[1])


def _watched(key: tuple[str, int], found: NaiveSequence) -> pb.WatchedSequence:
    sequence = pb.Sequence(
        sequence_id=found.sequence_id,
        request_id=found.sequence_id.rpartition("/")[0],
        session_id=key[0],
        row=key[1],
        num_computed_tokens=found.num_computed_tokens,
        num_cached_tokens=found.num_cached_tokens,
        num_blocks=len(found.table),
        age_seconds=3.0,
        tenant=found.tenant,
    )
    return pb.WatchedSequence(sequence=sequence, block_table=found.table)
