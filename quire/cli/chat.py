"""`quire chat`: a conversation with the model."""

from __future__ import annotations

import readline  # noqa: F401 -- gives `input` editing and history
import sys
from typing import TYPE_CHECKING

from quire.cli.errors import reporting_errors
from quire.cli.generate import sampling_options
from quire.client import Client
from quire.settings import ChatSettings
from quire.settings_loader import load

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.client import GenerateOptions

_QUESTION = "> "


def chat(argv: Sequence[str]) -> int:
    """Talk until an empty line or Ctrl-D; the process's exit status."""
    settings = load(ChatSettings, argv, prog="quire chat")
    messages = [{"role": "system", "content": settings.system}] if settings.system else []
    with (
        reporting_errors(settings.router_address) as outcome,
        Client(
            settings.router_address, timeout_s=settings.timeout_s, token=settings.token
        ) as client,
    ):
        model = client.get_model()
        if not model.has_chat_template:
            print(
                f"error: {model.served_model_name} has no chat template; use `quire generate`",
                file=sys.stderr,
            )
            return 1
        print(f"{model.served_model_name}; an empty line or Ctrl-D ends, Ctrl-C ends an answer")
        while line := _read_line():
            messages.append({"role": "user", "content": line})
            answer = _answer(client, messages, sampling_options(settings))
            messages.append({"role": "assistant", "content": answer})
    return outcome.status


def _read_line() -> str:
    try:
        return input(_QUESTION).strip()
    except EOFError:
        print()
        return ""


def _answer(client: Client, messages: list[dict[str, str]], options: GenerateOptions) -> str:
    parts: list[str] = []
    try:
        with client.generate(messages, **options) as generation:
            for delta in generation:
                parts.append(delta.text)
                print(delta.text, end="", flush=True)
    except KeyboardInterrupt:
        pass  # the answer ends here; the conversation goes on with what was said of it
    print()
    return "".join(parts)
