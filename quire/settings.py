"""Settings of every process: flags, then `QUIRE_*` variables, then a YAML file, then defaults (pydantic-settings)."""

from __future__ import annotations

import difflib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn, TypeVar

from pydantic import AfterValidator, ByteSize, Field, PositiveFloat, PositiveInt, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ENV_PREFIX = "QUIRE_"
CONFIG_VARIABLE = "QUIRE_CONFIG"
USAGE_EXIT_CODE = 2

MAX_BLOCK_SIZE = 256


def _power_of_two(value: int) -> int:
    if not 1 <= value <= MAX_BLOCK_SIZE or value & (value - 1):
        message = f"must be a power of two from 1 to {MAX_BLOCK_SIZE}"
        raise ValueError(message)
    return value


BlockSize = Annotated[int, AfterValidator(_power_of_two)]
DEFAULT_MEMORY_BUDGET = ByteSize(1 << 30)


class CommonSettings(BaseSettings):
    """What all processes share."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe level that is logged"
    )
    log_format: Literal["console", "json"] = Field(
        "console", description="logs for people or machines"
    )
    shutdown_grace_s: PositiveFloat = Field(
        10.0, description="seconds that running calls get to end at a stop"
    )


class MemorySettings(CommonSettings):
    """Settings of the memory service."""

    listen: tuple[str, ...] = Field(
        ("127.0.0.1:7072",), description="addresses: host:port or unix:/path; may be repeated"
    )
    descriptor_socket: Path = Field(
        Path("/tmp/quire-descriptor.sock"),  # noqa: S108 -- a default for people; the socket checks who connects
        description="Unix socket that hands out the pool's file descriptor",
    )
    memory_budget: ByteSize = Field(
        DEFAULT_MEMORY_BUDGET, description="size of the KV pool, e.g. 512MiB"
    )
    state_dir: Path | None = Field(
        None, description="folder on tmpfs for the pool's file; without it the pool leaves nothing"
    )
    prefix_cache: bool = Field(True, description="keep full blocks of ended sequences for reuse")
    lease_ttl_s: PositiveFloat = Field(
        10.0, description="seconds that a session outlives its broken stream"
    )
    max_num_seqs: PositiveInt = Field(4096, description="rows that all sessions may hold together")


class ComputeSettings(CommonSettings):
    """Settings of the compute service."""

    listen: tuple[str, ...] = Field(
        ("127.0.0.1:7073",), description="addresses: host:port or unix:/path; may be repeated"
    )
    memory_address: str = Field("127.0.0.1:7072", description="address of the memory service")
    model: str = Field(
        "demo", description="folder or hub name of the checkpoint; demo: the packaged one"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="element type of weights and KV cache; auto: the checkpoint's own"
    )
    block_size: BlockSize = Field(16, description="token slots a block")
    max_model_len: PositiveInt | None = Field(
        None, description="longest sequence served, in tokens; unset: the model's own limit"
    )
    device: Literal["cpu"] = Field("cpu", description="where the model runs")
    num_threads: PositiveInt | None = Field(None, description="CPU threads; unset: all cores")
    trust_remote_code: bool = Field(
        False, description="run Python code that comes with the checkpoint"
    )


class RouterSettings(CommonSettings):
    """Settings of the router."""

    listen: tuple[str, ...] = Field(
        ("127.0.0.1:7071",), description="addresses: host:port or unix:/path; may be repeated"
    )
    memory_address: str = Field("127.0.0.1:7072", description="address of the memory service")
    compute_address: str = Field("127.0.0.1:7073", description="address of the compute service")
    max_num_seqs: PositiveInt = Field(64, description="sequences that run at once")
    max_num_batched_tokens: PositiveInt = Field(512, description="token budget of a step")
    watermark: float = Field(
        0.01, ge=0, lt=1, description="share of the pool that admissions leave over"
    )
    queue_limit: PositiveInt = Field(1024, description="sequences that may wait")
    served_model_name: str | None = Field(
        None, description="name told to clients; unset: the folder's"
    )


class UpSettings(CommonSettings):
    """Settings of all three services together."""

    listen: str = Field("127.0.0.1:7071", description="address of the router, host:port")
    model: str = Field(
        "demo", description="folder or hub name of the checkpoint; demo: the packaged one"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="element type of weights and KV cache; auto: the checkpoint's own"
    )
    memory_budget: ByteSize = Field(
        DEFAULT_MEMORY_BUDGET, description="size of the KV pool, e.g. 512MiB"
    )
    block_size: BlockSize = Field(16, description="token slots a block")
    max_num_seqs: PositiveInt = Field(64, description="sequences that run at once")
    max_num_batched_tokens: PositiveInt = Field(512, description="token budget of a step")
    max_model_len: PositiveInt | None = Field(
        None, description="longest sequence served, in tokens; unset: the model's own limit"
    )
    served_model_name: str | None = Field(
        None, description="name told to clients; unset: the folder's"
    )
    state_dir: Path | None = Field(
        None, description="folder on tmpfs for the pool's file; without it the pool leaves nothing"
    )
    prefix_cache: bool = Field(True, description="keep full blocks of ended sequences for reuse")
    watermark: float = Field(
        0.01, ge=0, lt=1, description="share of the pool that admissions leave over"
    )
    queue_limit: PositiveInt = Field(1024, description="sequences that may wait")
    num_threads: PositiveInt | None = Field(None, description="CPU threads; unset: all cores")
    trust_remote_code: bool = Field(
        False, description="run Python code that comes with the checkpoint"
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
                cli_prog_name=prog,
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
        found = error.errors()[0]
        name = "-".join(str(part) for part in found["loc"][:1]).replace("_", "-")
        _refuse(prog, f"--{name}: {found['msg']} (got {found['input']!r})")


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
            _refuse_unknown(prog, "flag", flag, names)


def _check_variables(prog: str) -> None:
    """A variable may be meant for another of the three processes, so all names are known to all."""
    fields = {
        name
        for cls in (MemorySettings, ComputeSettings, RouterSettings)
        for name in cls.model_fields
    }
    names = [f"{ENV_PREFIX}{name.upper()}" for name in fields] + [CONFIG_VARIABLE]
    for variable in os.environ:
        if variable.startswith(ENV_PREFIX) and variable not in names:
            _refuse_unknown(prog, "variable", variable, names)


def _check_file(cls: type[CommonSettings], path: Path, prog: str) -> None:
    if not path.is_file():
        _refuse(prog, f"the configuration file {path} does not exist")
    for key in YamlConfigSettingsSource(cls, path)():
        if key not in cls.model_fields:
            _refuse_unknown(prog, f"key in {path}", str(key), cls.model_fields)


def _refuse_unknown(prog: str, kind: str, name: str, known: Iterable[str]) -> NoReturn:
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    _refuse(prog, f"unknown {kind} {name}; did you mean {nearest[0]}?")


def _refuse(prog: str, message: str) -> NoReturn:
    print(f"error: {prog}: {message}", file=sys.stderr)  # noqa: T201 -- all that the user sees of a wrong setting
    sys.exit(USAGE_EXIT_CODE)
