"""Random attention over random block tables, for every implementation."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st

from kernels import reference
from kernels.batch import AttentionParams, KvScales, PagedBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True)
class PagedShape:
    """One batch, without its numbers."""

    queries: tuple[int, ...]  # tokens run, decodes first
    before: tuple[int, ...]  # tokens already in the cache
    block_size: int
    num_kv_heads: int
    group: int
    k_dim: int
    v_dim: int
    window: int
    soft_cap: float
    has_sinks: bool
    seed: int

    @property
    def lengths(self) -> list[int]:
        return [before + run for before, run in zip(self.before, self.queries, strict=True)]

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group


@st.composite
def paged_shapes(
    draw: st.DrawFn,
    *,
    max_before: int,
    block_sizes: Sequence[int],
    groups: Sequence[int],
    head_dims: Sequence[tuple[int, int]],
    max_chunk: int = 9,
) -> PagedShape:
    num_decodes = draw(st.integers(0, 3))
    least = 0 if num_decodes else 1
    chunks = draw(st.lists(st.integers(2, max_chunk), min_size=least, max_size=2))
    queries = [1] * num_decodes + chunks
    k_dim, v_dim = draw(st.sampled_from(head_dims))
    return PagedShape(
        queries=tuple(queries),
        before=tuple(draw(st.integers(0, max_before)) for _ in queries),
        block_size=draw(st.sampled_from(block_sizes)),
        num_kv_heads=draw(st.sampled_from([1, 2, 3])),
        group=draw(st.sampled_from(groups)),
        k_dim=k_dim,
        v_dim=v_dim,
        window=draw(st.sampled_from([0, 1, 5, 17, 70])),
        soft_cap=draw(st.sampled_from([0.0, 3.0])),
        has_sinks=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


@dataclass(frozen=True)
class PagedCase:
    """One batch with its numbers; slots behind a sequence's end hold NaN, so that reading one would show."""

    query: Tensor
    keys: list[Tensor]  # by sequence, as they were before they were stored
    values: list[Tensor]
    slots: list[Tensor]
    key_cache: Tensor
    value_cache: Tensor
    batch: PagedBatch
    params: AttentionParams


def make_case(shape: PagedShape, dtype: torch.dtype, cache_dtype: torch.dtype) -> PagedCase:
    """Keys and values stored by the reference."""
    torch.manual_seed(shape.seed)
    heads, size = shape.num_kv_heads, shape.block_size
    tables, num_blocks = _block_tables(shape)
    keys = [torch.randn(n, heads, shape.k_dim).to(dtype) for n in shape.lengths]
    values = [torch.randn(n, heads, shape.v_dim).to(dtype) for n in shape.lengths]
    slots = [
        table[positions // size].long() * size + positions % size
        for table, length in zip(tables, shape.lengths, strict=True)
        for positions in (torch.arange(length),)
    ]
    is_fp8 = cache_dtype == torch.float8_e4m3fn
    scales = KvScales(torch.rand(heads) + 0.01, torch.rand(heads) + 0.01) if is_fp8 else None
    case = PagedCase(
        query=torch.randn(sum(shape.queries), shape.num_heads, shape.k_dim).to(dtype),
        keys=keys,
        values=values,
        slots=slots,
        key_cache=poisoned(num_blocks, size, heads, shape.k_dim, dtype=cache_dtype),
        value_cache=poisoned(num_blocks, size, heads, shape.v_dim, dtype=cache_dtype),
        batch=PagedBatch(
            block_tables=tables,
            query_start=torch.tensor([0, *accumulate(shape.queries)], dtype=torch.int32),
            context_lens=torch.tensor(shape.lengths, dtype=torch.int32),
            slot_mapping=torch.zeros(sum(shape.queries), dtype=torch.int64),
            num_decodes=shape.queries.count(1),
            max_query_len=max(shape.queries),
            max_context_len=max(shape.lengths),
        ),
        params=AttentionParams(
            scale=2.4 / shape.k_dim**0.5,
            sliding_window=shape.window,
            soft_cap=shape.soft_cap,
            sinks=torch.randn(shape.num_heads) if shape.has_sinks else None,
            kv_scales=scales,
        ),
    )
    for key, value, where in zip(keys, values, slots, strict=True):
        reference.store_kv(key, value, case.key_cache, case.value_cache, where, scales)
    return case


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """NaN everywhere."""
    return torch.full(shape, torch.nan).to(dtype)


def _block_tables(shape: PagedShape) -> tuple[Tensor, int]:
    """Tables over blocks in random order, and how many blocks there are with the null block."""
    counts = [-(-length // shape.block_size) for length in shape.lengths]
    order = (torch.randperm(sum(counts)) + 1).int()
    tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    for table, found in zip(tables, order.split(counts), strict=True):
        table[: len(found)] = found
    return tables, 1 + sum(counts)
