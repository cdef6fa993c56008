"""Records, headers and snapshots through their bytes."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from memory_service import record as nouns
from memory_service.block_hash import HASH_BYTES, BlockHash
from memory_service.demand import Fork
from memory_service.log_codec import decode_record, encode_record
from memory_service.log_header import (
    LogHeader,
    PoolDescription,
    decode_columns,
    decode_header,
    encode_columns,
    encode_header,
)
from protos.memory.v1 import log_pb2

INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TIME = st.floats(allow_nan=False)
KEYS = st.lists(st.binary(min_size=HASH_BYTES, max_size=HASH_BYTES), max_size=4)
HEADER = LogHeader(
    "pool", "epoch", 7, "0.1.0", PoolDescription(b"id", 10, 1 << 40, 16, True, False)
)


def numbers(*widths: int) -> st.SearchStrategy[np.ndarray]:
    return st.integers(0, 5).flatmap(
        lambda count: arrays.arrays(np.int32, (count, *widths), elements=INT32)
    )


FORKS = st.builds(Fork, INT32, INT32, INT32, TEXT, TEXT, INT32)
ADMISSIONS = st.builds(
    nouns.AdmissionRecord,
    *(INT32, INT32, TEXT, TEXT, TEXT, INT32, INT32, INT32, numbers(), INT32, KEYS.map(b"".join)),
)
CHANGES: dict[type, st.SearchStrategy[Any]] = {
    nouns.StepApplied: st.builds(
        nouns.StepApplied,
        *(INT32, INT64, INT64, numbers(), numbers(), numbers(3), KEYS.map(b"".join), st.binary()),
        numbers(2),
        st.lists(FORKS, max_size=3).map(tuple),
        numbers(4),
        st.lists(ADMISSIONS, max_size=3).map(tuple),
    ),
    nouns.SessionOpened: st.builds(nouns.SessionOpened, INT32, TEXT, INT32, INT64),
    nouns.SessionEnded: st.builds(nouns.SessionEnded, INT32),
    nouns.WriterAttached: st.builds(nouns.WriterAttached, INT64, INT32, INT64),
    nouns.QuotaSet: st.builds(nouns.QuotaSet, TEXT, st.none() | INT32, st.none() | INT32),
    nouns.Retained: st.builds(
        nouns.Retained, INT32, TEXT, INT32, st.none() | TIME, numbers(), INT32, INT32
    ),
    nouns.RetentionEnded: st.builds(nouns.RetentionEnded, INT32),
    nouns.Flushed: st.builds(nouns.Flushed, numbers()),
    nouns.PrefixPublished: st.builds(
        nouns.PrefixPublished, INT32, KEYS.map(lambda keys: tuple(map(BlockHash, keys)))
    ),
    nouns.PrefixWithdrawn: st.builds(nouns.PrefixWithdrawn, INT32),
}


def plain(value: Any) -> Any:
    """`value` so that equal means equal: arrays with their shape, records with their type."""
    if isinstance(value, np.ndarray):
        return value.shape, value.tolist()
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    if is_dataclass(value):
        return type(value), [plain(getattr(value, found.name)) for found in fields(value)]
    return value


def test_every_kind_is_tried() -> None:
    """The strategies here, the codec and the message know the same kinds of change."""
    kinds = {found.name for found in log_pb2.LogRecord.DESCRIPTOR.oneofs_by_name["change"].fields}
    assert set(CHANGES) == set(get_args(nouns.Change))
    assert len(kinds) == len(CHANGES)


@pytest.mark.parametrize("kind", CHANGES)
def test_record_survives(kind: type) -> None:
    """A record of any kind comes back as it was."""

    @given(st.builds(nouns.Record, INT64, TIME, CHANGES[kind]))
    def check(record: nouns.Record) -> None:
        assert plain(decode_record(encode_record(record))) == plain(record)

    check()


@pytest.mark.parametrize("cls", [*get_args(nouns.Change), Fork, nouns.AdmissionRecord])
def test_field_names_are_those_of_the_message(cls: type) -> None:
    """No field of a record is missing in its message, nor the other way round."""
    name = cls.__name__.removesuffix("Record") + "Record"
    message = log_pb2.DESCRIPTOR.message_types_by_name[name]
    assert {found.name for found in fields(cls)} == {found.name for found in message.fields}


@pytest.mark.parametrize(
    "payload",
    [
        b"\xff",
        b"",
        log_pb2.LogRecord(revision=1).SerializeToString(),
        log_pb2.LogRecord(
            step_applied=log_pb2.StepAppliedRecord(seals=b"1234")
        ).SerializeToString(),
        log_pb2.LogRecord(flushed=log_pb2.FlushedRecord(block_ids=b"123")).SerializeToString(),
        log_pb2.LogRecord(
            prefix_published=log_pb2.PrefixPublishedRecord(keys=b"short")
        ).SerializeToString(),
    ],
)
def test_unknown_record_is_refused(payload: bytes) -> None:
    """A payload that is no record of this version raises ValueError."""
    with pytest.raises(ValueError, match=r"record|packed"):
        decode_record(payload)


def test_header_survives() -> None:
    """A header comes back as it was."""
    assert decode_header(encode_header(HEADER)) == HEADER
    assert decode_header(encode_header(replace(HEADER, revision=2**40))).revision == 2**40


def test_unknown_format_version_is_named() -> None:
    """A header of a later format is refused with its version and its writer's."""
    later = log_pb2.LogHeader(format_version=2, quire_version="9.9").SerializeToString()
    with pytest.raises(ValueError, match=r"format version 2, written by quire 9\.9"):
        decode_header(later)


@given(st.dictionaries(TEXT, st.binary(max_size=50)))
def test_columns_survive(columns: dict[str, bytes]) -> None:
    """A snapshot's columns come back, and not without the last frame."""
    payloads = list(encode_columns(columns))
    assert decode_columns(payloads) == columns
    with pytest.raises(ValueError, match="no end"):
        decode_columns(payloads[:-1])
