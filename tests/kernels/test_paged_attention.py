"""The CPU's operations against a dense oracle that knows nothing of blocks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_cases import PagedShape, make_case, paged_shapes

from kernels import reference
from kernels.batch import AttentionParams, KvScales, PagedBatch
from kernels.launcher import Kernels

if TYPE_CHECKING:
    from paged_cases import PagedCase
    from torch import Tensor

KERNELS = Kernels.for_device(torch.device("cpu"))
REFERENCE = Kernels.for_device(torch.device("cpu"), "reference")
SHAPES = paged_shapes(
    max_before=40,
    block_sizes=[1, 4, 16],
    groups=[1, 2, 4],
    head_dims=[(8, 8), (24, 8), (8, 16), (24, 16)],
)

# Contexts of several parts and tiles, chunks of several panels, remainders of every vector.
WIDE_SHAPES = paged_shapes(
    max_before=700,
    block_sizes=[1, 2, 8, 16, 32, 64],
    groups=[1, 2, 3, 4, 5, 6, 7, 8],
    head_dims=[(16, 16), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (24, 256), (72, 40)],
    max_chunk=70,
)
COMPILED_DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def dense_attention(query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
    """One sequence, position by position and head by head, in float64."""
    num_queries, num_heads, _ = query.shape
    length, num_kv_heads, v_dim = values.shape
    out = torch.zeros(num_queries, num_heads, v_dim, dtype=torch.float64)
    window = params.sliding_window
    for index in range(num_queries):
        position = length - num_queries + index
        first = max(0, position - window + 1) if window else 0
        for head in range(num_heads):
            kv_head = head * num_kv_heads // num_heads
            seen = keys[first : position + 1, kv_head].double()
            scores = params.scale * (seen @ query[index, head].double())
            if params.soft_cap:
                scores = params.soft_cap * torch.tanh(scores / params.soft_cap)
            extra = [] if params.sinks is None else [params.sinks[head].double().reshape(1)]
            weights = torch.softmax(torch.cat([scores, *extra]), 0)[: len(scores)]
            out[index, head] = weights @ values[first : position + 1, kv_head].double()
    return out


@settings(max_examples=150, deadline=None)
@given(SHAPES, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_attention_through_block_tables_equals_dense_attention(
    shape: PagedShape, dtype: torch.dtype
) -> None:
    """Any mix of decodes and chunks, in any layout of blocks, gives what dense attention gives."""
    case = make_case(shape, dtype, dtype)
    expected = _dense(case, case.keys, case.values)
    tolerance = 2e-5 if dtype is torch.float32 else 2e-2
    for operation in (KERNELS.paged_attention, REFERENCE.paged_attention):
        found = operation(case.query, case.key_cache, case.value_cache, case.batch, case.params)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(WIDE_SHAPES, COMPILED_DTYPES)
def test_long_contexts_and_chunks_equal_the_reference(
    shape: PagedShape, dtype: torch.dtype
) -> None:
    """Whatever the heads, sizes, blocks, windows, caps and sinks: the reference in float32, rounded once at the end."""
    case = make_case(shape, dtype, dtype)
    found = _compiled(case, case.batch, case.query)
    caches = case.key_cache.float(), case.value_cache.float()
    expected = reference.paged_attention(case.query.float(), *caches, case.batch, case.params)
    tolerance = 2e-5 if dtype is torch.float32 else 2**-8
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=20, deadline=None)
@given(WIDE_SHAPES, COMPILED_DTYPES)
def test_no_sequence_changes_its_neighbours_output(shape: PagedShape, dtype: torch.dtype) -> None:
    """Alone in a batch a sequence has the same output, bit for bit, as in company."""
    case = make_case(shape, dtype, dtype)
    together = _compiled(case, case.batch, case.query)
    starts = case.batch.query_start.tolist()
    for index, (begin, end) in enumerate(pairwise(starts)):
        alone = _compiled(case, _only(case.batch, index), case.query[begin:end])
        assert torch.equal(alone, together[begin:end])


def test_queries_may_lie_in_any_order_of_heads_and_tokens() -> None:
    """Models hand over transposed queries; only a head's elements have to follow one another."""
    case = make_case(_plain_shape(), torch.bfloat16, torch.bfloat16)
    by_head = case.query.transpose(0, 1).contiguous().transpose(0, 1)
    strided = torch.stack([case.query, case.query], dim=-1)[..., 0]
    expected = _compiled(case, case.batch, case.query)
    for query in (by_head, strided):
        assert torch.equal(_compiled(case, case.batch, query), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_score_of_minus_infinity_weighs_nothing(dtype: torch.dtype) -> None:
    """Keys that score -inf, whole parts and tiles of them, and sinks of -inf leave the others' weights as they are."""
    case = make_case(_plain_shape(), dtype, dtype)
    query = case.query.abs() + 0.1
    for slots in case.slots:
        flat = case.key_cache.view(-1, *case.key_cache.shape[2:])
        flat[slots[: len(slots) // 2]] = -torch.inf
    params = replace(case.params, sinks=torch.full((case.query.shape[1],), -torch.inf))
    arguments = (query, case.key_cache, case.value_cache, case.batch, params)
    found, expected = KERNELS.paged_attention(*arguments), REFERENCE.paged_attention(*arguments)
    assert bool(expected.isfinite().all())
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_attention_alone_can_be_left_to_the_reference() -> None:
    """The switch gives the reference's bits, which the compiled kernel's rounding does not."""
    case = make_case(_plain_shape(), torch.float32, torch.float32)
    arguments = (case.query, case.key_cache, case.value_cache, case.batch, case.params)
    expected = reference.paged_attention(*arguments)
    assert torch.equal(REFERENCE.paged_attention(*arguments), expected)
    assert not torch.equal(KERNELS.paged_attention(*arguments), expected)


def _compiled(case: PagedCase, batch: PagedBatch, query: Tensor) -> Tensor:
    return KERNELS.paged_attention(query, case.key_cache, case.value_cache, batch, case.params)


def _only(batch: PagedBatch, index: int) -> PagedBatch:
    """The sequence `index` of a batch."""
    begin, end = batch.query_start[index : index + 2].tolist()
    return replace(
        batch,
        block_tables=batch.block_tables[index : index + 1],
        query_start=torch.tensor([0, end - begin], dtype=torch.int32),
        context_lens=batch.context_lens[index : index + 1],
        slot_mapping=batch.slot_mapping[begin:end],
        num_decodes=int(end - begin == 1),
        max_query_len=end - begin,
        max_context_len=int(batch.context_lens[index]),
    )


def _plain_shape() -> PagedShape:
    return PagedShape(
        queries=(1, 1, 70),
        before=(700, 40, 300),
        block_size=16,
        num_kv_heads=2,
        group=7,
        k_dim=64,
        v_dim=64,
        window=0,
        soft_cap=0.0,
        has_sinks=False,
        seed=1,
    )


@settings(max_examples=30, deadline=None)
@given(SHAPES)
def test_an_fp8_cache_gives_attention_over_rounded_numbers(shape: PagedShape) -> None:
    """Keys and values come back as their scale times the nearest e4m3 number of their quotient."""
    case = make_case(shape, torch.float32, torch.float8_e4m3fn)
    scales = case.params.kv_scales
    assert scales is not None
    keys = [_rounded(key, scales.key) for key in case.keys]
    values = [_rounded(value, scales.value) for value in case.values]
    found = KERNELS.paged_attention(
        case.query, case.key_cache, case.value_cache, case.batch, case.params
    )
    torch.testing.assert_close(found.double(), _dense(case, keys, values), rtol=2e-5, atol=2e-5)


def _rounded(numbers: Tensor, scale: Tensor) -> Tensor:
    """By search among all e4m3 numbers, which is what rounding means."""
    # Of two that are equally near the even one is meant: it comes first.
    codes = torch.cat([torch.arange(0, 256, 2), torch.arange(1, 256, 2)])
    every = codes.to(torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[~every.isnan()]
    quotient = (numbers / scale[:, None]).double()
    nearest = (quotient.unsqueeze(-1) - every).abs().argmin(-1)
    return every[nearest].float() * scale[:, None]


def _dense(case: Any, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    starts = case.batch.query_start.tolist()
    return torch.cat(
        [
            dense_attention(case.query[begin:end], key, value, case.params)
            for begin, end, key, value in zip(starts, starts[1:], keys, values, strict=False)
        ]
    )


def test_store_leaves_out_negative_slots() -> None:
    """A slot of -1 stores nothing and disturbs nothing."""
    key_cache, value_cache = torch.zeros(3, 2, 1, 4), torch.zeros(3, 2, 1, 2)
    slots = torch.tensor([-1, 5, 2])
    key, value = torch.ones(3, 1, 4), torch.ones(3, 1, 2)
    KERNELS.store_kv(key, value, key_cache, value_cache, slots)
    assert key_cache.view(6, -1).sum(1).tolist() == [0, 0, 4, 0, 0, 4]
    assert value_cache.view(6, -1).sum(1).tolist() == [0, 0, 2, 0, 0, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_store_takes_rows_in_any_layout(dtype: torch.dtype, order: tuple[int, int, int]) -> None:
    """Whatever strides a model's keys and values have, the same bytes lie in the slots as with the reference."""
    sizes = (5, 3, 8)
    new = torch.randn([sizes[axis] for axis in order]).to(dtype).permute(order)
    slots = torch.tensor([7, -1, 0, 12, 3])
    caches = [torch.zeros(4, 4, 3, 8, dtype=dtype) for _ in range(4)]
    KERNELS.store_kv(new, -new, caches[0], caches[1], slots)
    reference.store_kv(new, -new, caches[2], caches[3], slots)
    assert torch.equal(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])


def test_copies_copy_whole_blocks_in_every_layer() -> None:
    """Source and destination are equal afterwards, all else is as before; one source may have two destinations."""
    caches = [(torch.arange(5.0).view(5, 1, 1, 1), torch.arange(5.0).view(5, 1, 1, 1) + 10)]
    KERNELS.copy_blocks(caches, [(1, 2), (1, 4)])
    assert caches[0][0].flatten().tolist() == [0, 1, 1, 3, 1]
    assert caches[0][1].flatten().tolist() == [10, 11, 11, 13, 11]


@pytest.mark.parametrize(
    ("copies", "message"),
    [
        ([(1, 2), (2, 3)], "block 2 is source and destination"),
        ([(1, 3), (2, 3)], "two copies of one call have the same destination"),
        ([(1, 4)], "there is no block 4: the pool has 4"),
    ],
)
def test_copies_that_depend_on_their_order_are_refused(
    copies: list[tuple[int, int]], message: str
) -> None:
    """Nothing is copied when a call could not be made all at once."""
    caches = [(torch.arange(4.0).view(4, 1, 1, 1), torch.arange(4.0).view(4, 1, 1, 1))]
    with pytest.raises(ValueError, match=message):
        KERNELS.copy_blocks(caches, copies)
    assert caches[0][0].flatten().tolist() == [0, 1, 2, 3]


ONE_TOKEN = PagedBatch(
    torch.zeros(1, 1, dtype=torch.int32),
    torch.tensor([0, 1], dtype=torch.int32),
    torch.tensor([1], dtype=torch.int32),
    torch.zeros(1, dtype=torch.int64),
    num_decodes=1,
    max_query_len=1,
    max_context_len=1,
)
FP8 = torch.float8_e4m3fn
SCALES = KvScales(torch.ones(2), torch.ones(2))


@pytest.mark.parametrize(
    ("query", "key_cache", "value_cache", "options", "message"),
    [
        ((3, 8), (4, 2, 8), (4, 2, 8), {}, "3 query heads are not a multiple of 2 kv heads"),
        ((2, 8), (4, 2, 16), (4, 2, 8), {}, "queries have head_dim 8, keys 16"),
        ((2, 8), (4, 2, 8), (8, 2, 8), {}, "differ in blocks or heads"),
        ((2, 8), (3, 2, 8), (3, 2, 8), {}, "block_size 3 is not a power of two"),
        ((2, 8), (4, 2, 8), (4, 2, 8), {"sinks": torch.ones(3)}, "2 query heads, but sinks"),
        ((2, 8), (4, 2, 8), (4, 2, 8), {"kv_scales": SCALES}, "an fp8 cache, and only that"),
        ((2, 8), (4, 2, 8), (4, 2, 8), {"scale": -1.0}, "a scale above 0"),
        ((2, 8), (4, 2, 8, FP8), (4, 2, 8, FP8), {}, "an fp8 cache, and only that"),
        ((2, 8), (4, 2, 8, torch.float16), (4, 2, 8, torch.float16), {}, "dtypes differ"),
        ((2, 8), (4, 2, 8), (4, 2, 8, torch.float16), {}, "dtypes differ: keys"),
        (
            (1, 8),
            (4, 1, 8, FP8),
            (4, 1, 8, FP8),
            {"kv_scales": SCALES},
            r"scales are float32 \[1\], not torch.float32 \(2,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_words(
    query: Any, key_cache: Any, value_cache: Any, options: dict[str, Any], message: str
) -> None:
    """Heads, dims, dtypes, block sizes and scales that contradict each other never reach a kernel."""

    def cache(size: int, heads: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(1, size, heads, dim).to(dtype)

    params = AttentionParams(**{"scale": 1.0, **options})
    with pytest.raises(ValueError, match=message):
        KERNELS.paged_attention(
            torch.zeros(1, *query), cache(*key_cache), cache(*value_cache), ONE_TOKEN, params
        )
