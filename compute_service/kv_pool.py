"""The pool's bytes as tensors: the memory service owns them, this process maps them."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quire.descriptor import PoolDescriptor, fetch_descriptor
from quire.pool_layout import LayerGeometry, pool_layout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from compute_service.clients import AttachedPool
    from compute_service.geometry import KvLayer


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
    attached: AttachedPool, layers: Sequence[KvLayer], dtype: torch.dtype, block_size: int
) -> KvPool:
    """Fetch the pool's descriptor and map it.

    Raises:
        DescriptorRefusedError: when the memory service does not hand it out.
    """
    descriptor = fetch_descriptor(attached.descriptor_socket, attached.ticket)
    memory = mmap.mmap(descriptor.fd, attached.size_bytes, flags=mmap.MAP_SHARED)
    geometry = [
        LayerGeometry(layer.num_kv_heads, layer.k_head_dim, layer.v_head_dim) for layer in layers
    ]
    layout = pool_layout(geometry, dtype.itemsize, block_size, attached.num_blocks)
    caches = tuple(
        (
            _tensor(
                memory,
                dtype,
                keys,
                attached.num_blocks,
                block_size,
                found.num_kv_heads,
                found.k_head_dim,
            ),
            _tensor(
                memory,
                dtype,
                values,
                attached.num_blocks,
                block_size,
                found.num_kv_heads,
                found.v_head_dim,
            ),
        )
        for found, (keys, values) in zip(geometry, layout.offsets, strict=True)
    )
    return KvPool(descriptor, caches)


def _tensor(memory: mmap.mmap, dtype: torch.dtype, offset: int, *shape: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.frombuffer(memory, dtype=dtype, offset=offset, count=count).view(shape)
