"""Checks of fields that several calls have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quire.errors import FieldViolation, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from memory_service.block_manager import BlockManager
    from memory_service.demand import IntArray


def raise_if_any(violations: Iterable[FieldViolation | None]) -> None:
    """Raise InvalidRequest with those that are there."""
    found = [each for each in violations if each is not None]
    if found:
        raise InvalidRequest.of(found)


def token_array(field: str, token_ids: Sequence[int], manager: BlockManager) -> IntArray:
    """Token ids of a request, at least one; raises InvalidRequest."""
    num_slots = (manager.pool.num_blocks - 1) * manager.block_size
    if not token_ids:
        raise InvalidRequest.of([FieldViolation(field, "needs at least one token id")])
    if len(token_ids) > num_slots:
        message = f"has {len(token_ids)} token ids, the pool has {num_slots} slots"
        raise InvalidRequest.of([FieldViolation(field, message)])
    found = np.array(token_ids, dtype=np.int32)
    if found.min() < 0:
        where = int(np.flatnonzero(found < 0)[0])
        raise InvalidRequest.of([FieldViolation(f"{field}[{where}]", "is below 0")])
    return found
