"""A client that folds a Watch in the plainest way, to be compared with the books."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memory_service.block_manager import BlockManager
    from protos.memory.v1 import inspection_pb2 as pb

FREE, CACHED, USED, NULL = 1, 2, 3, 4


@dataclass
class NaiveWatcher:
    """What somebody knows who was told nothing but answers; `blocks` is (state, reference count) by id."""

    token: str = ""
    epoch: str = ""
    revision: int = -1
    blocks: dict[int, tuple[int, int]] = field(default_factory=dict)
    tables: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    facts: dict[tuple[str, int], tuple[str, str, str, int, int]] = field(default_factory=dict)
    computed: dict[tuple[str, int], int] = field(default_factory=dict)
    tenants: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    parts: list[pb.WatchSnapshot] = field(default_factory=list)
    num_missed: int = 0
    num_snapshots: int = 0
    num_deltas: int = 0
    must_begin: bool = True

    def disconnect(self) -> None:
        """The stream broke: a part of a snapshot counts for nothing."""
        self.parts = []

    def take(self, answer: pb.WatchResponse) -> None:
        """One more answer."""
        kind = answer.WhichOneof("content")
        if kind == "missed":
            is_same = answer.epoch == self.epoch
            assert answer.missed.last_revision == (str(self.revision) if is_same else "")
            assert not answer.resume_token
            self.must_begin, self.num_missed, self.parts = True, self.num_missed + 1, []
        elif kind == "snapshot":
            self._take_part(answer)
        else:
            assert not self.must_begin
            assert answer.epoch == self.epoch
            assert int(answer.revision) == self.revision + 1
            self._take_delta(answer.delta)
            self._arrive(answer)

    def _arrive(self, answer: pb.WatchResponse) -> None:
        self.revision, self.epoch = int(answer.revision), answer.epoch
        self.token = answer.resume_token
        assert self.token

    def _take_part(self, answer: pb.WatchResponse) -> None:
        self.parts.append(answer.snapshot)
        if not answer.snapshot.last:
            assert not answer.resume_token
            return
        parts, self.parts = self.parts, []
        runs = [run for part in parts for run in part.block_runs]
        self.blocks = {
            block_id: (run.state, run.ref_count)
            for run in runs
            for block_id in range(run.first_block_id, run.first_block_id + run.num_blocks)
        }
        assert sum(run.num_blocks for run in runs) == len(self.blocks)
        self.tables, self.computed, self.facts, self.tenants = {}, {}, {}, {}
        for part in parts:
            self._start(part.sequences)
        self._take_rest(answer.snapshot)
        self.must_begin, self.num_snapshots = False, self.num_snapshots + 1
        self._arrive(answer)

    def _start(self, sequences: Any) -> None:
        for found in sequences:
            each = found.sequence
            key = (each.session_id, each.row)
            assert key not in self.tables
            self.tables[key] = list(found.block_table)
            self.computed[key] = each.num_computed_tokens
            self.facts[key] = (
                each.sequence_id,
                each.request_id,
                each.tenant,
                each.incarnation,
                each.num_cached_tokens,
            )

    def _take_rest(self, found: pb.WatchSnapshot | pb.WatchDelta) -> None:
        self.counts = {name.name: value for name, value in found.counts.ListFields()}
        for tenant in found.tenants:
            bounds = [
                getattr(tenant, name) if tenant.HasField(name) else None
                for name in ("soft_quota_blocks", "hard_quota_blocks")
            ]
            numbers = (tenant.num_blocks, tenant.num_cached_blocks, tenant.num_sequences)
            self.tenants[tenant.tenant] = (*numbers, *bounds)
            if not any(numbers) and bounds == [None, None]:
                del self.tenants[tenant.tenant]

    def _take_delta(self, delta: pb.WatchDelta) -> None:
        self.num_deltas += 1
        session = delta.session_id
        progress = (delta.progressed_rows, delta.progressed_num_computed_tokens)
        for row, count in zip(*progress, strict=True):
            assert count >= self.computed[session, row]
            self.computed[session, row] = count
        for ended in delta.ended:
            assert self.facts[session, ended.row][0] == ended.sequence_id
            for known in (self.tables, self.computed, self.facts):
                del known[session, ended.row]
        self._start(delta.started)
        entries = (delta.table_rows, delta.table_indexes, delta.table_block_ids)
        for row, index, block_id in zip(*entries, strict=True):
            table = self.tables[session, row]
            assert index <= len(table)
            table[index : index + 1] = [block_id]
        changes = (delta.changed_block_ids, delta.changed_states, delta.changed_ref_counts)
        assert list(delta.changed_block_ids) == sorted(set(delta.changed_block_ids))
        for block_id, state, ref_count in zip(*changes, strict=True):
            self.blocks[block_id] = (state, ref_count)
        self._take_rest(delta)


def expected_of(manager: BlockManager) -> dict[str, Any]:
    """What a watcher must know, read off the books block by block."""
    pool = manager.pool
    blocks = {0: (NULL, 0)}
    for block_id in range(1, pool.num_blocks):
        ref_count = int(pool.ref_counts[block_id])
        is_used = ref_count or pool.pins[block_id]
        cached = CACHED if pool.index.is_indexed(block_id) else FREE
        blocks[block_id] = (USED if is_used else cached, ref_count)
    rows = [(books, row) for _, books in manager.sessions for row, _ in books.table.items()]
    states = [state for state, _ in blocks.values()]
    counts: dict[str, Any] = {
        "num_blocks": pool.num_blocks,
        "num_free_blocks": states.count(FREE),
        "num_cached_blocks": states.count(CACHED),
        "num_used_blocks": states.count(USED),
        "num_sequences": len(rows),
    }
    return {
        "blocks": blocks,
        "tables": {
            (books.session_id, row): books.table.block_table(row).tolist() for books, row in rows
        },
        "computed": {
            (books.session_id, row): int(books.table.num_computed[row]) for books, row in rows
        },
        "facts": {
            (books.session_id, row): (
                books.table[row].sequence_id,
                books.table[row].request_id,
                books.table[row].tenant.name,
                books.table[row].incarnation,
                books.table[row].num_cached_tokens,
            )
            for books, row in rows
        },
        "counts": {
            **{name: count for name, count in counts.items() if count},
            "num_prefix_query_tokens": str(manager.num_prefix_query_tokens),
            "num_prefix_hit_tokens": str(manager.num_prefix_hit_tokens),
            "num_evictions": str(pool.num_evictions),
        },
        "tenants": {
            name: (
                found.num_blocks,
                found.num_cached,
                found.num_sequences,
                found.soft_blocks,
                found.hard_blocks,
            )
            for name, found in pool.tenants.items()
            if found.num_blocks or found.num_sequences or found.is_bounded
        },
    }


def known_to(watcher: NaiveWatcher) -> dict[str, Any]:
    """The same, as the watcher has it."""
    names = ("blocks", "tables", "computed", "facts", "counts", "tenants")
    return {name: getattr(watcher, name) for name in names}
