"""A checkpoint folder or hub name to a model that is proven to be served right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compute_service import attention
from compute_service.checkpoint_folder import find_folder
from compute_service.fast_paths import EVERY_FAST_PATH, FastPaths
from compute_service.fingerprint import fingerprint
from compute_service.load_time_proof import prove
from compute_service.refusal import ModelRefused, refusing

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from compute_service.device import ComputeDevice
    from quire.pool_layout import LayerGeometry

_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model, ready to run through `compute_service.forward`."""

    folder: Path
    model: nn.Module
    architecture: str
    layers: tuple[LayerGeometry, ...]
    dtype: torch.dtype
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    fingerprint: str


def load_model(
    name: str,
    *,
    dtype: str,
    max_model_len: int | None,
    trust_remote_code: bool,
    device: ComputeDevice,
    fast_paths: FastPaths = EVERY_FAST_PATH,
) -> LoadedModel:
    """Load and prove a model.

    Raises:
        ModelRefused: when there is no such checkpoint or it cannot be served right; one sentence.
    """
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    attention.register()
    folder = find_folder(name)
    config = _load_config(folder, trust_remote_code=trust_remote_code)
    text_config = config.get_text_config()
    served_len = _served_length(text_config, max_model_len)
    _check_config(config, text_config)
    model = _load_weights(folder, dtype, device.torch_device, trust_remote_code=trust_remote_code)
    _check_class(model)
    fix_longrope(model, served_len)
    layers = prove(model, device, served_len, fast_paths)
    return LoadedModel(
        folder=folder,
        model=model,
        architecture=type(model).__name__,
        layers=layers,
        dtype=next(model.parameters()).dtype,
        max_model_len=served_len,
        vocab_size=text_config.vocab_size,
        eos_token_ids=_eos_token_ids(model),
        fingerprint=fingerprint(folder, max_model_len=served_len),
    )


def _load_config(folder: Path, *, trust_remote_code: bool) -> Any:  # noqa: ANN401 -- configs of transformers share no typed fields
    with refusing("its config cannot be read"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _served_length(text_config: Any, wanted: int | None) -> int:  # noqa: ANN401 -- see _load_config
    limit: int | None = getattr(text_config, "max_position_embeddings", None)
    if limit is None:
        limit = getattr(text_config, "n_positions", None)
    if wanted is None and limit is None:
        raise ModelRefused("its config names no longest sequence; set --max-model-len")
    if wanted is not None and limit is not None and wanted > limit:
        raise ModelRefused(f"--max-model-len {wanted} is above the model's own limit of {limit}")
    return wanted or limit or 0


def _check_config(config: Any, text_config: Any) -> None:  # noqa: ANN401 -- see _load_config
    if getattr(config, "is_encoder_decoder", False):
        raise ModelRefused(f"{config.model_type} is an encoder-decoder; only decoders are served")
    others = set(getattr(text_config, "layer_types", None) or ()) - _LAYER_TYPES
    if others:
        raise ModelRefused(f"it has layers of type {', '.join(sorted(others))}")
    if "dynamic" in _rope_types(getattr(text_config, "rope_parameters", None) or {}):
        raise ModelRefused("its RoPE scaling is dynamic: positions would depend on the neighbours")


def _rope_types(parameters: dict[str, Any]) -> set[str]:
    """Kinds of RoPE scaling, which may be given for each type of layer."""
    each = [found for found in parameters.values() if isinstance(found, dict)] or [parameters]
    return {str(found.get("rope_type", "default")) for found in each}


def _load_weights(
    folder: Path, dtype: str, device: torch.device, *, trust_remote_code: bool
) -> nn.Module:
    with refusing("it cannot be loaded"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers would go on with random numbers in their place.
        raise ModelRefused(f"its files lack {len(missing)} weights, among them {missing[0]}")
    ready: nn.Module = model.to(device).eval()
    return ready


def _check_class(model: nn.Module) -> None:
    if getattr(model, "_is_stateful", False):
        raise ModelRefused(
            f"{type(model).__name__} has recurrent layers, whose state is no KV cache"
        )
    if not getattr(model.config, "is_decoder", True) and "ForCausalLM" not in type(model).__name__:
        raise ModelRefused(f"{type(model).__name__} is no decoder")


def fix_longrope(model: nn.Module, max_model_len: int) -> None:
    """Choose the factors of longrope once, by the served length.

    transformers chooses them in every pass by the longest position of the packed row, so that a long neighbour would
    move everybody's positions.
    """
    for module in model.modules():
        if getattr(module, "rope_type", None) == "longrope":
            _fix_rotary(module, max_model_len)


def _fix_rotary(module: Any, max_model_len: int) -> None:  # noqa: ANN401 -- every model has a class of its own for it
    module.inv_freq, module.attention_scaling = ROPE_INIT_FUNCTIONS["longrope"](
        module.config, module.inv_freq.device, seq_len=max_model_len
    )
    module.rope_type = "default"


def _eos_token_ids(model: nn.Module) -> tuple[int, ...]:
    found: Any = model.generation_config.eos_token_id  # type: ignore[union-attr]
    if found is None:
        found = model.config.get_text_config().eos_token_id  # type: ignore[union-attr,operator]
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list | tuple) else (int(found),)
