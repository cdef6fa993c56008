"""What can be decided about a sequence or a block, and how it is told in a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Final

from memory_service.block_pool import EvictionCause
from memory_service.demand import RefusalReason
from memory_service.record import ReleaseReason
from memory_service.wording import counted, duration, tenant_words

if TYPE_CHECKING:
    from memory_service.demand import Shortage


class DecisionKind(Enum):
    """What was decided; the numbers are those of `quire.memory.v1`."""

    ADMITTED = 1
    REFUSED = 2
    PREEMPTED = 3
    RELEASED = 4
    EVICTED = 5


@dataclass(frozen=True, slots=True)
class Cause:
    """The sequence for whose sake something was decided."""

    sequence_id: str
    tenant: str


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision. Equal ones in a row are told as one."""

    kind: ClassVar[DecisionKind]

    @property
    def cause(self) -> Cause | None:
        """For whose sake, where that is known."""
        return None

    @property
    def num_needed_blocks(self) -> int | None:
        """Blocks that were needed, where that decided."""
        return None

    @property
    def num_available_blocks(self) -> int | None:
        """Blocks that could have been given, where that decided."""
        return None

    def is_like(self, other: Decision) -> bool:
        """Whether it is the same decision once more."""
        return self == other

    def sentence(self, *, names_cause: bool) -> str:
        """Why, with the numbers that decided; without `names_cause` nothing that tells of the cause."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Admitted(Decision):
    """A sequence came in."""

    kind = DecisionKind.ADMITTED

    num_tokens: int
    num_cached_tokens: int
    num_hit_blocks: int
    num_new_blocks: int

    def sentence(self, *, names_cause: bool) -> str:  # noqa: ARG002 -- it has no cause
        """How much was there already."""
        return (
            f"It came in with {counted(self.num_tokens, 'token')}, "
            f"{self.num_cached_tokens} of them from the prefix cache: it shares "
            f"{counted(self.num_hit_blocks, 'block')} and was given {self.num_new_blocks}."
        )


@dataclass(frozen=True, slots=True)
class Forked(Decision):
    """A sequence began as a branch of another one."""

    kind = DecisionKind.ADMITTED

    parent_id: str
    num_tokens: int

    def sentence(self, *, names_cause: bool) -> str:  # noqa: ARG002 -- its parent is of the same tenant
        """Of whom."""
        tokens = counted(self.num_tokens, "token")
        return f"It was forked from sequence {self.parent_id!r}, whose first {tokens} it shares."


@dataclass(frozen=True, slots=True)
class Refused(Decision):
    """A sequence did not get what it asked for, in this step."""

    kind = DecisionKind.REFUSED

    shortage: Shortage
    is_running: bool

    @property
    def is_counted(self) -> bool:
        """Whether its own numbers decided, not those of somebody before it."""
        return self.shortage.num_needed_blocks > 0

    @property
    def num_needed_blocks(self) -> int | None:
        """Blocks that were needed."""
        return self.shortage.num_needed_blocks if self.is_counted else None

    @property
    def num_available_blocks(self) -> int | None:
        """Blocks that could have been given."""
        return self.shortage.num_available_blocks if self.is_counted else None

    def is_like(self, other: Decision) -> bool:
        """Numbers change from step to step: the newest are told."""
        if not isinstance(other, Refused):
            return False
        return (self.shortage.reason, self.is_running, self.is_counted) == (
            other.shortage.reason,
            other.is_running,
            other.is_counted,
        )

    def sentence(self, *, names_cause: bool) -> str:  # noqa: ARG002 -- it has no cause
        """What was lacking."""
        who = "running" if self.is_running else "waiting"
        if not self.is_counted:
            return f"It stayed {who}: {_WAITS[self.shortage.reason]}."
        needed = counted(self.shortage.num_needed_blocks, "block")
        why = _LACKS[self.shortage.reason].format(self.shortage.num_available_blocks)
        return f"It needed {needed} while {who}, and {why}."


_WAITS: Final = {  # without numbers of its own
    RefusalReason.NO_BLOCKS: "somebody before it lacks blocks, and nobody overtakes",
    RefusalReason.PREFIX_IN_PROGRESS: (
        "a running sequence computes its next block just now, so it will find that one cached"
    ),
    RefusalReason.TOKEN_BUDGET: "those before it used up the tokens of the step",
    RefusalReason.OVER_QUOTA: "a sequence of its tenant before it lacks quota, and it does not overtake",
}
_LACKS: Final = {  # with them
    RefusalReason.NO_BLOCKS: "{} could be given",
    RefusalReason.OVER_QUOTA: "the hard quota of its tenant had room for {}",
    RefusalReason.LARGER_THAN_QUOTA: (
        "the hard quota of its tenant, which had room for {}, is too small for it in any case"
    ),
}


@dataclass(frozen=True, slots=True)
class Preempted(Decision):
    """A running sequence gave its blocks up."""

    kind = DecisionKind.PREEMPTED

    sequence_id: str
    shortage: Shortage | None  # of the step before: what the router preempted for

    @property
    def cause(self) -> Cause | None:
        """Who lacked blocks."""
        found = self.shortage
        return Cause(found.sequence_id, found.tenant) if found else None

    @property
    def num_needed_blocks(self) -> int | None:
        """Blocks that the cause needed."""
        return self.shortage.num_needed_blocks if self.shortage else None

    @property
    def num_available_blocks(self) -> int | None:
        """Blocks that the cause could have been given."""
        return self.shortage.num_available_blocks if self.shortage else None

    def sentence(self, *, names_cause: bool) -> str:
        """Who lacked how many."""
        if self.shortage is None:
            return "Its router gave its blocks up for more urgent sequences."
        if not names_cause:
            return "Others needed more blocks than there were, and it was the least urgent."
        is_own = self.shortage.sequence_id == self.sequence_id
        who = "It" if is_own else f"Sequence {self.shortage.sequence_id!r}"
        needed = counted(self.shortage.num_needed_blocks, "block")
        where = "within the tenant's hard quota" if self._is_quota else "in the pool"
        available = self.shortage.num_available_blocks
        return (
            f"{who} needed {needed} to go on, {available} could be given {where}, and this one was "
            "the least urgent."
        )

    @property
    def _is_quota(self) -> bool:
        return self.shortage is not None and self.shortage.reason is RefusalReason.OVER_QUOTA


@dataclass(frozen=True, slots=True)
class Released(Decision):
    """A sequence ended, not for the sake of others."""

    kind = DecisionKind.RELEASED

    reason: ReleaseReason
    age_s: float

    def sentence(self, *, names_cause: bool) -> str:  # noqa: ARG002 -- it has no cause
        """What ended it, and after how long."""
        return f"{_ENDS[self.reason]}, {duration(self.age_s)} after it came in."


_ENDS: Final = {
    ReleaseReason.UNSPECIFIED: "Its router gave it up without saying why",
    ReleaseReason.FINISHED: "It finished",
    ReleaseReason.PREEMPTED: "It was preempted",
    ReleaseReason.CANCELLED: "Its client cancelled it, went away or set a deadline that passed",
    ReleaseReason.FAILED: "It could not be run, and its router ended it with an error",
    ReleaseReason.RESUMED: "Its router resumed a lost stream and admits it again from what is cached",
    ReleaseReason.LAPSED: "Its session ended: the router left, or its lease ran out",
}


@dataclass(frozen=True, slots=True)
class Evicted(Decision):
    """A cached block was given to somebody else."""

    kind = DecisionKind.EVICTED

    eviction_cause: EvictionCause
    tenant: str
    priority: int
    idle_s: float
    taker: Cause

    @property
    def cause(self) -> Cause | None:
        """Who got the block."""
        return self.taker

    def sentence(self, *, names_cause: bool) -> str:
        """Why this block and no other."""
        why = _EVICTS[self.eviction_cause].format(tenant_words(self.tenant))
        given = f" It went to sequence {self.taker.sequence_id!r}." if names_cause else ""
        if names_cause and self.taker.tenant != self.tenant:
            given = f"{given[:-1]} of {tenant_words(self.taker.tenant)}."
        return f"{why}: idle for {duration(self.idle_s)}, priority {self.priority}.{given}"


_EVICTS: Final = {
    EvictionCause.LEAST_RECENTLY_USED: (
        "No block was free, and of the cached ones of the lowest priority this was used least recently"
    ),
    EvictionCause.OWN_SHARE: (
        "{0} needed a block beyond its share and gave up the one of its own that was used least recently"
    ),
    EvictionCause.OTHERS_SHARE: (
        "No block was free, and {0} holds more than its share: this one of its blocks was used least recently"
    ),
}
