"""The operations in Triton, launched. What a kernel cannot do is refused before the launch, in one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

import torch
from triton import knobs

from kernels.checks import FP8
from kernels.triton_cache import copy_words, store_slots
from kernels.triton_decode import decode_parts, join_parts
from kernels.triton_prefill import prefill
from kernels.triton_tiling import Dims, Target, decode_tiling, num_parts, padded, prefill_tiling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from kernels.batch import AttentionParams, KvScales, PagedBatch

MAX_HEAD_DIM: Final = 256
MAX_GROUP: Final = 128
MAX_GRID: Final = 65_535  # of the second and third dimension
DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
_LEAST_CAPABILITY: Final = (8, 0)
_CONVERTING_CAPABILITY: Final = (8, 9)
_TILE_ELEMENTS: Final = 2048
_TILE_WORDS: Final = 1024
_TILE_PARTS: Final = 16
_WORD_PAIR_BYTES: Final = 16
# Read when the kernels are defined: that is when Triton decides it for each.
IS_INTERPRETED: Final = bool(knobs.runtime.interpret)
# Cache bits are shifted into a float16 whose exponent is 8 too small.
_BITS_FACTOR: Final = 256.0


@dataclass(frozen=True, slots=True)
class GpuTraits:
    """What decides how kernels are compiled and launched."""

    target: Target
    num_multiprocessors: int
    converts_fp8: bool  # e4m3 in hardware; else its bits are taken apart
    min_part_keys: int = (
        256  # in a shorter part, writing and joining it costs more than a split saves
    )

    @classmethod
    def of(cls, device: torch.device) -> GpuTraits:
        """Traits of a GPU that is there; raises ValueError for one that is too old."""
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return cls("gfx942", properties.multi_processor_count, converts_fp8=False)
        capability = torch.cuda.get_device_capability(device)
        if capability < _LEAST_CAPABILITY:
            _refuse(f"{properties.name} has compute capability {capability}; 8.0 is the least")
        target: Target = "sm_90" if capability >= (9, 0) else "sm_80"
        converts_fp8 = capability >= _CONVERTING_CAPABILITY
        return cls(target, properties.multi_processor_count, converts_fp8=converts_fp8)


class TritonOperations:
    """Launches the kernels of `kernels.triton_decode`, `kernels.triton_prefill` and `kernels.triton_cache`.

    Under TRITON_INTERPRET=1 they run on CPU tensors, slowly: that is how they are tested without a GPU.
    """

    def __init__(self, traits: GpuTraits, device: torch.device) -> None:
        self._traits = traits
        # What a kernel is given in place of sinks or scales that it will not read.
        self._unread = torch.zeros(1, dtype=torch.float32, device=device)

    def store_kv(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
        scales: KvScales | None,
    ) -> None:
        """See `kernels.reference.store_kv`."""
        _check_tensors(key, value, key_cache, value_cache, slot_mapping)
        num_kv_heads, k_dim, v_dim = key.shape[1], key.shape[2], value.shape[2]
        tile_heads = min(padded(num_kv_heads), _TILE_ELEMENTS // padded(max(k_dim, v_dim)))
        key_scales, value_scales = _scale_tensors(scales, self._unread)
        key_cache, value_cache = _as_bits(key_cache), _as_bits(value_cache)
        store_slots[(len(slot_mapping), -(-num_kv_heads // tile_heads))](
            key,
            value,
            key_cache,
            value_cache,
            key_scales,
            value_scales,
            slot_mapping,
            num_kv_heads,
            *key.stride()[:2],
            *value.stride()[:2],
            *key_cache.stride()[1:3],
            *value_cache.stride()[1:3],
            K_DIM=k_dim,
            V_DIM=v_dim,
            K_PAD=padded(k_dim),
            V_PAD=padded(v_dim),
            TILE_HEADS=tile_heads,
            HAS_SCALES=scales is not None,
        )

    def copy_blocks(
        self, caches: Sequence[tuple[Tensor, Tensor]], copies: Sequence[tuple[int, int]]
    ) -> None:
        """See `kernels.reference.copy_blocks`."""
        arrays = [cache for layer in caches for cache in layer]
        pairs = []
        for cache in arrays:
            block_bytes = cache.stride(0) * cache.element_size()
            if block_bytes % _WORD_PAIR_BYTES or cache.data_ptr() % _WORD_PAIR_BYTES:
                _refuse(f"blocks of {block_bytes} bytes are not aligned to {_WORD_PAIR_BYTES}")
            pairs.append(block_bytes // _WORD_PAIR_BYTES)
        device = arrays[0].device
        copy_words[(len(copies), len(arrays))](
            torch.tensor([cache.data_ptr() for cache in arrays], dtype=torch.int64).to(device),
            torch.tensor(pairs, dtype=torch.int64).to(device),
            torch.tensor(copies, dtype=torch.int64).to(device),
            TILE_WORDS=_TILE_WORDS,
        )

    def paged_attention(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: PagedBatch,
        params: AttentionParams,
    ) -> Tensor:
        """See `kernels.reference.paged_attention`."""
        _check_tensors(query, key_cache, value_cache, batch.block_tables, batch.context_lens)
        _check_limits(query, key_cache, value_cache, batch)
        shape = (*query.shape[:2], value_cache.shape[3])
        out = torch.empty(shape, dtype=query.dtype, device=query.device)
        launch = _Launch(self._traits, self._unread, query, key_cache, value_cache, batch, params)
        if batch.num_decodes:
            launch.decode(out)
        if batch.num_decodes < len(batch.context_lens):
            launch.prefill(out)
        return out


class _Launch:
    """What both attention kernels are given, made once a call."""

    def __init__(
        self,
        traits: GpuTraits,
        unread: Tensor,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: PagedBatch,
        params: AttentionParams,
    ) -> None:
        self._traits, self._query, self._batch, self._params = traits, query, batch, params
        takes_bits = key_cache.dtype == FP8 and not traits.converts_fp8
        scales = _scale_tensors(params.kv_scales, unread)
        self._scales = tuple(scale * _BITS_FACTOR for scale in scales) if takes_bits else scales
        self._key_cache = _as_bits(key_cache) if takes_bits else key_cache
        self._value_cache = _as_bits(value_cache) if takes_bits else value_cache
        self._sinks = unread if params.sinks is None else params.sinks.detach().float().contiguous()
        self._group = query.shape[1] // key_cache.shape[2]
        self._dims = Dims(
            key_cache.shape[3],
            value_cache.shape[3],
            self._group,
            query.element_size(),
            key_cache.element_size(),
        )

    def decode(self, out: Tensor) -> None:
        """The first `num_decodes` tokens of `out`."""
        count, num_heads, v_dim = self._batch.num_decodes, *out.shape[1:]
        num_kv_heads = num_heads // self._group
        splits = num_parts(
            count * num_kv_heads,
            self._traits.num_multiprocessors,
            self._seen_keys() // self._traits.min_part_keys,
        )
        logs = out.new_empty(count, num_heads, splits, dtype=torch.float32)
        parts = out if splits == 1 else logs.new_empty(count, num_heads, splits, v_dim)
        tiling = decode_tiling(self._traits.target, self._dims)
        batch, query = self._batch, self._query
        decode_parts[(num_kv_heads, splits, count)](
            query,
            self._key_cache,
            self._value_cache,
            batch.block_tables,
            batch.context_lens,
            self._sinks,
            *self._scales,
            parts,
            logs,
            *self._run_time_params(),
            splits,
            batch.block_tables.stride(0),
            *query.stride()[:2],
            *self._key_cache.stride()[:3],
            *self._value_cache.stride()[:3],
            **self._constants(),
            TILE_ROWS=tiling.tile_rows,
            TILE_KEYS=tiling.tile_keys,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
            enable_fp_fusion=True,
        )
        if splits > 1:
            join_parts[(count * num_heads,)](
                parts,
                logs,
                out,
                splits,
                V_DIM=v_dim,
                V_PAD=padded(v_dim),
                TILE_PARTS=_TILE_PARTS,
            )

    def prefill(self, out: Tensor) -> None:
        """The tokens of `out` behind the first `num_decodes`."""
        batch, query = self._batch, self._query
        num_kv_heads = query.shape[1] // self._group
        tiling = prefill_tiling(self._traits.target, self._dims)
        num_tiles = -(-batch.max_query_len // (tiling.tile_rows // self._group))
        prefill[(num_tiles, num_kv_heads, len(batch.context_lens) - batch.num_decodes)](
            query,
            self._key_cache,
            self._value_cache,
            batch.block_tables,
            batch.query_start,
            batch.context_lens,
            self._sinks,
            *self._scales,
            out,
            *self._run_time_params(),
            batch.num_decodes,
            batch.block_tables.stride(0),
            *query.stride()[:2],
            *self._key_cache.stride()[:3],
            *self._value_cache.stride()[:3],
            *out.stride()[:2],
            **self._constants(),
            TILE_ROWS=tiling.tile_rows,
            TILE_KEYS=tiling.tile_keys,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
            enable_fp_fusion=True,
        )

    def _seen_keys(self) -> int:
        window = self._params.sliding_window
        longest = self._batch.max_context_len
        return min(longest, window) if window else longest

    def _run_time_params(self) -> tuple[float, float, int, int]:
        params = self._params
        return (
            params.scale,
            params.soft_cap,
            params.sliding_window,
            int(params.sinks is not None),
        )

    def _constants(self) -> dict[str, int | bool]:
        dims = self._dims
        return {
            "GROUP": dims.group,
            "K_DIM": dims.k_dim,
            "V_DIM": dims.v_dim,
            "K_PAD": padded(dims.k_dim),
            "V_PAD": padded(dims.v_dim),
            "BLOCK_SIZE": self._key_cache.shape[1],
            "HAS_CAP": self._params.soft_cap > 0,
            "HAS_SCALES": self._params.kv_scales is not None,
        }


def _scale_tensors(scales: KvScales | None, unread: Tensor) -> tuple[Tensor, ...]:
    return (unread, unread) if scales is None else (scales.key, scales.value)


def _as_bits(cache: Tensor) -> Tensor:
    return cache.view(torch.uint8) if cache.dtype == FP8 else cache


def _check_tensors(*tensors: Tensor) -> None:
    device = tensors[0].device
    for tensor in tensors:
        if tensor.device != device:
            _refuse(f"tensors lie on {device} and on {tensor.device}")
        if tensor.stride(-1) != 1:
            _refuse(f"the last dimension of a tensor {tuple(tensor.shape)} is not contiguous")
    if device.type != "cuda" and not IS_INTERPRETED:
        _refuse(f"tensors lie on {device}; without TRITON_INTERPRET=1 Triton needs a GPU")


def _check_limits(query: Tensor, key_cache: Tensor, value_cache: Tensor, batch: PagedBatch) -> None:
    if query.dtype not in DTYPES:
        _refuse(f"queries are {query.dtype}; bfloat16, float16 and float32 are computed")
    widest = max(key_cache.shape[3], value_cache.shape[3])
    if widest > MAX_HEAD_DIM:
        _refuse(f"head_dim {widest} is above {MAX_HEAD_DIM}")
    group = query.shape[1] // key_cache.shape[2]
    if group > MAX_GROUP:
        _refuse(f"{group} query heads share a kv head; {MAX_GROUP} may")
    if max(len(batch.context_lens), key_cache.shape[2]) > MAX_GRID:
        _refuse(f"a step has more than {MAX_GRID} sequences or kv heads")


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
