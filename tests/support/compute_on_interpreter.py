"""`quire compute --device cuda` without a GPU: the same kernels, interpreted, and a pool in this process's own memory.

Run as a program, with the flags of `quire compute`.
"""

from __future__ import annotations

import torch
from triton_interpreter import interpreted_operations

from compute_service import process
from compute_service.__main__ import end, main
from compute_service.device import ComputeDevice
from kernels.launcher import Kernels


def open_device(name: str, _attention_kernel: str) -> ComputeDevice:
    """What the service gets in place of the GPU."""
    assert name == "cuda"
    kernels = Kernels(interpreted_operations())
    return ComputeDevice(torch.device("cpu"), kernels, holds_pool=True)


if __name__ == "__main__":
    process.open_device = open_device
    end(main())
