"""Identities of pools to messages and back: they come over the wire and lie in the state folder."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from memory_service.log_file import StateError
from memory_service.pool_identity import PoolIdentity
from protos.memory.v1 import pool_pb2 as pb
from quire.pool_layout import LayerGeometry


def identity_of(message: pb.PoolIdentity) -> PoolIdentity:
    """The identity that a message names."""
    return PoolIdentity(
        tuple(
            LayerGeometry(found.num_kv_heads, found.k_head_dim, found.v_head_dim)
            for found in message.layers
        ),
        message.dtype,
        message.block_size,
        (message.tensor_parallel_rank, message.tensor_parallel_size),
        message.model_fingerprint,
    )


def encode_identity(identity: PoolIdentity) -> bytes:
    """The bytes of an identity."""
    rank, size = identity.tensor_parallel
    return pb.PoolIdentity(
        layers=[
            pb.KvLayer(
                num_kv_heads=layer.num_kv_heads,
                k_head_dim=layer.k_head_dim,
                v_head_dim=layer.v_head_dim,
            )
            for layer in identity.layers
        ],
        dtype=identity.dtype,
        block_size=identity.block_size,
        tensor_parallel_rank=rank,
        tensor_parallel_size=size,
        model_fingerprint=identity.model_fingerprint,
    ).SerializeToString()


def decode_identity(encoded: bytes) -> PoolIdentity:
    """The identity of these bytes; raises StateError when they are none."""
    try:
        return identity_of(pb.PoolIdentity.FromString(encoded))
    except DecodeError as error:
        raise StateError("the identity in the log's header cannot be parsed") from error
