"""What a model asks of attention: its calls and masks, recorded in one run and checked."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from compute_service.attention import NAME
from compute_service.refusal import ModelRefused
from quire.pool_layout import LayerGeometry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

_PROBE = "quire_probe"
_WINDOW_FIELDS = ("sliding_window", "attention_chunk_size", "sliding_window_size", "window_size")


@dataclass(frozen=True, slots=True)
class _Call:
    """One attention call as it was seen."""

    layer_idx: int
    geometry: LayerGeometry
    sliding_window: int | None
    mask: object
    has_keywords: bool


@dataclass(slots=True)
class Recorder:
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


@contextmanager
def _registered(recorder: Recorder) -> Iterator[None]:
    # Each interface keeps one table for the whole process; the probe's entries leave it again.
    AttentionInterface.register(_PROBE, recorder.attend)
    AttentionMaskInterface.register(_PROBE, recorder.mask)
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop(_PROBE)  # noqa: SLF001 -- there is no public way to take one out
        AttentionMaskInterface._global_mapping.pop(_PROBE)  # noqa: SLF001 -- as above


@torch.inference_mode()
def record(model: nn.Module, token_ids: Tensor) -> Recorder:
    """One run of `token_ids`, int64 `[T]`, in which every call and mask is noted; leaves our attention in place."""
    recorder = Recorder()
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


def check_calls(model: nn.Module, recorder: Recorder) -> tuple[LayerGeometry, ...]:
    """Geometry of each layer, in order.

    Raises:
        ModelRefused: when a layer did not call once, kept our keywords or mask to itself, or means another mask than
            causal within the window that it named.
    """
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


def _check_call(call: _Call, recorder: Recorder, config: object) -> None:
    if not call.has_keywords:
        raise ModelRefused(f"layer {call.layer_idx} does not pass keywords on to attention")
    known = recorder.masks.get(id(call.mask))
    if known is None:
        raise ModelRefused(f"layer {call.layer_idx} masks attention in a way of its own")
    difference = _mask_difference(known[1], call.sliding_window, config)
    if difference is not None:
        query, key = difference
        if key > query:
            raise ModelRefused(
                f"layer {call.layer_idx} lets position {query} see a later one, {key}"
            )
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
