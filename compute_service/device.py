"""Where the model runs: the device, its kernels, and where the KV pool lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kernels.launcher import AttentionKernel, Kernels
from quire.serving import StartupError

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class ComputeDevice:
    """A device that is there."""

    torch_device: torch.device
    kernels: Kernels
    holds_pool: bool  # in the device's memory, not in that of the memory service
    wait_for_kernels: Callable[[], None] = lambda: None  # that are being compiled


def open_device(name: str, attention_kernel: AttentionKernel = "compiled") -> ComputeDevice:
    """The device "cpu" or "cuda", and what runs attention on it; raises StartupError when it cannot be used."""
    if name == "cuda" and not torch.cuda.is_available():
        raise StartupError(f"--device cuda: {_why_no_gpu()}; --device cpu needs no GPU")
    device = torch.device(name)
    try:
        kernels = Kernels.for_device(device, attention_kernel)
    except ValueError as error:
        raise StartupError(f"--device {name}: {error}") from error
    return ComputeDevice(device, kernels, holds_pool=device.type != "cpu")


def _why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"the installed PyTorch {torch.__version__} is built without GPU support"
    return "PyTorch sees no GPU"
