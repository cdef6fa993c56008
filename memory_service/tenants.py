"""Who blocks count against, and how firmly they are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from memory_service.block_hash import tenant_salt

MAX_PRIORITY: Final = 7
MAX_TENANT_CHARS: Final = 128
PUBLIC_TENANT: Final = (
    "*"  # blocks of published prefixes count against it; nobody else may be called so
)


@dataclass(slots=True, eq=False)
class Home:
    """Where the blocks of one tenant and one retention lie while they are cached: a list, least recently used first."""

    home_id: int
    tenant: Tenant
    retention_id: int = 0  # 0: none
    priority: int = 0
    num_blocks: int = 0  # used and cached ones
    num_cached: int = 0
    head: int = 0  # 0: empty
    tail: int = 0


@dataclass(slots=True, eq=False)
class Tenant:
    """One tenant's share of the pool. A block counts against it from the time it is given out until it is free."""

    name: str
    soft_blocks: int | None = None  # above it, its own blocks are evicted before those of others
    hard_blocks: int | None = None  # it never exceeds it
    num_blocks: int = 0
    num_cached: int = 0
    num_sequences: int = 0
    homes: dict[int, Home] = field(default_factory=dict)  # by retention
    salt: bytes = b""  # what separates its keys from those of all others

    def __post_init__(self) -> None:
        self.salt = tenant_salt(self.name)

    @property
    def is_bounded(self) -> bool:
        """Whether it has a quota."""
        return self.soft_blocks is not None or self.hard_blocks is not None

    @property
    def is_over_share(self) -> bool:
        """Whether its own blocks are evicted before those of others."""
        soft, hard = self.soft_blocks, self.hard_blocks
        over_soft = soft is not None and self.num_blocks > soft
        return over_soft or (hard is not None and self.num_blocks > hard)

    @property
    def is_at_limit(self) -> bool:
        """Whether it gets a block only in exchange for one of its own."""
        return self.hard_blocks is not None and self.num_blocks >= self.hard_blocks

    @property
    def is_needed(self) -> bool:
        """Whether anything is known of it that must not be forgotten."""
        return bool(self.is_bounded or self.num_blocks or self.num_sequences or len(self.homes) > 1)
