"""The memory service's benchmark stays alive; how fast it finds it is not tested."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_runs() -> None:
    """All three parts print their tables; after a kill every cached token hits."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", "--quick"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("│")]
    assert len(rows) == 5
    assert "100.0%" in rows[-1]
