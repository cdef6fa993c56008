"""The pool's bytes as tensors: the memory service owns them, this process maps them."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quire.descriptor import PoolDescriptor, fetch_descriptor
from quire.pool_layout import pool_layout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from compute_service.clients import AttachedPool
    from quire.pool_layout import LayerGeometry


@dataclass(frozen=True, slots=True)
class KvPool:
    """The mapped pool. As long as it is open this process is the pool's writer."""

    descriptor: PoolDescriptor
    caches: tuple[tuple[Tensor, Tensor], ...]
    """Keys `[num_blocks, block_size, num_kv_heads, k_head_dim]` and values with v_head_dim, a layer an entry."""

    def close(self) -> None:
        """Give up the right to write; the mapping goes with the process."""
        self.descriptor.close()


def map_pool(
    attached: AttachedPool, layers: Sequence[LayerGeometry], dtype: torch.dtype, block_size: int
) -> KvPool:
    """Fetch the pool's descriptor and map it.

    Raises:
        DescriptorRefusedError: when the memory service does not hand it out.
    """
    descriptor = fetch_descriptor(attached.descriptor_socket, attached.ticket)
    memory = mmap.mmap(descriptor.fd, attached.size_bytes, flags=mmap.MAP_SHARED)
    layout = pool_layout(layers, dtype.itemsize, block_size, attached.num_blocks)
    slots = (attached.num_blocks, block_size)
    caches = tuple(
        (
            _tensor(memory, dtype, keys, *slots, found.num_kv_heads, found.k_head_dim),
            _tensor(memory, dtype, values, *slots, found.num_kv_heads, found.v_head_dim),
        )
        for found, (keys, values) in zip(layers, layout.offsets, strict=True)
    )
    return KvPool(descriptor, caches)


def _tensor(memory: mmap.mmap, dtype: torch.dtype, offset: int, *shape: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.frombuffer(memory, dtype=dtype, offset=offset, count=count).view(shape)
