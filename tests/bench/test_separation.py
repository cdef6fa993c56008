"""The benchmark of the split stays alive; how little the split costs is not tested."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_runs() -> None:
    """Both sides run a round, and the table says how they compare."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.separation", "--quick"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("│")]
    assert len(rows) == 2
    assert "router" in rows[1]
    assert " % (" in rows[1]
