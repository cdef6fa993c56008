"""Finding the memory service, and asking it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from quire.cli.errors import INTERRUPTED, reporting_errors
from quire.cli.subcommands import WrongUsage
from quire.client import Client
from quire.run_folder import memory_address

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from quire.cli.errors import Outcome
    from quire.inspection_settings import MemoryFlags, PromptFlags


def address_of(settings: MemoryFlags) -> str:
    """Where the memory service listens."""
    return settings.memory_address or memory_address(settings.router_address)


def reporting_memory_errors(
    settings: MemoryFlags, *, interrupted: int = INTERRUPTED
) -> AbstractContextManager[Outcome]:
    """`reporting_errors` for the memory service."""
    return reporting_errors(
        address_of(settings), named_by="--memory-address", interrupted=interrupted
    )


def tokens_of(settings: PromptFlags) -> list[int] | None:
    """The prompt that the flags give, None for none; the router turns text into tokens.

    Ends the process with one line when the router does not.

    Raises:
        WrongUsage: both `--text` and `--tokens` are given, or the prompt is empty.
    """
    if settings.text is not None and settings.tokens is not None:
        message = "--text and --tokens are two ways to give one prompt; use one"
        raise WrongUsage(message)
    if settings.text is None and settings.tokens is None:
        return None
    found = settings.tokens if settings.text is None else _tokenize(settings, settings.text)
    # To some calls an empty prompt would mean all prompts.
    if not found:
        message = "the prompt has no tokens"
        raise WrongUsage(message)
    return list(found)


def _tokenize(settings: PromptFlags, text: str) -> Sequence[int]:
    with (
        reporting_errors(settings.router_address) as outcome,
        Client(settings.router_address, token=settings.token) as client,
    ):
        return client.tokenize(sys.stdin.read() if text == "-" else text)
    sys.exit(outcome.status)


def prompt_of(settings: PromptFlags) -> list[int]:
    """As `tokens_of`, where a prompt must be given."""
    found = tokens_of(settings)
    if found is None:
        message = "give the prompt with --text or --tokens"
        raise WrongUsage(message)
    return found
