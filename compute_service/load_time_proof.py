"""Proof, at load, that a model computes all its attention through ours: what differs is refused in one sentence.

Some models keep their window only in a mask that they build themselves, call attention twice a layer, or mix in recurrent
layers. Served through block tables they would answer wrong without an error.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
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


def prove(model: nn.Module, device: torch.device) -> tuple[LayerGeometry, ...]:
    """Geometry of each KV layer; leaves the model with our attention in place.

    Raises:
        ModelRefused: when anything differs.
    """
    # On the model's own attention first: what it says is the reference.
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size  # type: ignore[union-attr,operator]
    token_ids = torch.randint(min(1000, vocab_size), (_NUM_PROBE_TOKENS,), generator=generator)
    token_ids = token_ids.to(device)
    expected = _own_logits(model, token_ids)
    layers = _check_calls(model, _record(model, token_ids))
    _check_logits(model, layers, token_ids, expected)
    return layers


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
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelRefused(
                f"the model does not run with another attention: {reason}"
            ) from error
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
        raise ModelRefused(
            f"layer {call.layer_idx} hides or shows other tokens than its sliding_window "
            f"{call.sliding_window} says: position {difference[0]} to {difference[1]}"
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
    found = _paged_logits(model, layers, token_ids)
    dtype = next(model.parameters()).dtype
    allowed = _TOLERANCES[dtype] * float(expected.abs().max())
    for logits in found:
        difference = float((logits - expected).abs().max())
        if not difference <= allowed:
            raise ModelRefused(
                f"through block tables its logits differ by {difference:.3g} from its own"
            )


def _paged_logits(
    model: nn.Module, layers: Sequence[LayerGeometry], token_ids: Tensor
) -> tuple[Tensor, Tensor]:
    dtype, device = next(model.parameters()).dtype, token_ids.device
    num_blocks = -(-_NUM_PROBE_TOKENS // _BLOCK_SIZE)
    caches = [
        tuple(
            torch.zeros(
                2 * num_blocks, _BLOCK_SIZE, layer.num_kv_heads, size, dtype=dtype, device=device
            )
            for size in (layer.k_head_dim, layer.v_head_dim)
        )
        for layer in layers
    ]
    forward = ForwardPass(model, Kernels.for_device(device), caches)  # type: ignore[arg-type]
    tables = torch.arange(2 * num_blocks, dtype=torch.int32, device=device).view(2, -1)
    chunks = [_run_chunk(forward, token_ids, tables, begin, end) for begin, end in _CUTS]
    return torch.cat([first for first, _ in chunks]), torch.cat([second for _, second in chunks])


def _run_chunk(
    forward: ForwardPass, token_ids: Tensor, tables: Tensor, begin: int, end: int
) -> tuple[Tensor, Tensor]:
    count, device = end - begin, token_ids.device
    positions = torch.arange(begin, end, device=device)
    slots = tables[:, positions // _BLOCK_SIZE].long() * _BLOCK_SIZE + positions % _BLOCK_SIZE
    batch = PagedBatch(
        block_tables=tables,
        query_start=torch.tensor([0, count, 2 * count], dtype=torch.int32, device=device),
        context_lens=torch.tensor([end, end], dtype=torch.int32, device=device),
        slot_mapping=slots.flatten(),
        num_decodes=2 if count == 1 else 0,
    )
    every = torch.arange(2 * count, device=device)
    logits = forward(token_ids[begin:end].repeat(2), positions.repeat(2), batch, every)
    return logits[:count], logits[count:]
