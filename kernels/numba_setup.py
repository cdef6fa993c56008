"""numba as our kernels use it: on torch's own threads, with a cache that notices every edit.

numba keeps machine code under the file of the function that was compiled; an edit in a file that it calls into goes
unnoticed. So the cache is a folder named by the digest of all of them.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cache
from pathlib import Path

import numba

# First: with this threading layer numba's threads are those of torch's OpenMP runtime, and neither disturbs the other.
import torch  # noqa: F401
from numba import carray, cfunc, njit, prange

__all__ = ["cache_folder", "carray", "cfunc", "njit", "prange"]

_SOURCES = ("numba_*.py", "simd.py")


@cache
def cache_folder() -> Path:
    """Where what these sources compile to is kept: under NUMBA_CACHE_DIR, else among the user's caches."""
    digest = hashlib.blake2b(digest_size=8)
    for pattern in _SOURCES:
        for path in sorted(Path(__file__).parent.glob(pattern)):
            digest.update(path.read_bytes())
    return _base() / digest.hexdigest()


def _base() -> Path:
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        return Path(chosen)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "quire" / "numba"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        # A read-only root: compiled once per boot is better than once per process.
        return Path(tempfile.gettempdir()) / f"quire-numba-{os.getuid()}"
    return folder


numba.config.THREADING_LAYER = "omp"
numba.config.CACHE_DIR = str(cache_folder())
