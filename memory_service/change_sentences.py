"""Changes other than steps, in a sentence for people."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from memory_service.public_ids import prefix_name, retention_name
from memory_service.record import (
    Flushed,
    PrefixPublished,
    PrefixWithdrawn,
    QuotaSet,
    Retained,
    RetentionEnded,
    SessionEnded,
    SessionOpened,
    WriterAttached,
)
from memory_service.wording import counted, tenant_words

if TYPE_CHECKING:
    from memory_service.record import Change


def sentence_of(change: Change, session_id: str, *, is_known: bool) -> str:  # noqa: PLR0911 -- one for each kind
    """What happened; `is_known`: whether the session that it speaks of was there before."""
    match change:
        case SessionOpened():
            how = "was resumed by a new stream of" if is_known else "was opened with"
            what = f"generation {change.generation}" if is_known else f"{change.max_num_rows} rows"
            return f"Session {session_id!r} {how} {what}."
        case SessionEnded():
            return f"Session {session_id!r} ended; all that it held returned to the pool."
        case WriterAttached():
            return f"Compute service {change.generation} (pid {change.pid}) was let in."
        case QuotaSet():
            soft, hard = (_bound(found) for found in (change.soft_blocks, change.hard_blocks))
            return f"The quota of {tenant_words(change.tenant)} is now {soft} soft, {hard} hard."
        case Retained():
            return _retained(change)
        case RetentionEnded():
            return f"Retention {retention_name(change.retention_id)} ended."
        case Flushed():
            return f"{counted(len(change.block_ids), 'block')} left the prefix cache by a flush."
        case PrefixPublished():
            blocks = counted(len(change.keys), "block")
            return (
                f"Prefix {prefix_name(change.prefix_id)} of {blocks} is now shared by all tenants."
            )
        case PrefixWithdrawn():
            return f"Prefix {prefix_name(change.prefix_id)} is not shared any more."
    return ""


def _retained(change: Retained) -> str:
    name = retention_name(change.retention_id)
    blocks = counted(len(change.block_ids), "block")
    until = ""
    if change.expires_at is not None:
        until = time.strftime(", until %Y-%m-%d %H:%M:%S UTC", time.gmtime(change.expires_at))
    whose = tenant_words(change.tenant)
    return f"Retention {name} keeps {blocks} of {whose} at priority {change.priority}{until}."


def _bound(num_blocks: int | None) -> str:
    return "no bound" if num_blocks is None else counted(num_blocks, "block")
