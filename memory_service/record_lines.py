"""Records in words: what `quire replay` lists."""

from __future__ import annotations

import re
from collections import Counter
from datetime import UTC, datetime
from functools import singledispatch
from typing import TYPE_CHECKING, Final

from memory_service.ledger import APPENDED
from memory_service.public_ids import prefix_name, retention_name
from memory_service.record import (
    Flushed,
    PrefixPublished,
    PrefixWithdrawn,
    QuotaSet,
    ReleaseReason,
    Retained,
    RetentionEnded,
    SessionEnded,
    SessionOpened,
    StepApplied,
    WriterAttached,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memory_service.record import Change, Record

_WORD: Final = re.compile(r"(?<!^)(?=[A-Z])")
_MAX_NAMES: Final = 4
_SOURCE: Final = 3  # column of a take


def kind_of(change: Change) -> str:
    """The name of its kind, as the log's messages have it."""
    return _WORD.sub("_", type(change).__name__).lower()


def time_of(record: Record) -> str:
    """When it was made, in UTC."""
    return datetime.fromtimestamp(record.time, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + "Z"


@singledispatch
def summary(change: Change) -> str:
    """What changed, in one line."""
    raise TypeError(change)


@summary.register
def _(change: StepApplied) -> str:
    return f"session {change.session_key}, step {change.step}: {', '.join(_parts(change))}"


def _parts(change: StepApplied) -> Iterator[str]:
    counts = {
        "committed": len(change.commit_rows),
        "sealed": len(change.seals),
        **Counter(ReleaseReason(reason).name.lower() for _, reason in change.releases.tolist()),
        "forked": len(change.forks),
        "appended": int((change.takes[:, _SOURCE] == APPENDED).sum()),
        "copied": int((change.takes[:, _SOURCE] != APPENDED).sum()),
        "admitted": len(change.admissions),
    }
    named = {
        "forked": [found.sequence_id for found in change.forks],
        "admitted": [found.sequence_id for found in change.admissions],
    }
    yield f"acknowledges {change.acknowledged_step}"
    for what, count in counts.items():
        if count:
            yield f"{count} {what}{_names(named.get(what, []))}"


def _names(names: list[str]) -> str:
    if not names:
        return ""
    rest = " ..." if len(names) > _MAX_NAMES else ""
    return f" ({' '.join(names[:_MAX_NAMES])}{rest})"


@summary.register
def _(change: SessionOpened) -> str:
    return (
        f"session {change.session_key}, {change.session_id}: generation {change.generation}, "
        f"{change.max_num_rows} rows"
    )


@summary.register
def _(change: SessionEnded) -> str:
    return f"session {change.session_key}"


@summary.register
def _(change: WriterAttached) -> str:
    process = f"process {change.pid}" if change.pid else "a process that cannot be seen from here"
    return f"generation {change.generation}, {process}"


@summary.register
def _(change: QuotaSet) -> str:
    soft, hard = (
        "none" if bound is None else f"{bound} blocks"
        for bound in (change.soft_blocks, change.hard_blocks)
    )
    return f"tenant {_tenant(change.tenant)}: soft {soft}, hard {hard}"


@summary.register
def _(change: Retained) -> str:
    return (
        f"{retention_name(change.retention_id)}: {len(change.block_ids)} blocks of tenant "
        f"{_tenant(change.tenant)}, priority {change.priority}"
    )


@summary.register
def _(change: RetentionEnded) -> str:
    return retention_name(change.retention_id)


@summary.register
def _(change: Flushed) -> str:
    return f"{len(change.block_ids)} blocks"


@summary.register
def _(change: PrefixPublished) -> str:
    return f"{prefix_name(change.prefix_id)}: {len(change.keys)} blocks"


@summary.register
def _(change: PrefixWithdrawn) -> str:
    return prefix_name(change.prefix_id)


def _tenant(name: str) -> str:
    return name or "(none)"
