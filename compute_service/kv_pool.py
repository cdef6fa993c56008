"""The pool's bytes as tensors: shared memory of the memory service, mapped; or memory of the device, our own."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quire.descriptor import PoolDescriptor, fetch_descriptor
from quire.pool_layout import pool_layout
from quire.pool_trailer import verify_pool_descriptor
from quire.serving import StartupError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from compute_service.clients import AttachedPool
    from compute_service.device import ComputeDevice
    from quire.pool_layout import LayerGeometry

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class KvPool:
    """The pool. As long as it is open this process is its writer."""

    descriptor: PoolDescriptor
    caches: tuple[tuple[Tensor, Tensor], ...]
    """Keys `[num_blocks, block_size, num_kv_heads, k_head_dim]` and values with v_head_dim, a layer an entry."""

    def resume(self, attached: AttachedPool) -> None:
        """Stay the writer under a memory service that came back; it gets the descriptor when it has lost its own.

        Raises:
            DescriptorRefusedError: when it does not let us go on.
        """
        found = fetch_descriptor(
            attached.descriptor_socket, attached.ticket, held=self.descriptor.fd
        )
        if found.fd is not None:
            os.close(found.fd)  # of the file that we have: it made sure of that
        self.descriptor.lifeline.close()
        self.descriptor.lifeline = found.lifeline

    def close(self) -> None:
        """Give up the right to write; the bytes go with the process, or stay with the memory service."""
        self.descriptor.close()


def open_pool(
    attached: AttachedPool,
    layers: Sequence[LayerGeometry],
    dtype: torch.dtype,
    block_size: int,
    device: ComputeDevice,
) -> KvPool:
    """Become the writer of the attached pool, and lay its bytes out.

    Raises:
        DescriptorRefusedError: when the memory service does not let us in.
        WrongPoolBytesError: when the descriptor is not of this pool.
        StartupError: when the device has too little memory.
    """
    descriptor = fetch_descriptor(attached.descriptor_socket, attached.ticket)
    if descriptor.fd is None:
        memory = _allocate(attached.size_bytes, device.torch_device)
    else:
        verify_pool_descriptor(descriptor.fd, attached.size_bytes, attached.pool_id)
        mapped = mmap.mmap(descriptor.fd, attached.size_bytes, flags=mmap.MAP_SHARED)
        memory = torch.frombuffer(mapped, dtype=torch.uint8)
    layout = pool_layout(layers, dtype.itemsize, block_size, attached.num_blocks)
    slots = (attached.num_blocks, block_size)
    caches = tuple(
        (
            _array(memory, dtype, keys, *slots, found.num_kv_heads, found.k_head_dim),
            _array(memory, dtype, values, *slots, found.num_kv_heads, found.v_head_dim),
        )
        for found, (keys, values) in zip(layers, layout.offsets, strict=True)
    )
    return KvPool(descriptor, caches)


def _allocate(size_bytes: int, device: torch.device) -> Tensor:
    try:
        return torch.empty(size_bytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        wanted = f"{size_bytes / _MIB:.0f} MiB for the KV pool"
        free = f", {torch.cuda.mem_get_info(device)[0] / _MIB:.0f} MiB are free"
        message = f"{device} does not have {wanted}{free}; choose a smaller --memory-budget"
        raise StartupError(message) from error


def _array(memory: Tensor, dtype: torch.dtype, offset: int, *shape: int) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return memory[offset : offset + size].view(dtype).view(shape)
