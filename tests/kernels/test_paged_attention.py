"""The kernels against a dense oracle that knows nothing of blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.batch import PagedBatch
from kernels.launcher import Kernels

if TYPE_CHECKING:
    from torch import Tensor

KERNELS = Kernels.for_device(torch.device("cpu"))


def dense_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int,
    soft_cap: float,
    sinks: Tensor | None,
) -> Tensor:
    """One sequence, position by position and head by head, in float64."""
    num_queries, num_heads, _ = query.shape
    length, num_kv_heads, v_dim = values.shape
    out = torch.zeros(num_queries, num_heads, v_dim, dtype=torch.float64)
    for index in range(num_queries):
        position = length - num_queries + index
        first = max(0, position - window + 1) if window else 0
        for head in range(num_heads):
            kv_head = head * num_kv_heads // num_heads
            scores = scale * (
                keys[first : position + 1, kv_head].double() @ query[index, head].double()
            )
            if soft_cap:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            extra = [] if sinks is None else [sinks[head].double().reshape(1)]
            weights = torch.softmax(torch.cat([scores, *extra]), 0)[: len(scores)]
            out[index, head] = weights @ values[first : position + 1, kv_head].double()
    return out


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    num_decodes = draw(st.integers(0, 3))
    chunks = draw(st.lists(st.integers(2, 9), min_size=0 if num_decodes else 1, max_size=2))
    queries = [1] * num_decodes + chunks
    return {
        "queries": queries,
        "before": [draw(st.integers(0, 40)) for _ in queries],
        "block_size": draw(st.sampled_from([1, 4, 16])),
        "num_kv_heads": draw(st.sampled_from([1, 2, 3])),
        "group": draw(st.sampled_from([1, 2, 4])),
        "k_dim": draw(st.sampled_from([8, 24])),
        "v_dim": draw(st.sampled_from([8, 16])),
        "window": draw(st.sampled_from([0, 1, 5, 17])),
        "soft_cap": draw(st.sampled_from([0.0, 3.0])),
        "with_sinks": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "seed": draw(st.integers(0, 2**31)),
    }


@settings(max_examples=150, deadline=None)
@given(cases())
def test_attention_through_block_tables_equals_dense_attention(case: dict[str, object]) -> None:
    """Any mix of decodes and chunks, in any layout of blocks, gives what dense attention gives."""
    queries, before = case["queries"], case["before"]
    size, dtype = case["block_size"], case["dtype"]
    torch.manual_seed(case["seed"])
    lengths = [b + q for b, q in zip(before, queries, strict=True)]
    num_heads = case["num_kv_heads"] * case["group"]
    counts = [-(-length // size) for length in lengths]
    num_blocks = 1 + sum(counts)
    order = (torch.randperm(num_blocks - 1) + 1).int()
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    used = 0
    for index, count in enumerate(counts):
        tables[index, :count] = order[used : used + count]
        used += count
    # Slots behind a sequence's end hold NaN: reading one would show.
    key_cache = torch.full((num_blocks, size, case["num_kv_heads"], case["k_dim"]), torch.nan)
    value_cache = torch.full((num_blocks, size, case["num_kv_heads"], case["v_dim"]), torch.nan)
    key_cache, value_cache = key_cache.to(dtype), value_cache.to(dtype)
    keys = [torch.randn(n, case["num_kv_heads"], case["k_dim"]).to(dtype) for n in lengths]
    values = [torch.randn(n, case["num_kv_heads"], case["v_dim"]).to(dtype) for n in lengths]
    for table, key, value in zip(tables, keys, values, strict=True):
        positions = torch.arange(len(key))
        slots = table[positions // size].long() * size + positions % size
        KERNELS.store_kv(key, value, key_cache, value_cache, slots)
    query = torch.randn(sum(queries), num_heads, case["k_dim"]).to(dtype)
    starts = [0]
    for count in queries:
        starts.append(starts[-1] + count)
    batch = PagedBatch(
        block_tables=tables,
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor(lengths, dtype=torch.int32),
        slot_mapping=torch.zeros(sum(queries), dtype=torch.int64),
        num_decodes=queries.count(1),
    )
    sinks = torch.randn(num_heads) if case["with_sinks"] else None
    options = {
        "scale": 0.3,
        "sliding_window": case["window"],
        "soft_cap": case["soft_cap"],
        "sinks": sinks,
    }
    expected = torch.cat(
        [
            dense_attention(
                query[begin:end], key, value, 0.3, case["window"], case["soft_cap"], sinks
            )
            for begin, end, key, value in zip(starts, starts[1:], keys, values, strict=False)
        ]
    )
    tolerance = 2e-5 if dtype is torch.float32 else 2e-2
    for operation in (KERNELS.paged_attention, reference.paged_attention):
        found = operation(query, key_cache, value_cache, batch, **options)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_store_leaves_out_negative_slots() -> None:
    """A slot of -1 stores nothing and disturbs nothing."""
    key_cache, value_cache = torch.zeros(3, 2, 1, 4), torch.zeros(3, 2, 1, 2)
    slots = torch.tensor([-1, 5, 2])
    key, value = torch.ones(3, 1, 4), torch.ones(3, 1, 2)
    KERNELS.store_kv(key, value, key_cache, value_cache, slots)
    assert key_cache.view(6, -1).sum(1).tolist() == [0, 0, 4, 0, 0, 4]
    assert value_cache.view(6, -1).sum(1).tolist() == [0, 0, 2, 0, 0, 2]


def test_copies_of_one_call_read_before_they_write() -> None:
    """A block that is copied onto a source of the same call does not change what that source gives."""
    caches = [
        (torch.arange(4.0).view(4, 1, 1, 1).clone(), torch.arange(4.0).view(4, 1, 1, 1).clone())
    ]
    KERNELS.copy_blocks(caches, torch.tensor([1, 2]), torch.tensor([2, 3]))
    assert caches[0][0].flatten().tolist() == [0, 1, 1, 2]
    assert caches[0][1].flatten().tolist() == [0, 1, 1, 2]


def test_shapes_that_do_not_fit_are_named() -> None:
    """The launcher refuses heads that do not divide, in words."""
    batch = PagedBatch(
        torch.zeros(1, 1, dtype=torch.int32),
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([1], dtype=torch.int32),
        torch.zeros(1, dtype=torch.int64),
        1,
    )
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2 kv heads"):
        KERNELS.paged_attention(
            torch.zeros(1, 3, 8), torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8), batch, scale=1.0
        )
