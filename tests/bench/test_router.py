"""The router's benchmark stays alive; how fast it finds it is not tested."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_runs() -> None:
    """Tokens reach clients one by one and together, and the router's functions are found at work."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.router", "--quick"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("│")[1:-1] for line in done.stdout.splitlines() if line.startswith("│")]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    together, as_they_come = cells["tokens a message"]
    assert float(together) > float(as_they_come) >= 1
    assert all(float(cell) > 0 for cell in cells["own Python of the router, us a token"])
