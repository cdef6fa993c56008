"""The kernels' benchmark stays alive; how fast it finds them is not tested."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "kernels.py"


@pytest.mark.parametrize("flags", [(), ("--fp8",)], ids=["bfloat16", "fp8"])
def test_the_benchmark_runs_without_a_gpu(flags: tuple[str, ...], tmp_path: Path) -> None:
    """From any folder it prints both tables, in which the kernels agree with the reference."""
    command = [sys.executable, str(BENCH), "--device", "cpu", "--quick", *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("│")]
    assert len(rows) == 4
    errors = [float(row.split("│")[-2]) for row in rows]
    assert max(errors) < 1e-2
