"""Ahead-of-time compilation, in a process of its own: this one may have an interpreter in place of the compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "compile_kernels.py"


def test_kernels_compile_without_a_gpu_and_do_not_spill(tmp_path: Path) -> None:
    """Every kernel for sm_90: 16-byte loads, tensor cores, no spilled register.

    In its commonest shape: `make check` compiles others too, and for all targets.
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(TOOL), "--plain", "--target", "sm_90"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for kernel, instruction in (("decode_parts", "mma m16n8k16"), ("prefill", "wgmma")):
        assert any(kernel in line and instruction in line for line in lines)
