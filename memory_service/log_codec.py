"""Records to the payloads of the log and back.

A record and its message have the same field names, so one table says how a value of each field that is no plain number or
text is packed.
"""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
from google.protobuf.message import DecodeError

from memory_service import record as nouns
from memory_service.block_hash import split_keys
from memory_service.demand import Fork
from protos.memory.v1 import log_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from google.protobuf.message import Message

    from memory_service.demand import IntArray

_INT32: Final = np.dtype("<i4")


def encode_record(record: nouns.Record) -> bytes:
    """The payload of one record."""
    name, cls = _MESSAGES[type(record.change)]
    change = {name: _to_message(record.change, cls)}
    message = pb.LogRecord(revision=record.revision, time=record.time, **change)  # type: ignore[arg-type]
    return message.SerializeToString()


def decode_record(payload: bytes) -> nouns.Record:
    """The record of a payload; raises ValueError when this version does not know it."""
    try:
        message = pb.LogRecord.FromString(payload)
    except DecodeError as error:
        raise ValueError("a record cannot be parsed") from error
    name = message.WhichOneof("change")
    if name is None:
        raise ValueError("a record is of a kind that this version does not know")
    change = _from_message(getattr(message, name), _CHANGES[name])
    return nouns.Record(message.revision, message.time, cast("nouns.Change", change))


def _to_message(noun: object, cls: type[Message]) -> Message:
    values = {}
    for name, pack in _PACKED_FIELDS[type(noun)]:
        value = getattr(noun, name)
        values[name] = value if pack is None else pack(value)
    return cls(**values)


def _from_message(message: Message, cls: type) -> object:
    values = []
    for name, unpack in _UNPACKED_FIELDS[cls]:
        value = getattr(message, name)
        if unpack is not None:
            value = unpack(value)
        elif name in _OPTIONAL and not message.HasField(name):
            value = None
        values.append(value)
    return cls(*values)


def _pack(values: IntArray) -> bytes:
    return values.astype(_INT32, copy=False).tobytes()


def _unpack(packed: bytes) -> IntArray:
    if len(packed) % _INT32.itemsize:
        raise ValueError("packed numbers have a part too much")
    return np.frombuffer(packed, dtype=_INT32)


def _unpack_rows(packed: bytes, width: int) -> IntArray:
    if len(packed) % (width * _INT32.itemsize):
        raise ValueError(f"packed rows of {width} numbers have a part too much")
    return np.frombuffer(packed, dtype=_INT32).reshape(-1, width)


def _to_messages(nouns_: Iterable[object], cls: type[Message]) -> list[Message]:
    return [_to_message(found, cls) for found in nouns_]


def _from_messages(messages: Iterable[Message], cls: type) -> tuple[object, ...]:
    return tuple(_from_message(found, cls) for found in messages)


_MESSAGES: Final[dict[type, tuple[str, type[Message]]]] = {
    nouns.StepApplied: ("step_applied", pb.StepAppliedRecord),
    nouns.SessionOpened: ("session_opened", pb.SessionOpenedRecord),
    nouns.SessionEnded: ("session_ended", pb.SessionEndedRecord),
    nouns.WriterAttached: ("writer_attached", pb.WriterAttachedRecord),
    nouns.QuotaSet: ("quota_set", pb.QuotaSetRecord),
    nouns.Retained: ("retained", pb.RetainedRecord),
    nouns.RetentionEnded: ("retention_ended", pb.RetentionEndedRecord),
    nouns.Flushed: ("flushed", pb.FlushedRecord),
    nouns.PrefixPublished: ("prefix_published", pb.PrefixPublishedRecord),
    nouns.PrefixWithdrawn: ("prefix_withdrawn", pb.PrefixWithdrawnRecord),
}
_CHANGES: Final = {name: cls for cls, (name, _) in _MESSAGES.items()}
_OPTIONAL: Final = {"soft_blocks", "hard_blocks", "expires_at"}  # None is sent by leaving it out
_NUMBERS: Final = {"commit_rows", "commit_num_computed_tokens", "block_table", "block_ids"}
_ROWS: Final = {"seals": 3, "releases": 2, "takes": 4}
_PACKERS: Final[dict[str, Callable[[Any], Any]]] = {
    **dict.fromkeys(_NUMBERS | _ROWS.keys(), _pack),
    "keys": b"".join,
    "forks": partial(_to_messages, cls=pb.ForkRecord),
    "admissions": partial(_to_messages, cls=pb.AdmissionRecord),
}
_UNPACKERS: Final[dict[str, Callable[[Any], Any]]] = {
    **dict.fromkeys(_NUMBERS, _unpack),
    **{name: partial(_unpack_rows, width=width) for name, width in _ROWS.items()},
    "keys": split_keys,
    "forks": partial(_from_messages, cls=Fork),
    "admissions": partial(_from_messages, cls=nouns.AdmissionRecord),
}
_NOUNS: Final = (*_MESSAGES, Fork, nouns.AdmissionRecord)
_PACKED_FIELDS: Final = {
    cls: [(found.name, _PACKERS.get(found.name)) for found in fields(cls)] for cls in _NOUNS
}
_UNPACKED_FIELDS: Final = {
    cls: [(found.name, _UNPACKERS.get(found.name)) for found in fields(cls)] for cls in _NOUNS
}
