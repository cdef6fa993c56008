"""The Triton kernels, interpreted, against the reference: fresh random inputs, outputs that begin as NaN."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_cases import PagedShape, make_case, paged_shapes, poisoned
from triton_interpreter import interpreted_operations

from kernels import reference
from kernels.batch import KvScales
from kernels.launcher import Kernels
from kernels.triton_tiling import num_parts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

# `kernels.triton_tile.cap` counts on infinity where tanh is 1.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
FP8 = torch.float8_e4m3fn
# dtype of queries, of the cache, whether the GPU converts fp8 by itself, largest relative error of an output
MODES = {
    "float32": (torch.float32, torch.float32, True, 1e-5),
    "bfloat16": (torch.bfloat16, torch.bfloat16, True, 1.2e-2),
    "float16": (torch.float16, torch.float16, True, 2e-3),
    "fp8 converted, bfloat16": (torch.bfloat16, FP8, True, 1.2e-2),
    "fp8 bits, bfloat16": (torch.bfloat16, FP8, False, 1.2e-2),
    "fp8 bits, float32": (torch.float32, FP8, False, 1e-5),
}
SHAPES = paged_shapes(
    max_before=200,
    block_sizes=[16, 32, 64, 128],
    groups=[1, 3, 4, 7],
    head_dims=[(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (64, 128), (256, 256)],
    max_chunk=40,
)
# The interpreter stores one token after another.
SHORT_SHAPES = paged_shapes(
    max_before=12,
    block_sizes=[16, 128],
    groups=[1],
    head_dims=[(64, 64), (80, 80), (192, 128), (256, 256)],
)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Let memory that was not written hold NaN."""
    torch.use_deterministic_algorithms(mode=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert bool(torch.empty(3).new_empty(2, dtype=torch.float32).isnan().all())
    yield
    torch.use_deterministic_algorithms(mode=False)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm; NaN stays NaN, which no comparison lets pass."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=8, deadline=None)
@given(shape=SHAPES)
def test_attention_equals_the_reference(mode: str, shape: PagedShape) -> None:
    """Decodes split in parts and prefill chunks, with windows, caps and sinks, in every dtype and head size."""
    dtype, cache_dtype, converts_fp8, tolerance = MODES[mode]
    case = make_case(shape, dtype, cache_dtype)
    kernels = Kernels(interpreted_operations(converts_fp8=converts_fp8))
    arguments = (case.query, case.key_cache, case.value_cache, case.batch, case.params)
    found, expected = kernels.paged_attention(*arguments), reference.paged_attention(*arguments)
    assert found.dtype == dtype
    assert relative_error(found, expected) <= tolerance


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=6, deadline=None)
@given(shape=SHORT_SHAPES)
def test_the_store_writes_the_reference_s_bits(mode: str, shape: PagedShape) -> None:
    """Every slot holds the same bits, those left out still NaN; fp8 is rounded the same way."""
    dtype, cache_dtype, _, _ = MODES[mode]
    case = make_case(shape, dtype, cache_dtype)
    keys = poisoned(*case.key_cache.shape, dtype=cache_dtype)
    values = poisoned(*case.value_cache.shape, dtype=cache_dtype)
    kernels = Kernels(interpreted_operations())
    for key, value, slots in zip(case.keys, case.values, case.slots, strict=True):
        # As a model gives them: heads first in memory.
        new_key, new_value = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (key, value))
        kernels.store_kv(new_key, new_value, keys, values, slots, case.params.kv_scales)
    assert torch.equal(keys.view(torch.uint8), case.key_cache.view(torch.uint8))
    assert torch.equal(values.view(torch.uint8), case.value_cache.view(torch.uint8))


def test_every_float16_is_rounded_to_fp8_as_torch_does() -> None:
    """All 63,488 finite float16 numbers: ties, the smallest, the clipped, both signs."""
    numbers = torch.arange(1 << 16).to(torch.uint16).view(torch.float16)
    numbers = numbers[numbers.isfinite()].view(-1, 16, 64)
    caches = [torch.zeros(len(numbers), 1, 16, 64).to(FP8) for _ in range(4)]
    slots, scales = torch.arange(len(numbers)), KvScales(torch.ones(16), torch.ones(16))
    Kernels(interpreted_operations()).store_kv(
        numbers, numbers, caches[0], caches[1], slots, scales
    )
    reference.store_kv(numbers, numbers, caches[2], caches[3], slots, scales)
    assert torch.equal(caches[0].view(torch.uint8), caches[2].view(torch.uint8))
    assert len(caches[0].view(torch.uint8).unique()) == 254  # all but the two NaN


def test_the_store_leaves_out_negative_slots() -> None:
    """A slot of -1 stores nothing."""
    key_cache, value_cache = torch.zeros(3, 16, 1, 64), torch.zeros(3, 16, 1, 64)
    ones = torch.ones(3, 1, 64)
    slots = torch.tensor([-1, 5, 40])
    Kernels(interpreted_operations()).store_kv(ones, ones, key_cache, value_cache, slots)
    for cache in (key_cache, value_cache):
        assert cache.view(48, -1).sum(1).nonzero().flatten().tolist() == [5, 40]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=10, max_size=10, unique=False),
    st.sampled_from([torch.float32, torch.bfloat16, FP8]),
    st.integers(1, 3),
)
def test_copies_equal_the_reference_s(
    sources: list[int], dtype: torch.dtype, num_layers: int
) -> None:
    """Every layer's keys and values, whole blocks, any number of copies of a source, bit for bit."""
    layers = [(torch.randn(20, 16, 2, 64).to(dtype), torch.randn(20, 16, 2, 80).to(dtype))]
    layers += [(key.clone(), value.clone()) for key, value in layers * (num_layers - 1)]
    others = [(key.clone(), value.clone()) for key, value in layers]
    copies = [(source, 10 + index) for index, source in enumerate(sources)]
    Kernels(interpreted_operations()).copy_blocks(layers, copies)
    reference.copy_blocks(others, copies)
    for layer, other in zip(layers, others, strict=True):
        for found, expected in zip(layer, other, strict=True):
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


BASE = PagedShape((1, 4), (20, 9), 16, 2, 2, 64, 64, 0, 0.0, has_sinks=False, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_dim": 272}, "head_dim 272 is above 256"),
        ({"group": 129}, "129 query heads share a kv head; 128 may"),
    ],
)
def test_what_no_kernel_computes_is_refused(changes: dict[str, int], message: str) -> None:
    """Head sizes and groups beyond the tiles end in one sentence, not in the compiler."""
    case = make_case(replace(BASE, **changes), torch.float32, torch.float32)
    with pytest.raises(ValueError, match=message):
        Kernels(interpreted_operations()).paged_attention(
            case.query, case.key_cache, case.value_cache, case.batch, case.params
        )


def test_other_refusals_are_sentences_too() -> None:
    """Dtypes that are not computed, strided heads, blocks that are not aligned."""
    kernels = Kernels(interpreted_operations())
    case = make_case(BASE, torch.float64, torch.float64)
    with pytest.raises(ValueError, match=r"queries are torch.float64; bfloat16"):
        kernels.paged_attention(
            case.query, case.key_cache, case.value_cache, case.batch, case.params
        )
    case = make_case(BASE, torch.float32, torch.float32)
    strided = case.query.repeat_interleave(2, dim=-1)[..., ::2]
    with pytest.raises(ValueError, match=r"the last dimension .* is not contiguous"):
        kernels.paged_attention(strided, case.key_cache, case.value_cache, case.batch, case.params)
    odd = (torch.zeros(4, 1, 1, 3), torch.zeros(4, 1, 1, 4))
    with pytest.raises(ValueError, match="blocks of 12 bytes are not aligned to 16"):
        kernels.copy_blocks([odd], [(1, 2)])


def test_a_device_without_kernels_is_refused() -> None:
    """Neither the CPU's operations nor Triton's run on `meta`."""
    with pytest.raises(ValueError, match="device meta has no kernels"):
        Kernels.for_device(torch.device("meta"))


@pytest.mark.parametrize(
    ("num_programs", "most", "expected"),
    [(8, 0, 1), (8, 16, 16), (8, 256, 132), (512, 256, 3), (2048, 256, 1)],
)
def test_contexts_are_split_until_the_device_is_full(
    num_programs: int, most: int, expected: int
) -> None:
    """132 multiprocessors get eight programs each, as long as parts may be so short."""
    assert num_parts(num_programs, 132, most) == expected


@pytest.mark.parametrize("window", [1, 17, 64])
def test_a_decode_reads_nothing_before_its_window(window: int) -> None:
    """NaN in every slot that the window has passed does not reach the output."""
    shape = replace(BASE, queries=(1,), before=(150,), window=window, has_sinks=True)
    case = make_case(shape, torch.float32, torch.float32)
    arguments = (case.query, case.key_cache, case.value_cache, case.batch, case.params)
    expected = reference.paged_attention(*arguments)
    passed = case.slots[0][: 151 - window]
    for cache in (case.key_cache, case.value_cache):
        cache.view(-1, *cache.shape[2:])[passed] = torch.nan
    found = Kernels(interpreted_operations()).paged_attention(*arguments)
    assert relative_error(found, expected) <= 1e-5


def test_many_parts_are_joined() -> None:
    """Eighteen parts, more than are joined at once, the highest scores among the last, give what the whole gives."""
    shape = replace(BASE, queries=(1,), before=(1100,), num_kv_heads=1, has_sinks=True)
    case = make_case(shape, torch.float32, torch.float32)
    case.key_cache.view(-1, 64)[case.slots[0][-40:]] += case.query[0, 0]
    arguments = (case.query, case.key_cache, case.value_cache, case.batch, case.params)
    found = Kernels(interpreted_operations()).paged_attention(*arguments)
    assert relative_error(found, reference.paged_attention(*arguments)) <= 1e-5
