"""A local picture of the pool, kept up to date by the answers of a Watch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from quire.client.pool_view import (
    MirrorView,
    read_blocks,
    read_counts,
    read_sequence,
    read_tenant,
)
from quire.client.rate_window import Amounts, RateWindow
from quire.errors import BrokenContract

if TYPE_CHECKING:
    from collections.abc import Callable

    from protos.memory.v1 import inspection_pb2 as pb
    from quire.client.pool_view import MirrorCounts

DEFAULT_WINDOW_S = 10.0


class PoolMirror:
    """Folds the answers of a Watch into a picture of the pool; knows neither a connection nor a thread.

    A snapshot takes effect with its last part, a change at once. Between `missed` and the next snapshot the picture stays
    as it was. An answer that does not fit what came before raises BrokenContract, and a part of it may have been taken:
    the caller then calls `forget` and begins a new stream.

    Args:
        window_s: seconds that the rates look back.
        clock: seconds that never decrease.
    """

    def __init__(
        self, *, window_s: float = DEFAULT_WINDOW_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._window_s = window_s
        self._clock = clock
        self._parts: list[pb.WatchSnapshot] = []
        self._view: MirrorView | None = None
        self._window = RateWindow(window_s, clock())
        self._is_in_step = False  # whether the next change may be one that follows the picture
        self._resume_token = ""
        self.num_missed = 0  # times that the service said that changes were missed

    def begin_stream(self) -> str:
        """The token to begin a new stream with; parts of a snapshot that was cut off do not count any more."""
        self._parts = []
        return self._resume_token

    def forget(self) -> None:
        """Have the next stream begin with a snapshot; until it is whole the picture stays as it was."""
        self._parts, self._resume_token, self._is_in_step = [], "", False

    def take(self, answer: pb.WatchResponse) -> None:
        """Fold the next answer of the stream; raises BrokenContract when it does not fit."""
        try:
            self._take(answer)
        except (IndexError, KeyError, ValueError) as error:
            message = f"the answer at revision {answer.revision} does not fit what came before"
            raise BrokenContract(message, metadata={"revision": answer.revision}) from error
        if answer.resume_token:
            self._resume_token = answer.resume_token

    @property
    def has_view(self) -> bool:
        """Whether a first snapshot is whole."""
        return self._view is not None

    def look(self) -> MirrorView | None:
        """A copy of the picture with rates as of now; None before the first snapshot is whole."""
        found = self._view
        if found is None:
            return None
        now = self._clock()
        return MirrorView(
            found.epoch,
            found.revision,
            found.block_size,
            found.counts,
            found.states.copy(),
            found.ref_counts.copy(),
            {key: sequence.copy() for key, sequence in found.sequences.items()},
            dict(found.tenants),
            now,
            self._window.rates(now),
        )

    def _take(self, answer: pb.WatchResponse) -> None:
        kind = answer.WhichOneof("content")
        if kind == "snapshot":
            self._parts.append(answer.snapshot)
            if answer.snapshot.last:
                self._adopt(answer)
        elif kind == "delta":
            self._apply(answer)
        elif kind == "missed":
            self._parts, self._is_in_step = [], False
            self.num_missed += 1

    def _adopt(self, answer: pb.WatchResponse) -> None:
        parts, self._parts = self._parts, []
        runs = [run for part in parts for run in part.block_runs]
        states, ref_counts = read_blocks(runs, answer.snapshot.counts.num_blocks)
        now = self._clock()
        self._view = MirrorView(
            answer.epoch,
            answer.revision,
            answer.snapshot.block_size,
            read_counts(answer.snapshot.counts),
            states,
            ref_counts,
            dict(read_sequence(found, now) for part in parts for found in part.sequences),
            {found.tenant: read_tenant(found) for found in answer.snapshot.tenants},
        )
        self._window = RateWindow(self._window_s, now)
        self._is_in_step = True

    def _apply(self, answer: pb.WatchResponse) -> None:
        view, delta = self._view, answer.delta
        if view is None or not self._is_in_step or answer.epoch != view.epoch:
            message = "a change without a snapshot before it"
            raise ValueError(message)
        before, now = view.counts, self._clock()
        # In the order of a step: what it acknowledges is of the sequences that were there before it.
        num_computed = _progress(view, delta)
        for ended in delta.ended:
            del view.sequences[delta.session_id, ended.row]
        view.sequences.update(read_sequence(found, now) for found in delta.started)
        _change_tables(view, delta)
        _change_blocks(view, delta)
        for tenant in map(read_tenant, delta.tenants):
            view.tenants[tenant.name] = tenant
            if tenant.is_idle:
                del view.tenants[tenant.name]
        view.counts, view.revision = read_counts(delta.counts), answer.revision
        self._window.add(_amounts(delta, before, view.counts, num_computed), now)


def _progress(view: MirrorView, delta: pb.WatchDelta) -> int:
    total = 0
    changes = zip(delta.progressed_rows, delta.progressed_num_computed_tokens, strict=True)
    for row, num_computed_tokens in changes:
        found = view.sequences[delta.session_id, row]
        total += num_computed_tokens - found.num_computed_tokens
        found.num_computed_tokens = num_computed_tokens
    return total


def _change_tables(view: MirrorView, delta: pb.WatchDelta) -> None:
    entries = zip(delta.table_rows, delta.table_indexes, delta.table_block_ids, strict=True)
    for row, index, block_id in entries:
        table = view.sequences[delta.session_id, row].block_table
        if index == len(table):
            table.append(block_id)
        else:
            table[index] = block_id


def _change_blocks(view: MirrorView, delta: pb.WatchDelta) -> None:
    where = np.array(delta.changed_block_ids, dtype=np.int32)
    view.states[where] = np.array(delta.changed_states, dtype=np.int8)
    view.ref_counts[where] = np.array(delta.changed_ref_counts, dtype=np.int32)


def _amounts(
    delta: pb.WatchDelta, before: MirrorCounts, after: MirrorCounts, num_computed_tokens: int
) -> Amounts:
    return Amounts(
        steps=int(bool(int(delta.step or 0))),
        computed_tokens=num_computed_tokens,
        evictions=after.num_evictions - before.num_evictions,
        query_tokens=after.num_prefix_query_tokens - before.num_prefix_query_tokens,
        hit_tokens=after.num_prefix_hit_tokens - before.num_prefix_hit_tokens,
    )
