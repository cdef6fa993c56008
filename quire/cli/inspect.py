"""`quire inspect`: questions to the memory service, each with its answer as a table or as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.message import Message

from quire.cli import inspect_tables as tables
from quire.cli.inspect_watch import watch
from quire.cli.memory import address_of, prompt_of, reporting_memory_errors
from quire.cli.output import make_console, print_json, say
from quire.cli.subcommands import Subcommand, WrongUsage, run_subcommand
from quire.client import PoolInspector
from quire.inspection_settings import (
    InspectBlockSettings,
    InspectBlocksSettings,
    InspectExplainSettings,
    InspectIntegritySettings,
    InspectPoolSettings,
    InspectProbeSettings,
    InspectRetentionsSettings,
    InspectSequenceSettings,
    InspectSequencesSettings,
    InspectSettings,
    InspectTenantsSettings,
    InspectWatchSettings,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

AnswerT = TypeVar("AnswerT", bound="Message | Sequence[Message]")


def inspect(argv: Sequence[str]) -> int:
    """Answer one question; the process's exit status."""
    about = "Look into the memory service's pool while it serves; nothing is changed."
    return run_subcommand("quire inspect", about, _SUBCOMMANDS, argv)


def _answer(
    settings: InspectSettings,
    ask: Callable[[PoolInspector], AnswerT],
    draw: Callable[[Console, AnswerT], None],
) -> int:
    with (
        reporting_memory_errors(settings) as outcome,
        PoolInspector(address_of(settings), timeout_s=settings.timeout_s) as inspector,
    ):
        answer = ask(inspector)
        if settings.output == "json":
            print_json([answer] if isinstance(answer, Message) else answer)
        else:
            draw(make_console(), answer)
    return outcome.status


def _pool(settings: InspectPoolSettings) -> int:
    return _answer(
        settings, lambda inspector: inspector.get_pool(tenant=settings.tenant), tables.draw_pool
    )


def _sequences(settings: InspectSequencesSettings) -> int:
    return _answer(
        settings,
        lambda inspector: list(
            inspector.list_sequences(
                request_id=settings.request, session_id=settings.session, tenant=settings.tenant
            )
        ),
        tables.draw_sequences,
    )


def _sequence(settings: InspectSequenceSettings) -> int:
    return _answer(
        settings,
        lambda inspector: inspector.get_sequence(settings.sequence_id, tenant=settings.tenant),
        tables.draw_sequence,
    )


def _blocks(settings: InspectBlocksSettings) -> int:
    return _answer(
        settings,
        lambda inspector: list(
            inspector.list_blocks(
                state=settings.state,
                min_ref_count=settings.min_ref_count,
                block_hash_prefix=settings.hash_prefix,
                sequence_id=settings.sequence,
                retained=settings.retained,
                min_idle_seconds=settings.min_idle_s,
                tenant=settings.tenant,
            )
        ),
        tables.draw_blocks,
    )


def _block(settings: InspectBlockSettings) -> int:
    return _answer(
        settings,
        lambda inspector: inspector.get_block(settings.block_id, tenant=settings.tenant),
        tables.draw_block,
    )


def _tenants(settings: InspectTenantsSettings) -> int:
    return _answer(
        settings,
        lambda inspector: inspector.list_tenants(tenant=settings.tenant),
        tables.draw_tenants,
    )


def _retentions(settings: InspectRetentionsSettings) -> int:
    return _answer(
        settings,
        lambda inspector: inspector.list_retentions(tenant=settings.tenant),
        tables.draw_retentions,
    )


def _probe(settings: InspectProbeSettings) -> int:
    token_ids = prompt_of(settings)
    return _answer(
        settings,
        lambda inspector: inspector.probe_prefix(token_ids, tenant=settings.tenant),
        lambda console, answer: tables.draw_probe(console, answer, len(token_ids)),
    )


def _explain(settings: InspectExplainSettings) -> int:
    if (settings.sequence is None) == (settings.block is None):
        message = "name what is asked about with --sequence or --block, one of them"
        raise WrongUsage(message)
    return _answer(
        settings,
        lambda inspector: inspector.explain(
            sequence_id=settings.sequence or "", block_id=settings.block, tenant=settings.tenant
        ),
        tables.draw_explanations,
    )


def _integrity(settings: InspectIntegritySettings) -> int:
    with (
        reporting_memory_errors(settings) as outcome,
        PoolInspector(address_of(settings), timeout_s=settings.timeout_s) as inspector,
    ):
        findings = inspector.check_integrity()
        if settings.output == "json":
            print(json.dumps({"findings": findings}))
        else:
            say(make_console(), "\n".join(findings) or "the pool's books agree")
        outcome.status = 1 if findings else 0
    return outcome.status


_SUBCOMMANDS: dict[str, Subcommand[Any]] = {
    "pool": Subcommand(InspectPoolSettings, _pool),
    "sequences": Subcommand(InspectSequencesSettings, _sequences),
    "sequence": Subcommand(InspectSequenceSettings, _sequence, takes="ID"),
    "blocks": Subcommand(InspectBlocksSettings, _blocks),
    "block": Subcommand(InspectBlockSettings, _block, takes="N"),
    "tenants": Subcommand(InspectTenantsSettings, _tenants),
    "retentions": Subcommand(InspectRetentionsSettings, _retentions),
    "probe": Subcommand(InspectProbeSettings, _probe),
    "explain": Subcommand(InspectExplainSettings, _explain),
    "integrity": Subcommand(InspectIntegritySettings, _integrity),
    "watch": Subcommand(InspectWatchSettings, watch),
}
