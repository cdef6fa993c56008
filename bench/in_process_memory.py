"""The memory service's step without messages, for a router in the same process.

It does what the service does for a step: the lease, the books, decisions remembered, times counted. Without a state
folder neither keeps a log.
"""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

from bench.in_process_demand import demand_of, memory_answer
from compute_service.clients import AttachedPool
from memory_service.explanations import Explanations
from memory_service.metrics import StepTally
from memory_service.pool_identity import PoolIdentity
from memory_service.pool_registry import PoolRegistry
from memory_service.sessions import Sessions
from router.clients import ServedModel, SessionTerms

if TYPE_CHECKING:
    from compute_service.model_loader import LoadedModel
    from memory_service.session import Session
    from router.step import MemoryAnswer, StepPlan

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
        answer = self._sessions.apply(self._session, self._session.generation, demand_of(plan))
        self._explanations.answered(self._session.key, answer)
        self._tally.answered(answer, len(plan.admits), time.perf_counter() - started)
        return memory_answer(answer)
