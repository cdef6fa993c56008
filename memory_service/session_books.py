"""What one session holds."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memory_service.sequence_table import SequenceTable


@dataclass(slots=True)
class SessionBooks:
    """A session's sequences, and the copies that read blocks on its behalf."""

    session_id: str
    table: SequenceTable
    generation: int = 0  # of its newest stream
    last_applied_step: int = 0
    unacknowledged_copies: deque[tuple[int, int]] = field(default_factory=deque)  # (step, source)
