"""The Triton kernels on CPU tensors: Triton's interpreter, made fit for bfloat16.

Whether a kernel is interpreted is decided when it is defined: import this before `kernels.triton_gpu`.
"""

from __future__ import annotations

import os
import sys
from typing import Any

assert "kernels.triton_gpu" not in sys.modules, "import triton_interpreter first"
# It stays: the interpreter imports more of Triton while it runs. Programs that tests start and that compile take it out.
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from kernels.triton_gpu import GpuTraits, TritonOperations

_create_dot = interpreter.InterpreterBuilder.create_dot


def _dot_of_floats(builder: Any, a: Any, b: Any, *others: Any) -> Any:
    """The interpreter's own dot multiplies the bit patterns of bfloat16 as integers (seen in 3.6 and 3.9)."""
    return _create_dot(builder, _as_float32(a), _as_float32(b), *others)


def _as_float32(handle: Any) -> Any:
    if handle.dtype != tl.bfloat16:
        return handle
    wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(wide, tl.float32)


interpreter.InterpreterBuilder.create_dot = _dot_of_floats


def interpreted_operations(*, converts_fp8: bool = True) -> TritonOperations:
    """The operations as for a small GPU; contexts are split in short parts, so that few keys show what many would."""
    traits = GpuTraits("sm_90", num_multiprocessors=4, converts_fp8=converts_fp8, min_part_keys=32)
    return TritonOperations(traits, torch.device("cpu"))
