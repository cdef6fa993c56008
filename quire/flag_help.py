"""How `--help` names what a flag takes: by what it means, not by its type in Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from pydantic import BaseModel

_OF_TYPE = {
    "str": "TEXT",
    "int": "N",
    "float": "N",
    "ByteSize": "SIZE",
    "Path": "PATH",
    "tuple[str,...]": "TEXT",
}
_OF_ENDING = {"_address": "ADDRESS", "listen": "ADDRESS", "_s": "SECONDS"}
# Said of a flag that is left out, and no news to anybody.
_NO_DEFAULTS = (" (default: None)", " (default: ())", " (default: False)")


@dataclass(frozen=True, slots=True)
class Takes:
    """Annotates a field with the word for what its flag takes."""

    word: str


def add_argument_for(cls: type[BaseModel]) -> Callable[..., argparse.Action]:
    """`ArgumentParser.add_argument` for the fields of `cls`, in words for people."""

    def add_argument(
        parser: argparse.ArgumentParser,
        *names: str,
        **options: Any,  # noqa: ANN401 -- argparse's own
    ) -> argparse.Action:
        name = str(options.get("dest", names[0]))
        if "metavar" in options and name in cls.model_fields:
            options["metavar"] = _word(cls, name, options["metavar"])
        for default in _NO_DEFAULTS:
            options["help"] = options.get("help", "").removesuffix(default)
        return parser.add_argument(*names, **options)

    return add_argument


def _word(cls: type[BaseModel], name: str, metavar: str) -> str:
    for found in cls.model_fields[name].metadata:
        if isinstance(found, Takes):
            return found.word
    for ending, word in _OF_ENDING.items():
        if name.endswith(ending):
            return word
    return _OF_TYPE.get(metavar, metavar)
