"""What decides whether two processes compute the same keys and values."""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

KV_FORMAT_VERSION: Final = 1
_HEADER_LENGTH_BYTES: Final = 8
_NUM_SAMPLES: Final = 16
_SAMPLE_BYTES: Final = 4096


def fingerprint(folder: Path, *, max_model_len: int) -> str:
    """Hexadecimal digest of config, safetensors headers, sizes and sampled bytes, served length and format version."""
    digest = blake2b(digest_size=16)
    digest.update(json.dumps([KV_FORMAT_VERSION, max_model_len]).encode())
    digest.update((folder / "config.json").read_bytes())
    for shard in sorted(folder.glob("*.safetensors")):
        digest.update(_shard_evidence(shard))
    return digest.hexdigest()


def _shard_evidence(shard: Path) -> bytes:
    size = shard.stat().st_size
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
        parts = [str(size).encode(), file.read(length)]
        for index in range(_NUM_SAMPLES):
            file.seek(index * max(0, size - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1))
            parts.append(file.read(_SAMPLE_BYTES))
    return b"".join(parts)
