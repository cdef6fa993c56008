"""`quire generate`: continue a text."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from quire.cli.errors import reporting_errors
from quire.client import Client, GenerateOptions
from quire.settings import GenerateSettings, SamplingFlags
from quire.settings_loader import load

if TYPE_CHECKING:
    from collections.abc import Sequence


def generate(argv: Sequence[str]) -> int:
    """Print the continuation as it comes; the process's exit status."""
    settings = load(GenerateSettings, argv, prog="quire generate")
    prompt = sys.stdin.read() if settings.prompt == "-" else settings.prompt
    options = sampling_options(settings)
    options["stop_strings"] = settings.stop
    options["ignore_eos"] = settings.ignore_eos
    with (
        reporting_errors(settings.router_address) as outcome,
        Client(
            settings.router_address, timeout_s=settings.timeout_s, token=settings.token
        ) as client,
    ):
        generation = client.generate(prompt, **options)
        for delta in generation:
            print(delta.text, end="", flush=True)
        print()
        if generation.was_cut_off:
            print("error: the router ended the request before its time", file=sys.stderr)
            outcome.status = 1
    return outcome.status


def sampling_options(settings: SamplingFlags) -> GenerateOptions:
    """The options that every command of a client has as flags."""
    return {
        "max_tokens": settings.max_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "seed": settings.seed,
    }
