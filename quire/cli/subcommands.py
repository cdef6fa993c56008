"""Commands that consist of subcommands, each with flags and a help text of its own."""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from quire.settings_loader import USAGE_EXIT_CODE, load

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

from quire.settings import CommonSettings

SettingsT = TypeVar("SettingsT", bound=CommonSettings)
_HELP = ("--help", "-h")


class WrongUsage(Exception):
    """The flags are fine one by one but not together. The message is one line."""


@dataclass(frozen=True, slots=True)
class Subcommand(Generic[SettingsT]):
    """One of them; the first line of its settings' docstring is its help."""

    settings: type[SettingsT]
    run: Callable[[SettingsT], int]  # gives the exit status, may raise WrongUsage
    takes: str = ""  # what follows the name


def run_subcommand(
    group: str, about: str, subcommands: Mapping[str, Subcommand[Any]], argv: Sequence[str]
) -> int:
    """Run the one that `argv` names first; the process's exit status."""
    if argv and argv[0] in _HELP:
        print(_usage(group, about, subcommands))
        return 0
    if not argv or argv[0] not in subcommands:
        return _refuse(group, _what_instead(argv[0] if argv else "", subcommands))
    name, found = argv[0], subcommands[argv[0]]
    prog = f"{group} {name}"
    try:
        return found.run(load(found.settings, argv[1:], prog=prog))
    except WrongUsage as error:
        return _refuse(prog, str(error))


def _refuse(prog: str, message: str) -> int:
    print(f"error: {prog}: {message}", file=sys.stderr)
    return USAGE_EXIT_CODE


def _what_instead(word: str, subcommands: Mapping[str, Subcommand[Any]]) -> str:
    if not word or word.startswith("-"):
        return f"the first word is one of {', '.join(subcommands)}"
    nearest = difflib.get_close_matches(word, subcommands, n=1, cutoff=0.0)[0]
    return f"there is no {word!r}; did you mean {nearest!r}?"


def _usage(group: str, about: str, subcommands: Mapping[str, Subcommand[Any]]) -> str:
    width = max(len(f"{name} {found.takes}") for name, found in subcommands.items())
    lines = [
        f"  {f'{name} {found.takes}':{width}}  {(found.settings.__doc__ or '').splitlines()[0]}"
        for name, found in subcommands.items()
    ]
    return "\n".join(
        [
            f"usage: {group} SUBCOMMAND [flags]",
            "",
            about,
            "",
            *lines,
            "",
            f"`{group} SUBCOMMAND --help` lists the flags of a subcommand.",
        ]
    )
