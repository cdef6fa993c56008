"""Proof, at load, that a model computes all its attention through ours: what differs is refused in one sentence.

Some models keep their window only in a mask that they build themselves, call attention twice a layer, or mix in recurrent
layers. Served through block tables they would answer wrong without an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compute_service.attention_record import check_calls, record
from compute_service.paged_probe import PagedProbe
from compute_service.refusal import refusing

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compute_service.device import ComputeDevice
    from compute_service.fast_paths import FastPaths
    from quire.pool_layout import LayerGeometry

_NUM_PROBE_TOKENS = 11
# Two prefill chunks and a decode.
_CUTS = ((0, 6), (6, 10), (10, 11))


def prove(
    model: nn.Module, device: ComputeDevice, max_model_len: int, fast_paths: FastPaths
) -> tuple[LayerGeometry, ...]:
    """Geometry of each KV layer; leaves the model with our attention and the fast paths in place.

    Args:
        model: loaded, with its own eager attention.
        device: where it is, and whose kernels compute.
        max_model_len: longest sequence that will be served, in tokens.
        fast_paths: what is replaced once the model's own logits are known, so that the probe proves it too.

    Raises:
        ModelRefused: when anything differs.
    """
    # On the model's own attention first: what it says is the reference.
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size  # type: ignore[union-attr,operator]
    token_ids = torch.randint(min(1000, vocab_size), (_NUM_PROBE_TOKENS,), generator=generator)
    token_ids = token_ids.to(device.torch_device)
    with refusing("it does not run"):
        expected = _own_logits(model, token_ids)
    with refusing("it does not run with another attention"):
        recorder = record(model, token_ids)
    layers = check_calls(model, recorder)
    device.wait_for_kernels()
    fast_paths.apply(model, device.kernels)
    with refusing("it does not run through block tables"):
        probe = PagedProbe(model, device.kernels, layers, token_ids)
        probe.check_logits(expected, _CUTS)
        probe.check_neighbours(max_model_len)
    return layers


@torch.inference_mode()
def _own_logits(model: nn.Module, token_ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=token_ids.unsqueeze(0), use_cache=False).logits[0].float()
    return logits
