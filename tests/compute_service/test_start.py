"""The compute service before it has an engine."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
from processes import free_port

PROGRAM = (
    "import sys, compute_service.__main__; print(*{'torch', 'transformers'} & set(sys.modules))"
)


def test_what_is_said_before_the_engine_needs_no_torch() -> None:
    """Help and errors of settings and files come before the seconds that torch and transformers take to import."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "\n"


def has_torch(pid: int) -> bool:
    return any("libtorch" in region.path for region in psutil.Process(pid).memory_maps())


def test_a_stop_while_it_imports_ends_it_with_status_0() -> None:
    """SIGTERM as soon as torch is there, at whatever module it is then: no trace, nothing left running."""
    listen = f"127.0.0.1:{free_port()}"
    with subprocess.Popen(
        [sys.executable, "-m", "compute_service", "--listen", listen],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not has_torch(process.pid):
            time.sleep(0.01)
        process.terminate()
        _, told = process.communicate(timeout=10)
    assert (process.returncode, told) == (0, "")
