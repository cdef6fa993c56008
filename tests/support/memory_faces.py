"""The servicers of the memory service over books without bytes, called without a network."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from memory_service.block_hash import BlockHasher
from memory_service.block_manager import BlockManager
from memory_service.demand import Admit, StepDemand
from memory_service.explanations import Explanations
from memory_service.inspection_servicer import InspectionServicer
from memory_service.pool import Pool
from memory_service.pool_identity import PoolIdentity
from memory_service.watching import Watching
from quire.pool_layout import LayerGeometry

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

    from memory_service.demand import StepAnswer

SIZE = 4
NUM_ROWS = 8
IDENTITY = PoolIdentity((LayerGeometry(2, 4, 4),), "float32", SIZE, (0, 1), "fingerprint")


class Call:
    """A call's context: its metadata, a tenant for each."""

    def __init__(self, *tenants: str) -> None:
        self._tenants = tenants

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return [("user-agent", "test"), *(("quire-tenant", found) for found in self._tenants)]

    async def send_initial_metadata(self, _: object) -> None:
        """Nobody waits for it."""


@dataclass
class FixedRegistry:
    """What servicers ask of a registry."""

    pool: Pool
    writer: None = None

    @property
    def whole_pool(self) -> Pool:
        return self.pool

    def when_dropped(self, _: object) -> None:
        """It stays."""


def registry_of(manager: BlockManager) -> FixedRegistry:
    """A registry whose pool has these books."""
    num_bytes = IDENTITY.size_bytes(manager.pool.num_blocks)
    return FixedRegistry(Pool("pool-1", IDENTITY, manager, num_bytes, in_writers_memory=False))


def inspection_of(registry: Any) -> InspectionServicer:
    """The servicer of inspection, without a state folder."""
    explanations = Explanations()
    explanations.listen_to(registry.pool.manager)
    return InspectionServicer(registry, None, explanations, Watching(registry, None))


def new_manager(num_blocks: int, **options: Any) -> BlockManager:
    """Books with blocks of `SIZE`."""
    return BlockManager(num_blocks, SIZE, BlockHasher(b"secret", b"root"), **options)


def ask(method: Callable[..., Any], request: Message, *tenants: str) -> Any:
    """The answer of a servicer's method to a call of that tenant."""
    return asyncio.run(method(request, Call(*tenants)))


def ints(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int32)


class OneRouter:
    """A session that does one thing a step, and whose steps are computed at once."""

    def __init__(self, manager: BlockManager, session_id: str = "router", key: int = 1) -> None:
        self.manager = manager
        self.key = key
        self._step = 0
        manager.open_session(key, NUM_ROWS, session_id, key)

    def apply(self, **changes: Any) -> StepAnswer:
        """One step."""
        self._step += 1
        demand = StepDemand(self._step, self._step - 1, **changes)
        return self.manager.apply(self.key, demand)

    def admit(
        self, row: int, tokens: list[int], *, tenant: str = "", sequence_id: str = ""
    ) -> StepAnswer:
        """Ask for a sequence to come in."""
        name = sequence_id or f"s{row}"
        admits = (Admit(row, 1, name, f"r{row}", ints(tokens), tenant=tenant),)
        return self.apply(admits=admits, admit_token_budget=1 << 20)

    def run(
        self, row: int, tokens: list[int], *, tenant: str = "", sequence_id: str = ""
    ) -> list[int]:
        """Let a sequence in and compute all its tokens; its table."""
        answer = self.admit(row, tokens, tenant=tenant, sequence_id=sequence_id)
        (admission,) = answer.admissions
        first = admission.num_cached_tokens // SIZE * SIZE
        self.apply(
            commit_rows=ints([row]),
            commit_num_computed_tokens=ints([len(tokens)]),
            commit_token_ids=ints(tokens[first : len(tokens) // SIZE * SIZE]),
        )
        return self.manager.table(self.key).block_table(row).tolist()

    def release(self, *rows: int) -> StepAnswer:
        """Let sequences go."""
        return self.apply(releases=rows)

    def cache(self, tokens: list[int], *, tenant: str = "") -> list[int]:
        """Compute tokens and let go: their blocks."""
        table = self.run(NUM_ROWS - 1, tokens, tenant=tenant)
        self.release(NUM_ROWS - 1)
        return table
