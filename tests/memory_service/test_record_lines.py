"""Every kind of record in words."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from memory_service import record as nouns
from memory_service.block_hash import BlockHash
from memory_service.demand import Fork
from memory_service.record_lines import kind_of, summary, time_of
from protos.memory.v1 import log_pb2


def ints(*values: object) -> np.ndarray:
    return np.array(values, dtype=np.int32)


ADMISSION = nouns.AdmissionRecord(0, 1, "s", "r", "", 5, 0, 0, ints(7), 0, b"")
STEP = (
    "2 committed, 1 sealed, 2 preempted, 1 finished, 1 forked (fork), 1 appended, 1 copied, "
    "5 admitted (s s s s ...)"
)
CASES: list[tuple[nouns.Change, str]] = [
    (
        nouns.StepApplied(
            *(1, 9, 8, ints(0, 1), ints(4, 5), ints((0, 0, 7)), b"k" * 16, b"t" * 16),
            releases=ints((2, 2), (3, 2), (4, 1)),
            forks=(Fork(0, 5, 1, "fork", "r", 4),),
            takes=ints((0, 1, 8, 0), (1, 1, 9, 7)),
            admissions=(ADMISSION,) * 5,
        ),
        f"session 1, step 9: acknowledges 8, {STEP}",
    ),
    (nouns.SessionOpened(1, "router", 64, 3), "session 1, router: generation 3, 64 rows"),
    (nouns.SessionEnded(1), "session 1"),
    (nouns.WriterAttached(2, 77, 5), "generation 2, process 77"),
    (nouns.QuotaSet("", None, 8), "tenant (none): soft none, hard 8 blocks"),
    (nouns.Retained(4, "blue", 7, None, ints(1, 2)), "r-4: 2 blocks of tenant blue, priority 7"),
    (nouns.RetentionEnded(4), "r-4"),
    (nouns.Flushed(ints(1, 2, 3)), "3 blocks"),
    (nouns.PrefixPublished(6, (BlockHash(b"k" * 16),) * 2), "p-6: 2 blocks"),
    (nouns.PrefixWithdrawn(6), "p-6"),
]


@pytest.mark.parametrize(("change", "line"), CASES, ids=lambda found: type(found).__name__)
def test_summary(change: nouns.Change, line: str) -> None:
    """What changed, with its numbers and names, in one line."""
    assert summary(change) == line


def test_kinds_are_named_as_in_the_log() -> None:
    """Every kind has a case here, and the name that it has in the log's messages."""
    fields = log_pb2.LogRecord.DESCRIPTOR.oneofs_by_name["change"].fields
    assert {type(change) for change, _ in CASES} == set(get_args(nouns.Change))
    assert [kind_of(change) for change, _ in CASES] == [found.name for found in fields]


def test_time_is_utc() -> None:
    """A record's time is told to the millisecond, in UTC."""
    assert time_of(nouns.Record(1, 0.25, nouns.SessionEnded(1))) == "1970-01-01 00:00:00.250Z"
