"""Picks the implementation of the operations for a device, and checks what they are given."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from kernels.checks import check_attention, check_copies, check_store
from kernels.cpu import CpuOperations

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from kernels.batch import AttentionParams, KvScales, PagedBatch


class Operations(Protocol):
    """One implementation; `kernels.reference` says what each operation gives. Arguments were checked."""

    def store_kv(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
        scales: KvScales | None,
    ) -> None:
        """Write new keys and values into their slots."""

    def copy_blocks(
        self, caches: Sequence[tuple[Tensor, Tensor]], copies: Sequence[tuple[int, int]]
    ) -> None:
        """Copy whole blocks in every layer."""

    def paged_attention(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: PagedBatch,
        params: AttentionParams,
    ) -> Tensor:
        """Attend through block tables."""


class Kernels:
    """The operations, checked: each raises ValueError, in one sentence, for what it cannot do."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    @classmethod
    def for_device(cls, device: torch.device) -> Kernels:
        """The implementations for `device`: numba and the reference on the CPU, Triton on a GPU.

        Raises:
            ValueError: when there are none for it.
        """
        if device.type == "cpu":
            return cls(CpuOperations())
        if device.type != "cuda" or find_spec("triton") is None:
            message = f"device {device} has no kernels: a GPU needs Triton, all else runs on cpu"
            raise ValueError(message)
        # Imported here: a machine without a GPU needs no Triton.
        from kernels.triton_gpu import GpuTraits, TritonOperations  # noqa: PLC0415

        return cls(TritonOperations(GpuTraits.of(device), device))

    def store_kv(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
        scales: KvScales | None = None,
    ) -> None:
        """See `kernels.reference.store_kv`."""
        check_store(key, value, key_cache, value_cache, slot_mapping, scales)
        self._operations.store_kv(key, value, key_cache, value_cache, slot_mapping, scales)

    def copy_blocks(
        self, caches: Sequence[tuple[Tensor, Tensor]], copies: Sequence[tuple[int, int]]
    ) -> None:
        """See `kernels.reference.copy_blocks`."""
        check_copies(copies, len(caches[0][0]))
        self._operations.copy_blocks(caches, copies)

    def paged_attention(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: PagedBatch,
        params: AttentionParams,
    ) -> Tensor:
        """See `kernels.reference.paged_attention`."""
        check_attention(query, key_cache, value_cache, batch, params)
        return self._operations.paged_attention(query, key_cache, value_cache, batch, params)
