"""Settings of the commands that look into the pool and that change how it is shared."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 -- pydantic looks it up
from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from pydantic_settings import CliPositionalArg, NoDecode

from quire.flag_help import Takes
from quire.settings import DEFAULT_ROUTER_ADDRESS, CommonSettings

MAX_PRIORITY = 7


def _split(value: object) -> object:
    """A flag and a variable are words, a key of the file may be a list."""
    return value.split(",") if isinstance(value, str) else value


_SequenceId = Annotated[str | None, Takes("ID")]
_BlockId = Annotated[NonNegativeInt | None, Takes("N")]
_TenantName = Annotated[str | None, Takes("NAME")]


class MemoryFlags(CommonSettings):
    """What the commands that ask the memory service share."""

    memory_address: str | None = Field(
        None, description="address of the memory service; unset: that of `quire up`"
    )
    router_address: str = Field(
        DEFAULT_ROUTER_ADDRESS, description="router whose `quire up` is meant"
    )


class _AskingFlags(MemoryFlags):
    """A question or a wish, and its answer."""

    output: Literal["table", "json"] = Field(
        "table", description="for people, or one JSON document a line"
    )
    timeout_s: PositiveFloat = Field(10.0, description="seconds to wait for the answer")


class PromptFlags(MemoryFlags):
    """A prompt, as tokens or as text."""

    text: str | None = Field(
        None, description="the prompt, which the router turns into tokens; - reads standard input"
    )
    tokens: Annotated[
        tuple[NonNegativeInt, ...] | None, NoDecode, BeforeValidator(_split), Takes("ID,ID,...")
    ] = Field(None, description="the prompt's token ids")
    token: str | None = Field(
        None,
        description="bearer token for --text, where the router asks for one; better as QUIRE_TOKEN",
    )


class InspectSettings(_AskingFlags):
    """Look into the memory service's pool while it serves."""

    tenant: _TenantName = Field(None, description="only what is this tenant's; unset: all")


class InspectPoolSettings(InspectSettings):
    """Count the blocks, and say what is found, wasted, retained and logged."""


class InspectSequencesSettings(InspectSettings):
    """List the live sequences, by id."""

    request: Annotated[str, Takes("ID")] = Field("", description="only sequences of this request")
    session: Annotated[str, Takes("ID")] = Field("", description="only sequences of this session")


class InspectSequenceSettings(InspectSettings):
    """Show one sequence with its block table."""

    sequence_id: CliPositionalArg[str] = Field(description="id, as `quire inspect sequences` shows")


class InspectBlocksSettings(InspectSettings):
    """List blocks, by id; the filters must all hold."""

    state: Literal["free", "cached", "used", "null"] | None = Field(
        None, description="only blocks in this state"
    )
    min_ref_count: NonNegativeInt = Field(
        0, description="only blocks that so many tables hold, or more"
    )
    hash_prefix: Annotated[str, Takes("HEX")] = Field(
        "", description="only blocks whose key begins with these digits"
    )
    sequence: Annotated[str, Takes("ID")] = Field(
        "", description="only blocks in this sequence's table"
    )
    retained: bool = Field(False, description="only blocks that a retention protects")
    min_idle_s: NonNegativeFloat = Field(
        0.0, description="only blocks that nobody used for so many seconds"
    )


class InspectBlockSettings(InspectSettings):
    """Show one block with all who hold it."""

    block_id: CliPositionalArg[NonNegativeInt] = Field(description="which block")


class InspectTenantsSettings(InspectSettings):
    """List what each tenant holds and may hold."""


class InspectRetentionsSettings(InspectSettings):
    """List what is retained and which prefixes are published."""


class InspectProbeSettings(InspectSettings, PromptFlags):
    """Say how much of a prompt would hit the prefix cache now; nothing is touched."""

    tenant: _TenantName = Field(None, description="tenant whose prompt it would be")


class InspectExplainSettings(InspectSettings):
    """Tell why a sequence was refused or released, or a block evicted, newest first."""

    sequence: _SequenceId = Field(None, description="the sequence, live or not")
    block: _BlockId = Field(None, description="the block")


class InspectIntegritySettings(_AskingFlags):
    """Check that the pool's books agree; status 1 when they do not."""


class InspectWatchSettings(MemoryFlags):
    """Print every change of the pool as it happens, a line each, until Ctrl-C."""

    output: Literal["table", "json"] = Field(
        "table", description="lines for people, or one JSON document a line"
    )
    resume_token: Annotated[str, Takes("TOKEN")] = Field(
        "", description="go on behind the answer that had this token; unset: begin with a snapshot"
    )


class TopSettings(MemoryFlags):
    """Show the pool live: its blocks, sequences, tenants and rates; q or Ctrl-C ends."""

    interval_s: PositiveFloat = Field(0.5, description="seconds between two pictures")
    once: bool = Field(
        False, description="print one picture after the interval and end; so it is in a pipe"
    )
    tenant: _TenantName = Field(
        None, description="only this tenant's sequences; the rest is of the whole pool"
    )
    timeout_s: PositiveFloat = Field(10.0, description="seconds to wait for the first picture")


class ControlSettings(_AskingFlags):
    """Change how tenants share the pool."""

    tenant: _TenantName = Field(
        None, description="whom the wish is for; unset: the tenant of all who have none"
    )


class QuotaSettings(_AskingFlags):
    """Set both quotas of a tenant at once: a quota that is not given is taken away."""

    tenant: CliPositionalArg[str] = Field(
        "", description="whose quotas; left out: the tenant of all who have none"
    )
    soft: NonNegativeInt | None = Field(
        None, description="blocks above which its own are evicted before those of others"
    )
    hard: PositiveInt | None = Field(None, description="blocks that it never exceeds")
    none: bool = Field(False, description="take both quotas away")


class RetainSettings(ControlSettings, PromptFlags):
    """Keep blocks of a live sequence, or of a cached prompt, from being evicted first."""

    sequence: _SequenceId = Field(None, description="a live sequence")
    priority: Annotated[int, Takes("1..7")] = Field(
        1, ge=1, le=MAX_PRIORITY, description="the higher, the later they are evicted"
    )
    ttl_s: PositiveFloat | None = Field(
        None, description="seconds until it ends by itself; unset: until `quire control release`"
    )


class ReleaseSettings(ControlSettings):
    """End a retention: its blocks stay cached and are evicted in their turn."""

    retention_id: CliPositionalArg[str] = Field(
        description="id, as `quire inspect retentions` shows"
    )


class FlushSettings(ControlSettings, PromptFlags):
    """Forget cached content: what begins with a prompt, or all of a tenant."""

    all: bool = Field(False, description="all cached content of the tenant")


class PublishSettings(ControlSettings, PromptFlags):
    """Let all tenants share the full blocks of a prompt, from the next admission on."""


class WithdrawSettings(ControlSettings):
    """End the sharing of a published prompt."""

    prefix_id: CliPositionalArg[str] = Field(description="id, as `quire inspect retentions` shows")


class ReplaySettings(CommonSettings):
    """Show the pool as it was at any revision that its log knows."""

    log: CliPositionalArg[Path] = Field(description="a state folder, or a log in one")
    what: CliPositionalArg[Literal["pool", "sequences", "sequence", "blocks", "records"]] = Field(
        "pool", description="what to show; records: every change, a line each"
    )
    sequence_id: CliPositionalArg[str | None] = Field(
        None, description="which sequence, for `sequence`"
    )
    revision: Annotated[NonNegativeInt | None, Takes("N")] = Field(
        None, description="as of this revision; unset: the last one"
    )
    output: Literal["table", "json"] = Field(
        "table", description="for people, or one JSON document a line"
    )


INSPECTION_SETTINGS: tuple[type[CommonSettings], ...] = (
    InspectSequencesSettings,
    InspectSequenceSettings,
    InspectBlocksSettings,
    InspectBlockSettings,
    InspectProbeSettings,
    InspectExplainSettings,
    InspectWatchSettings,
    TopSettings,
    QuotaSettings,
    RetainSettings,
    ReleaseSettings,
    FlushSettings,
    PublishSettings,
    WithdrawSettings,
    ReplaySettings,
)
