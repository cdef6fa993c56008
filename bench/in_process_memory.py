"""The memory service's step without messages, for a router in the same process.

It does what the service does for a step: the lease, the books, decisions remembered, times counted. Without a state
folder neither keeps a log.
"""

from __future__ import annotations

import secrets
import time
from array import array
from typing import TYPE_CHECKING

import numpy as np

from compute_service.clients import AttachedPool
from memory_service import demand
from memory_service.explanations import Explanations
from memory_service.metrics import StepTally
from memory_service.pool_identity import PoolIdentity
from memory_service.pool_registry import PoolRegistry
from memory_service.record import ReleaseReason
from memory_service.sessions import Sessions
from router.clients import ServedModel, SessionTerms
from router.step import Admission, MemoryAnswer, RefusalReason

if TYPE_CHECKING:
    from collections.abc import Iterable

    from compute_service.model_loader import LoadedModel
    from memory_service.session import Session
    from router.request import Sequence
    from router.step import Fork, StepPlan

# The service's own defaults.
_LEASE_TTL_S = 10.0
_MAX_NUM_ROWS = 4096
_MIN_PARTIAL_TOKENS = 4


class InProcessMemory:
    """The books, and one session with them."""

    def __init__(self, budget_bytes: int, block_size: int, max_num_rows: int) -> None:
        self.session_id = "bench"
        self._block_size = block_size
        self._max_num_rows = max_num_rows
        self.registry = PoolRegistry(
            budget_bytes,
            secret=secrets.token_bytes(32),
            min_partial_tokens=_MIN_PARTIAL_TOKENS,
        )
        self._explanations = Explanations()
        self.registry.when_books_begin(self._explanations.listen_to)
        self._sessions = Sessions(
            self.registry,
            clock=time.monotonic,
            lease_ttl_s=_LEASE_TTL_S,
            max_num_rows=_MAX_NUM_ROWS,
        )
        self._tally = StepTally()
        self._session: Session | None = None

    def attach(self, loaded: LoadedModel, descriptor_socket: str) -> AttachedPool:
        """Let the engine of this process write to a pool for `loaded`."""
        identity = PoolIdentity(
            loaded.layers,
            str(loaded.dtype).removeprefix("torch."),
            self._block_size,
            (0, 1),
            loaded.fingerprint,
        )
        attachment = self.registry.attach(identity, loaded.max_model_len)
        pool = attachment.pool
        return AttachedPool(
            pool.pool_id,
            pool.manager.pool.num_blocks,
            attachment.writer_generation,
            attachment.ticket,
            descriptor_socket,
            pool.size_bytes,
            attachment.is_warm,
        )

    async def open_session(self, model: ServedModel) -> SessionTerms:
        """Open the session."""
        manager = self.registry.pool.manager
        self._session = self._sessions.open(
            self.session_id, model.pool_id, model.writer_generation, self._max_num_rows
        )
        return SessionTerms(
            generation=self._session.generation,
            last_applied_step=self._session.last_applied_step,
            block_size=manager.block_size,
            num_blocks=manager.pool.num_blocks,
            prefix_cache_enabled=manager.prefix_cache_enabled,
            held_rows=(),
        )

    async def allocate(self, plan: StepPlan) -> MemoryAnswer:
        """Apply what `plan` demands."""
        assert self._session is not None
        started = time.perf_counter()
        answer = self._sessions.apply(self._session, self._session.generation, _demand(plan))
        self._explanations.answered(self._session.key, answer)
        self._tally.answered(answer, len(plan.admits), time.perf_counter() - started)
        return _memory_answer(answer)


def _demand(plan: StepPlan) -> demand.StepDemand:
    token_ids = b"".join(found.token_ids for found in plan.commits)
    return demand.StepDemand(
        step=plan.step,
        acknowledged_step=plan.acknowledged_step,
        commit_rows=_ints(found.row for found in plan.commits),
        commit_num_computed_tokens=_ints(found.num_computed_tokens for found in plan.commits),
        commit_token_ids=np.frombuffer(token_ids, dtype=np.int32),
        releases=tuple(found.row for found in plan.releases),
        release_reasons=tuple(ReleaseReason(found.reason.value) for found in plan.releases),
        forks=tuple(_fork_demand(found) for found in plan.forks),
        extend_rows=_ints(work.sequence.row for work in plan.extends),
        extend_starts=_ints(work.start for work in plan.extends),
        extend_num_tokens=_ints(work.num_tokens for work in plan.extends),
        admits=tuple(_admit(found) for found in plan.admits),
        admit_token_budget=plan.admit_token_budget,
        watermark_blocks=plan.watermark_blocks,
    )


def _fork_demand(fork: Fork) -> demand.Fork:
    child = fork.child
    request_id = child.request.request_id
    return demand.Fork(
        fork.parent.row,
        child.row,
        child.incarnation,
        child.sequence_id,
        request_id,
        fork.num_tokens,
    )


def _admit(sequence: Sequence) -> demand.Admit:
    return demand.Admit(
        sequence.row,
        sequence.incarnation,
        sequence.sequence_id,
        sequence.request.request_id,
        np.array(sequence.token_ids, dtype=np.int32),
        sequence.num_sequences,
        sequence.request.tenant,
    )


def _memory_answer(answer: demand.StepAnswer) -> MemoryAnswer:
    return MemoryAnswer(
        step=answer.step,
        admissions={
            found.row: Admission(
                found.num_cached_tokens, found.num_scheduled_tokens, found.block_table.tolist()
            )
            for found in answer.admissions
        },
        new_blocks=answer.new_blocks,
        forked_tables={row: table.tolist() for row, table in answer.forked_tables},
        copies=answer.copies,
        remaps=answer.remaps,
        refusals={row: RefusalReason(reason.value) for row, reason in answer.refusals},
        num_available_blocks=answer.num_available_blocks,
    )


def _ints(values: Iterable[int]) -> demand.IntArray:
    return np.array(array("i", values), dtype=np.int32)
