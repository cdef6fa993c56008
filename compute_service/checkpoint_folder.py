"""Where a checkpoint lies, and what shows without loading it that it cannot be served."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import safe_open

from compute_service.refusal import ModelRefused, refusing

_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def find_folder(name: str) -> Path:
    """The folder of a checkpoint, downloaded if `name` is no path; raises ModelRefused."""
    if _is_local(name):
        return _check_files(Path(name).resolve())
    try:
        return _check_files(Path(snapshot_download(name, allow_patterns=_HUB_FILES)))
    except ModelRefused:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        message = f"{name!r} is neither a folder nor to be had from the hub: {reason}"
        raise ModelRefused(message) from error


def check_if_local(name: str) -> None:
    """See whether the files of a folder can be read at all; raises ModelRefused. A name of the hub is left alone."""
    if not _is_local(name):
        return
    folder = _check_files(Path(name).resolve())
    with refusing("its config cannot be read"):
        json.loads((folder / "config.json").read_text())
    with refusing("it cannot be loaded"):
        for shard in folder.glob("*.safetensors"):
            with safe_open(shard, "numpy") as weights:
                weights.keys()


def _is_local(name: str) -> bool:
    is_path = Path(name).is_absolute() or name.startswith((".", "~"))
    if is_path and not Path(name).is_dir():
        raise ModelRefused(f"there is no model folder {name}")
    return Path(name).is_dir()


def _check_files(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelRefused(f"{folder} has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise ModelRefused(f"{folder} has no *.safetensors; other formats of weights are not read")
    return folder
