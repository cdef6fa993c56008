"""Headers and snapshots to the payloads of the state folder and back.

A payload that says nothing this version knows raises ValueError; the caller knows the file and the offset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError

from protos.memory.v1 import log_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

FORMAT_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class PoolDescription:
    """What a restarted service needs to know of its pool."""

    identity: bytes  # the serialised quire.memory.v1.PoolIdentity
    num_blocks: int
    size_bytes: int
    block_size: int
    prefix_cache_enabled: bool
    in_writers_memory: bool


@dataclass(frozen=True, slots=True)
class LogHeader:
    """What every file of the state folder begins with."""

    pool_id: str
    epoch: str
    revision: int  # that a log begins after, or that a snapshot shows
    quire_version: str
    pool: PoolDescription


def encode_header(header: LogHeader) -> bytes:
    """The payload of a file's first frame."""
    pool = header.pool
    return pb.LogHeader(
        format_version=FORMAT_VERSION,
        pool_id=header.pool_id,
        epoch=header.epoch,
        revision=header.revision,
        quire_version=header.quire_version,
        pool=pb.PoolDescription(
            identity=pool.identity,
            num_blocks=pool.num_blocks,
            size_bytes=pool.size_bytes,
            block_size=pool.block_size,
            prefix_cache_enabled=pool.prefix_cache_enabled,
            in_writers_memory=pool.in_writers_memory,
        ),
    ).SerializeToString()


def decode_header(payload: bytes) -> LogHeader:
    """The header; raises ValueError, with the version in it, for a format that this version does not read."""
    try:
        message = pb.LogHeader.FromString(payload)
    except DecodeError as error:
        raise ValueError("the header cannot be parsed") from error
    if message.format_version != FORMAT_VERSION:
        raise ValueError(
            f"it has format version {message.format_version}, written by quire "
            f"{message.quire_version or 'of unknown version'}; this one reads version {FORMAT_VERSION}"
        )
    return LogHeader(
        message.pool_id,
        message.epoch,
        message.revision,
        message.quire_version,
        _description(message.pool),
    )


def _description(pool: pb.PoolDescription) -> PoolDescription:
    return PoolDescription(
        pool.identity,
        pool.num_blocks,
        pool.size_bytes,
        pool.block_size,
        pool.prefix_cache_enabled,
        pool.in_writers_memory,
    )


def encode_columns(columns: Mapping[str, bytes]) -> Iterator[bytes]:
    """Payloads of a snapshot: one a column, so that none outgrows what protobuf takes; an empty one ends it."""
    for name, values in columns.items():
        column = pb.StateColumn(name=name, values=values)
        yield pb.StateSnapshot(columns=[column]).SerializeToString()
    yield pb.StateSnapshot().SerializeToString()


def decode_columns(payloads: Iterable[bytes]) -> dict[str, bytes]:
    """The columns of a snapshot; raises ValueError when its end is missing."""
    columns: dict[str, bytes] = {}
    for payload in payloads:
        try:
            found = pb.StateSnapshot.FromString(payload).columns
        except DecodeError as error:
            raise ValueError("a column cannot be parsed") from error
        if not found:
            return columns
        columns |= {column.name: column.values for column in found}
    raise ValueError("the snapshot has no end")
