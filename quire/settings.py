"""Settings of every process and command; `quire.settings_loader` reads them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from pydantic_settings import BaseSettings, CliPositionalArg, CliSuppress, SettingsConfigDict

ENV_PREFIX = "QUIRE_"

MAX_BLOCK_SIZE = 256
OFF = "off"  # in place of an address
# gRPC keeps names that begin with its own for itself.
_METADATA_KEY = re.compile(r"(?!grpc-)[a-z0-9_.-]+")


def _power_of_two(value: int) -> int:
    if not 1 <= value <= MAX_BLOCK_SIZE or value & (value - 1):
        message = f"must be a power of two from 1 to {MAX_BLOCK_SIZE}"
        raise ValueError(message)
    return value


def _off_is_a_word(value: object) -> object:
    """In YAML a bare `off` is false."""
    return OFF if value is False else value


def _metadata_key(value: str) -> str:
    if not _METADATA_KEY.fullmatch(value) or value.endswith("-bin") or value == "authorization":
        message = "must be a key of text metadata, in small letters, e.g. x-quire-tenant"
        raise ValueError(message)
    return value


BlockSize = Annotated[int, AfterValidator(_power_of_two)]
MetadataKey = Annotated[str, AfterValidator(_metadata_key)]
MetricsAddress = Annotated[str, BeforeValidator(_off_is_a_word)]
DEFAULT_MEMORY_BUDGET = ByteSize(1 << 30)
DEFAULT_LOG_COMPACT_SIZE = ByteSize(2 << 20)  # folded in a fifth of a second
DEFAULT_LOG_HISTORY = ByteSize(64 << 20)
DEFAULT_ROUTER_ADDRESS = "127.0.0.1:7071"


class CommonSettings(BaseSettings):
    """What all processes share."""

    model_config = SettingsConfigDict(
        defer_build=True, env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe level that is logged"
    )


class ServiceSettings(CommonSettings):
    """What the three services share."""

    log_format: Literal["console", "json"] = Field(
        "console", description="logs for people or machines"
    )
    shutdown_grace_s: PositiveFloat = Field(
        10.0, description="seconds that running calls get to end at a stop"
    )
    parent_pid: CliSuppress[PositiveInt | None] = Field(
        None, description="end when the process with this id, our parent, ends"
    )


class _PoolSettings(BaseSettings, defer_build=True):
    """The KV pool."""

    memory_budget: ByteSize = Field(
        DEFAULT_MEMORY_BUDGET,
        description="size of the KV pool, e.g. 512MiB; on a GPU, of its memory",
    )
    state_dir: Path | None = Field(
        None,
        description="folder that outlives memory, best on tmpfs; without it the pool leaves nothing",
    )
    prefix_cache: bool = Field(True, description="keep full blocks of ended sequences for reuse")
    min_partial_tokens: NonNegativeInt = Field(
        4, description="copy a partly matching block when that saves so many tokens; 0: never"
    )
    log_compact_size: ByteSize = Field(
        DEFAULT_LOG_COMPACT_SIZE,
        description="with a state folder: size at which the log of changes is folded into a snapshot",
    )
    log_history: ByteSize = Field(
        DEFAULT_LOG_HISTORY,
        description="with a state folder: most bytes of older logs that are kept for quire replay",
    )


class _ModelSettings(BaseSettings, defer_build=True):
    """The model and how it runs."""

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
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="where the model runs; cuda: the first visible NVIDIA or AMD GPU"
    )
    num_threads: PositiveInt | None = Field(None, description="CPU threads; unset: all cores")
    packed_weights: bool = Field(
        True,
        description="on the CPU, lay bfloat16 weights out for its products at load; off: torch's own products",
    )
    attention_kernel: Literal["compiled", "reference"] = Field(
        "compiled",
        description="what computes attention; reference: plain torch, slow, to tell a kernel's mistake from a model's",
    )
    fused_ops: bool = Field(
        True,
        description="on the CPU, compute bfloat16 norms, gates and rotary positions in one pass each; off: as torch does",
    )
    fused_layers: bool = Field(
        True,
        description="on a CPU without bfloat16 instructions, run layers made of these in one call each; off: one by one",
    )
    trust_remote_code: bool = Field(
        False, description="run Python code that comes with the checkpoint"
    )


class _ResumptionSettings(BaseSettings, defer_build=True):
    """How the compute service outlives the memory service."""

    memory_patience_s: PositiveFloat = Field(
        30.0, description="seconds that compute goes on without memory until it ends too"
    )


class _SchedulingSettings(BaseSettings, defer_build=True):
    """What runs and what waits."""

    max_num_seqs: PositiveInt = Field(64, description="sequences that run at once")
    max_num_batched_tokens: PositiveInt = Field(512, description="token budget of a step")
    watermark: float = Field(
        0.01, ge=0, lt=1, description="share of the pool that admissions leave over"
    )
    queue_limit: PositiveInt = Field(1024, description="sequences that may wait")
    steps_in_flight: int = Field(
        2, ge=1, le=2, description="steps sent ahead: with 2 the device never waits for the router"
    )
    served_model_name: str | None = Field(
        None, description="name told to clients; unset: the folder's"
    )


class _StreamingSettings(BaseSettings, defer_build=True):
    """How output reaches clients."""

    stream_interval_ms: NonNegativeFloat = Field(
        0.0,
        description="milliseconds from one message of a stream to its next; 0: tokens go as they come",
    )


class _TenantSettings(BaseSettings, defer_build=True):
    """Who a call belongs to; without any of it all calls belong to one tenant."""

    tenants: Path | None = Field(
        None, description="YAML file: tenant to the SHA-256 digests of its bearer tokens"
    )
    tenant_metadata: MetadataKey | None = Field(
        None,
        description="key of call metadata in which a trusted gateway names the tenant, e.g. x-quire-tenant",
    )


class _CompatSettings(BaseSettings, defer_build=True):
    """Under which names metrics are told."""

    metrics_compat: Literal["none", "vllm"] = Field(
        "none",
        description="the router's metrics also under the names that dashboards of vLLM ask for",
    )


class MemorySettings(_PoolSettings, ServiceSettings):
    """Run the memory service: it owns the KV pool and answers questions about it."""

    listen: tuple[str, ...] = Field(
        ("127.0.0.1:7072",), description="addresses: host:port or unix:/path; may be repeated"
    )
    metrics_listen: MetricsAddress = Field(
        "127.0.0.1:7082", description="address of GET /metrics: host:port, or off"
    )
    descriptor_socket: Path = Field(
        Path("/tmp/quire-descriptor.sock"),  # noqa: S108 -- a default for people; the socket checks who connects
        description="Unix socket that hands out the pool's file descriptor",
    )
    lease_ttl_s: PositiveFloat = Field(
        10.0, description="seconds that a session outlives its broken stream"
    )
    max_num_rows: PositiveInt = Field(4096, description="rows that all sessions may hold together")


class ComputeSettings(_ModelSettings, _ResumptionSettings, ServiceSettings):
    """Run the compute service: it loads a model and runs the steps of one router."""

    listen: tuple[str, ...] = Field(
        ("127.0.0.1:7073",), description="addresses: host:port or unix:/path; may be repeated"
    )
    metrics_listen: MetricsAddress = Field(
        "127.0.0.1:7083", description="address of GET /metrics: host:port, or off"
    )
    memory_address: str = Field("127.0.0.1:7072", description="address of the memory service")


class RouterSettings(
    _SchedulingSettings, _StreamingSettings, _TenantSettings, _CompatSettings, ServiceSettings
):
    """Run the router: clients talk to it, it asks the memory and the compute service."""

    listen: tuple[str, ...] = Field(
        ("127.0.0.1:7071",), description="addresses: host:port or unix:/path; may be repeated"
    )
    metrics_listen: MetricsAddress = Field(
        "127.0.0.1:7081", description="address of GET /metrics: host:port, or off"
    )
    memory_address: str = Field("127.0.0.1:7072", description="address of the memory service")
    compute_address: str = Field("127.0.0.1:7073", description="address of the compute service")


class UpSettings(
    _ModelSettings,
    _ResumptionSettings,
    _PoolSettings,
    _SchedulingSettings,
    _StreamingSettings,
    _TenantSettings,
    _CompatSettings,
    ServiceSettings,
):
    """Serve a model: start memory service, compute service and router, until Ctrl-C."""

    listen: str = Field(
        DEFAULT_ROUTER_ADDRESS, description="address of the router: host:port or unix:/path"
    )
    metrics: bool = Field(
        True,
        description="serve GET /metrics of router, memory and compute: on its port + 10, + 11 and + 12",
    )


class DemoSettings(CommonSettings):
    """Show all of it with the packaged model: three services, a streamed completion, a shared prefix; then end."""

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "warning", description="least severe level that the services log"
    )


class SamplingFlags(CommonSettings):
    """What the commands that ask the router share."""

    router_address: str = Field(DEFAULT_ROUTER_ADDRESS, description="address of the router")
    token: str | None = Field(
        None,
        description="bearer token, where the router asks for one; better as QUIRE_TOKEN, which no process list shows",
    )
    timeout_s: PositiveFloat = Field(300.0, description="seconds to wait for a whole answer")
    max_tokens: PositiveInt | None = Field(None, description="most output tokens")
    temperature: float | None = Field(None, description="0 is greedy; unset: 1")
    top_p: float | None = Field(None, description="least probability mass that is considered")
    top_k: int | None = Field(None, description="most tokens that are considered; 0: all")
    seed: int | None = Field(None, description="the same seed gives the same output")


class GenerateSettings(SamplingFlags):
    """Continue a text and print the continuation as it comes."""

    prompt: CliPositionalArg[str] = Field(description="the text; - reads it from standard input")
    stop: tuple[str, ...] = Field((), description="output ends before this text; may be repeated")
    ignore_eos: bool = Field(False, description="go on past the model's own end tokens")


class ChatSettings(SamplingFlags):
    """Talk to the model; an empty line or Ctrl-D ends."""

    system: str | None = Field(None, description="what the model is told before the first message")


ALL_SETTINGS: tuple[type[CommonSettings], ...] = (
    MemorySettings,
    ComputeSettings,
    RouterSettings,
    UpSettings,
    GenerateSettings,
    ChatSettings,
)
