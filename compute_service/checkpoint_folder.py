"""Where a checkpoint lies, and what shows without loading it that it cannot be served."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import safe_open

from compute_service.refusal import ModelRefused, refusing

_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
_INDEX = "model.safetensors.index.json"


def find_folder(name: str) -> Path:
    """The folder of a checkpoint, downloaded if `name` is no path; raises ModelRefused."""
    if (folder := _local_folder(name)) is not None:
        return folder
    try:
        return _check_files(Path(snapshot_download(name, allow_patterns=_HUB_FILES)))
    except ModelRefused:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        message = f"{name!r} is neither a folder nor to be had from the hub: {reason}"
        raise ModelRefused(message) from error


def check_local_files(name: str) -> None:
    """See whether config and weights in a folder can be read at all; a name of the hub is left alone.

    Raises:
        ModelRefused: when there is no such folder or one of its files is broken.
    """
    folder = _local_folder(name)
    if folder is None:
        return
    with refusing("its config cannot be read"):
        json.loads((folder / "config.json").read_text())
    for shard in _shards(folder):
        with refusing(f"it cannot be loaded, {shard} is broken"):
            safe_open(folder / shard, "numpy")


def _shards(folder: Path) -> list[str]:
    """Names of the files that hold the weights: those of the index, if there is one."""
    index = folder / _INDEX
    if not index.is_file():
        return sorted(found.name for found in folder.glob("*.safetensors"))
    with refusing(f"it cannot be loaded, {_INDEX} is broken"):
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))


def _local_folder(name: str) -> Path | None:
    """The folder, if `name` is one; raises ModelRefused if it is written as a path and is none."""
    folder = Path(name)
    if folder.is_dir():
        return _check_files(folder.resolve())
    if folder.is_absolute() or name.startswith((".", "~")):
        raise ModelRefused(f"there is no model folder {name}")
    return None


def _check_files(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelRefused(f"{folder} has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise ModelRefused(f"{folder} has no *.safetensors; other formats of weights are not read")
    return folder
