"""Reads settings: flags, then `QUIRE_*` variables, then a YAML file, then defaults (pydantic-settings)."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    YamlConfigSettingsSource,
)

from quire.flag_help import add_argument_for
from quire.inspection_settings import INSPECTION_SETTINGS
from quire.settings import ALL_SETTINGS, ENV_PREFIX, CommonSettings

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CONFIG_VARIABLE = "QUIRE_CONFIG"
USAGE_EXIT_CODE = 2
_SERVICE_LINK = re.compile(
    r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$"
)

SettingsT = TypeVar("SettingsT", bound=CommonSettings)


def load(cls: type[SettingsT], argv: Sequence[str], *, prog: str) -> SettingsT:
    """Settings of `cls` from flags, variables, the file that `--config` or QUIRE_CONFIG names, and defaults.

    Anything unknown or out of range ends the process with one line on stderr and status 2.
    """
    arguments, config = _take_config(list(argv))
    _check_flags(cls, arguments, prog)
    _check_variables(prog)
    if config is not None:
        _check_file(cls, config, prog)

    class Loaded(cls):  # type: ignore[valid-type,misc]
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,  # noqa: ARG003 -- the library passes it by position
            env_settings: PydanticBaseSettingsSource,
            **_others: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            """Flags first, the file last."""
            flags: CliSettingsSource[CommonSettings] = CliSettingsSource(
                settings_cls,
                cli_parse_args=arguments,
                root_parser=_parser(cls, prog),
                add_argument_method=add_argument_for(cls),
                cli_kebab_case=True,
                cli_implicit_flags=True,
                cli_hide_none_type=True,
                cli_avoid_json=True,
            )
            file = [YamlConfigSettingsSource(settings_cls, config)] if config else []
            return (flags, env_settings, *file)

    Loaded.__name__, Loaded.__doc__ = cls.__name__, cls.__doc__
    try:
        return Loaded()
    except ValidationError as error:
        _refuse(prog, _in_words(cls, error))


def _in_words(cls: type[CommonSettings], error: ValidationError) -> str:
    found = error.errors()[0]
    field = str(found["loc"][0]) if found["loc"] else ""
    # Every field but the words of a command has a default.
    is_positional = field in cls.model_fields and cls.model_fields[field].is_required()
    name = field.upper() if is_positional else f"--{field.replace('_', '-')}"
    if found["type"] == "missing":
        return f"{name} is missing or empty"
    return f"{name}: {found['msg']} (got {found['input']!r})"


class _OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage of thirty flags above it."""

    def error(self, message: str) -> NoReturn:
        _refuse(self.prog, message)


def _parser(cls: type[CommonSettings], prog: str) -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog=prog,
        description=cls.__doc__,
        epilog=f"Each flag is also a variable ({ENV_PREFIX}LOG_LEVEL for --log-level) or a key of the YAML file.",
    )
    # `_take_config` has read it already; here it shows up in the help.
    parser.add_argument(
        "--config", metavar="FILE", help=f"YAML file of settings ({CONFIG_VARIABLE})"
    )
    return parser


def _take_config(argv: list[str]) -> tuple[list[str], Path | None]:
    path = os.environ.get(CONFIG_VARIABLE)
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            path = next(arguments, "")
        elif argument.startswith("--config="):
            path = argument.partition("=")[2]
        else:
            rest.append(argument)
    return rest, Path(path) if path else None


def _check_flags(cls: type[CommonSettings], arguments: list[str], prog: str) -> None:
    names = [f"--{name.replace('_', '-')}" for name in cls.model_fields]
    switches = [f"--no-{name[2:]}" for name in names]
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag not in {*names, *switches, "--help"}:
            _refuse_unknown(prog, "flag", flag, [*names, "--config", "--help"])


def _check_variables(prog: str) -> None:
    """A variable may be meant for another command, so all names are known to all."""
    fields = {name for cls in ALL_SETTINGS + INSPECTION_SETTINGS for name in cls.model_fields}
    names = [f"{ENV_PREFIX}{name.upper()}" for name in fields] + [CONFIG_VARIABLE]
    for variable, value in os.environ.items():
        is_ours = variable.startswith(ENV_PREFIX) and not _is_service_link(variable, value)
        if is_ours and variable not in names:
            _refuse_unknown(prog, "variable", variable, names)


def _is_service_link(variable: str, value: str) -> bool:
    """Whether Kubernetes made the variable, as it does in every Pod for each Service: quire-router, for one."""
    is_address = variable.endswith("_PORT") and value.startswith(("tcp://", "udp://"))
    return is_address or _SERVICE_LINK.search(variable) is not None


def _check_file(cls: type[CommonSettings], path: Path, prog: str) -> None:
    if not path.is_file():
        _refuse(prog, f"the configuration file {path} does not exist")
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        _refuse(prog, f"{path} is not YAML: {' '.join(str(error).split())}")
    if not isinstance(keys, dict):
        _refuse(prog, f"{path} must hold a mapping of settings to values")
    for key in keys:
        if key not in cls.model_fields:
            _refuse_unknown(prog, f"key in {path}", str(key), cls.model_fields)


def _refuse_unknown(prog: str, kind: str, name: str, known: Iterable[str]) -> NoReturn:
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    _refuse(prog, f"unknown {kind} {name}; did you mean {nearest[0]}?")


def _refuse(prog: str, message: str) -> NoReturn:
    print(f"error: {prog}: {message}", file=sys.stderr)  # noqa: T201 -- all that the user sees of a wrong setting
    sys.exit(USAGE_EXIT_CODE)
