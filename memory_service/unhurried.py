"""Long work in parts, between which the event loop answers steps."""

from __future__ import annotations

import asyncio
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

from memory_service.integrity import integrity_parts, key_parts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from memory_service.block_manager import BlockManager

ItemT = TypeVar("ItemT")
MessageT = TypeVar("MessageT")
_MESSAGES_AT_ONCE = 100


async def in_turns(parts: Iterable[Iterable[ItemT]]) -> list[ItemT]:
    """The items of all parts; whoever waits for the loop gets it between two of them."""
    found: list[ItemT] = []
    for part in parts:
        found += part
        await asyncio.sleep(0)
    return found


async def messages_in_turns(
    make: Callable[[ItemT], MessageT], items: Sequence[ItemT]
) -> list[MessageT]:
    """A message of each item; the items are values that no change touches."""
    starts = range(0, len(items), _MESSAGES_AT_ONCE)
    return await in_turns(
        [make(item) for item in items[start : start + _MESSAGES_AT_ONCE]] for start in starts
    )


async def check_in_turns(manager: BlockManager) -> list[str]:
    """What does not agree in the books, as `check_integrity` finds it."""
    return await in_turns(chain(integrity_parts(manager), key_parts(manager)))
