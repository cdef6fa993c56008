"""Picks the implementation of the operations for a device, and checks what they are given."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from kernels import reference
from kernels.checks import check_attention, check_copies, check_store
from kernels.cpu import CpuOperations

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from kernels.batch import AttentionParams, KvScales, PagedBatch


AttentionKernel: TypeAlias = Literal["compiled", "reference"]


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

    def __init__(
        self, operations: Operations, attention_kernel: AttentionKernel = "compiled"
    ) -> None:
        self._operations = operations
        is_compiled = attention_kernel == "compiled"
        self.numba_attention = (
            operations.numba_attention
            if isinstance(operations, CpuOperations) and is_compiled
            else None
        )
        """What `kernels.numba_layer` may run as a part of its own; None where something else attends."""

        self._attend = operations.paged_attention if is_compiled else reference.paged_attention

    @classmethod
    def for_device(
        cls, device: torch.device, attention_kernel: AttentionKernel = "compiled"
    ) -> Kernels:
        """The implementations for `device`: numba and the reference on the CPU, Triton on a GPU.

        Attention alone can be left to the reference, to tell a kernel's mistake from a model's.

        Raises:
            ValueError: when there are none for it.
        """
        if device.type == "cpu":
            return cls(CpuOperations(), attention_kernel)
        if device.type != "cuda" or find_spec("triton") is None:
            message = f"device {device} has no kernels: a GPU needs Triton, all else runs on cpu"
            raise ValueError(message)
        # Imported here: a machine without a GPU needs no Triton.
        from kernels.triton_gpu import GpuTraits, TritonOperations  # noqa: PLC0415

        return cls(TritonOperations(GpuTraits.of(device), device), attention_kernel)

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
        return self._attend(query, key_cache, value_cache, batch, params)
