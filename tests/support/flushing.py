"""A flush from its plan to its end, as the service makes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memory_service.sharing import FlushOutcome

if TYPE_CHECKING:
    from memory_service.block_manager import BlockManager
    from memory_service.demand import IntArray


def flush(manager: BlockManager, tenant: str, token_ids: IntArray) -> FlushOutcome:
    """What all parts of it forgot."""
    plan = manager.sharing.plan_flush(tenant, token_ids)
    num_freed = num_used = 0
    while True:
        part = manager.sharing.flush_part(plan)
        num_freed += part.num_freed
        num_used += part.num_used
        if part.is_done:
            return FlushOutcome(num_freed, num_used)
