"""Proof, at load, that a model computes all its attention through ours: what differs is refused in one sentence.

Some models keep their window only in a mask that they build themselves, call attention twice a layer, or mix in recurrent
layers. Served through block tables they would answer wrong without an error.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from compute_service.attention import NAME
from compute_service.forward import ForwardPass
from kernels.batch import PagedBatch
from kernels.launcher import Kernels
from quire.pool_layout import LayerGeometry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

_PROBE = "quire_probe"
_NUM_PROBE_TOKENS = 11
_CUTS = (
    (0, 6),
    (6, 10),
    (10, 11),
)  # chunks in which the probe runs again: two prefill chunks and a decode
_BLOCK_SIZE = 4
_NUM_PROBE_BLOCKS = -(-_NUM_PROBE_TOKENS // _BLOCK_SIZE)
_WINDOW_FIELDS = ("sliding_window", "attention_chunk_size", "sliding_window_size", "window_size")
# Largest difference of logits, as a share of the largest logit.
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}


class ModelRefused(Exception):
    """A checkpoint cannot be served; the message is one sentence with the reason."""


@dataclass(frozen=True, slots=True)
class _Call:
    """One attention call as it was seen."""

    layer_idx: int
    geometry: LayerGeometry
    sliding_window: int | None
    mask: object
    has_keywords: bool


@dataclass(slots=True)
class _Recorder:
    """Takes the place of attention and of the mask function during the probe."""

    calls: list[_Call] = field(default_factory=list)
    masks: dict[int, tuple[Tensor, Callable[..., Tensor]]] = field(default_factory=dict)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        sliding_window: int | None = None,
        **keywords: Any,  # noqa: ANN401 -- whatever the model passes
    ) -> tuple[Tensor, None]:
        """Note the call; the output is nothing."""
        geometry = LayerGeometry(key.shape[1], key.shape[3], value.shape[3])
        self.calls.append(
            _Call(
                int(getattr(module, "layer_idx", -1)),
                geometry,
                sliding_window,
                attention_mask,
                keywords.get("paged") is self,
            )
        )
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None

    def mask(self, *_: object, mask_function: Callable[..., Tensor], **__: object) -> Tensor:
        """A tensor of its own for each mask, so that it is known again."""
        mask = torch.zeros(1, 1, 1, 1)
        self.masks[id(mask)] = (mask, mask_function)
        return mask


def prove(model: nn.Module, device: torch.device, max_model_len: int) -> tuple[LayerGeometry, ...]:
    """Geometry of each KV layer; leaves the model with our attention in place.

    Args:
        model: loaded, with its own eager attention.
        device: where it is.
        max_model_len: longest sequence that will be served, in tokens.

    Raises:
        ModelRefused: when anything differs.
    """
    # On the model's own attention first: what it says is the reference.
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size  # type: ignore[union-attr,operator]
    token_ids = torch.randint(min(1000, vocab_size), (_NUM_PROBE_TOKENS,), generator=generator)
    token_ids = token_ids.to(device)
    with _refusing("it does not run"):
        expected = _own_logits(model, token_ids)
    with _refusing("it does not run with another attention"):
        recorder = _record(model, token_ids)
    layers = _check_calls(model, recorder)
    with _refusing("it does not run through block tables"):
        _check_logits(model, layers, token_ids, expected)
        _check_neighbours(model, layers, token_ids, max_model_len)
    return layers


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Whatever a model's code raises, it is refused in one sentence."""
    try:
        yield
    except ModelRefused:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelRefused(f"{what}: {type(error).__name__}: {reason}") from error


@torch.inference_mode()
def _own_logits(model: nn.Module, token_ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=token_ids.unsqueeze(0), use_cache=False).logits[0].float()
    return logits


@contextmanager
def _registered(recorder: _Recorder) -> Iterator[None]:
    # Each interface keeps one table for the whole process; the probe's entries leave it again.
    AttentionInterface.register(_PROBE, recorder.attend)
    AttentionMaskInterface.register(_PROBE, recorder.mask)
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop(_PROBE)  # noqa: SLF001 -- there is no public way to take one out
        AttentionMaskInterface._global_mapping.pop(_PROBE)  # noqa: SLF001 -- as above


@torch.inference_mode()
def _record(model: nn.Module, token_ids: Tensor) -> _Recorder:
    recorder = _Recorder()
    positions = torch.arange(len(token_ids), device=token_ids.device).unsqueeze(0)
    with _registered(recorder):
        model.set_attn_implementation(_PROBE)  # type: ignore[operator]
        try:
            model(
                input_ids=token_ids.unsqueeze(0),
                position_ids=positions,
                use_cache=False,
                paged=recorder,
            )
        finally:
            model.set_attn_implementation(NAME)  # type: ignore[operator]
    return recorder


def _check_calls(model: nn.Module, recorder: _Recorder) -> tuple[LayerGeometry, ...]:
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    called = [call.layer_idx for call in recorder.calls]
    if sorted(called) != list(range(config.num_hidden_layers)):
        raise ModelRefused(
            f"its {config.num_hidden_layers} layers called attention as layers {sorted(called)}, "
            "not each exactly once"
        )
    for call in recorder.calls:
        _check_call(call, recorder, config)
    ordered = sorted(recorder.calls, key=lambda call: call.layer_idx)
    return tuple(call.geometry for call in ordered)


def _check_call(call: _Call, recorder: _Recorder, config: object) -> None:
    if not call.has_keywords:
        raise ModelRefused(f"layer {call.layer_idx} does not pass keywords on to attention")
    known = recorder.masks.get(id(call.mask))
    if known is None:
        raise ModelRefused(f"layer {call.layer_idx} masks attention in a way of its own")
    difference = _mask_difference(known[1], call.sliding_window, config)
    if difference is not None:
        query, key = difference
        window = f"a window of {call.sliding_window}" if call.sliding_window else "no window"
        raise ModelRefused(
            f"layer {call.layer_idx} tells attention of {window}, but its mask decides otherwise whether "
            f"position {query} sees position {key}"
        )


def _mask_difference(
    mask_function: Callable[..., Tensor], sliding_window: int | None, config: object
) -> tuple[int, int] | None:
    """A pair (query, key) at which the mask differs from causal within the window."""
    zero = torch.tensor(0)
    for query, key in _edge_pairs(sliding_window, config):
        found = bool(mask_function(zero, zero, torch.tensor(query), torch.tensor(key)))
        if found != (key <= query and (not sliding_window or key > query - sliding_window)):
            return query, key
    return None


def _edge_pairs(sliding_window: int | None, config: object) -> Iterator[tuple[int, int]]:
    """Pairs around every edge that the config or the call names."""
    named = {getattr(config, name, None) for name in _WINDOW_FIELDS} | {sliding_window, 4, 1024}
    edges = [size for size in named if isinstance(size, int) and size > 0]
    for size in edges:
        for query in (size - 1, size, size + 1, 2 * size, 2 * size + 1):
            near = {query + shift - back for shift in (-1, 0, 1) for back in (0, *edges)}
            yield from ((query, key) for key in sorted(near | {0}) if 0 <= key <= 4 * max(edges))


def _check_logits(
    model: nn.Module, layers: Sequence[LayerGeometry], token_ids: Tensor, expected: Tensor
) -> None:
    """Two copies of the probe, packed side by side and run in chunks, against the model's own logits."""
    for logits in _paged_logits(model, layers, token_ids):
        difference = _excess(logits, expected, next(model.parameters()).dtype)
        if difference is not None:
            raise ModelRefused(
                f"through block tables its logits differ by {difference:.3g} from its own"
            )


def _check_neighbours(
    model: nn.Module, layers: Sequence[LayerGeometry], token_ids: Tensor, max_model_len: int
) -> None:
    """Beside a token at the last position that is served, the probe's logits must not change."""
    forward, count, device = _probe_pass(model, layers, token_ids), len(token_ids), token_ids.device
    tables = torch.arange(2 * _NUM_PROBE_BLOCKS, dtype=torch.int32, device=device).view(2, -1)
    positions = torch.arange(count, device=device)
    alone = forward(token_ids, positions, _batch(tables[:1], [(0, count)]), positions)
    # Only the position is far away: what it attends to is one slot of its own.
    last = torch.tensor([max_model_len - 1], device=device)
    beside = forward(
        torch.cat([token_ids[:1], token_ids]),
        torch.cat([last, positions]),
        _batch(tables.flip(0), [(0, 1), (0, count)]),
        positions + 1,
    )
    difference = _excess(beside, alone, next(model.parameters()).dtype)
    if difference is not None:
        raise ModelRefused(
            f"its logits change by {difference:.3g} when another sequence of {max_model_len} tokens runs beside; "
            "a shorter --max-model-len may avoid that"
        )


def _excess(found: Tensor, expected: Tensor, dtype: torch.dtype) -> float | None:
    """The largest difference when it is more than rounding."""
    difference = float((found - expected).abs().max())
    allowed = _TOLERANCES[dtype] * float(expected.abs().max())
    return None if difference <= allowed else difference


def _probe_pass(
    model: nn.Module, layers: Sequence[LayerGeometry], token_ids: Tensor
) -> ForwardPass:
    """A pass over a pool that holds the probe twice."""
    dtype, device = next(model.parameters()).dtype, token_ids.device
    shape = (2 * _NUM_PROBE_BLOCKS, _BLOCK_SIZE)
    caches = [
        (
            torch.zeros(*shape, layer.num_kv_heads, layer.k_head_dim, dtype=dtype, device=device),
            torch.zeros(*shape, layer.num_kv_heads, layer.v_head_dim, dtype=dtype, device=device),
        )
        for layer in layers
    ]
    return ForwardPass(model, Kernels.for_device(device), caches)


def _paged_logits(
    model: nn.Module, layers: Sequence[LayerGeometry], token_ids: Tensor
) -> tuple[Tensor, Tensor]:
    forward = _probe_pass(model, layers, token_ids)
    tables = torch.arange(2 * _NUM_PROBE_BLOCKS, dtype=torch.int32, device=token_ids.device)
    chunks = [
        _run_chunk(forward, token_ids, tables.view(2, -1), begin, end) for begin, end in _CUTS
    ]
    return torch.cat([first for first, _ in chunks]), torch.cat([second for _, second in chunks])


def _run_chunk(
    forward: ForwardPass, token_ids: Tensor, tables: Tensor, begin: int, end: int
) -> tuple[Tensor, Tensor]:
    """Logits of `[begin, end)` in both copies."""
    count = end - begin
    positions = torch.arange(begin, end, device=token_ids.device)
    batch = _batch(tables, [(begin, end), (begin, end)])
    every = torch.arange(2 * count, device=token_ids.device)
    logits = forward(token_ids[begin:end].repeat(2), positions.repeat(2), batch, every)
    return logits[:count], logits[count:]


def _batch(tables: Tensor, spans: Sequence[tuple[int, int]]) -> PagedBatch:
    """Rows that run positions `[begin, end)` of the sequences whose tables are given."""
    device = tables.device
    counts = [end - begin for begin, end in spans]
    slots = [
        table[positions // _BLOCK_SIZE].long() * _BLOCK_SIZE + positions % _BLOCK_SIZE
        for table, (begin, end) in zip(tables, spans, strict=True)
        for positions in (torch.arange(begin, end, device=device),)
    ]
    starts = [0, *accumulate(counts)]
    return PagedBatch(
        block_tables=tables,
        query_start=torch.tensor(starts, dtype=torch.int32, device=device),
        context_lens=torch.tensor([end for _, end in spans], dtype=torch.int32, device=device),
        slot_mapping=torch.cat(slots),
        num_decodes=sum(count == 1 for count in counts),
    )
