"""Conversations to prompts, by the model's own Jinja template, in Jinja's sandbox."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quire.errors import FieldViolation, InvalidRequest
from quire.serving import StartupError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class ChatTemplate:
    """The chat template of one model folder."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The template of a model folder, if it has one.

        Raises:
            StartupError: when the template or its configuration is malformed.
        """
        try:
            return cls._load(folder)
        except (TemplateError, ValueError, KeyError, TypeError) as error:
            raise StartupError(f"the chat template of {folder} is malformed: {error}") from error

    @classmethod
    def _load(cls, folder: Path) -> ChatTemplate | None:
        config_file = folder / "tokenizer_config.json"
        config: dict[str, Any] = (
            json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
        )
        source = _find_source(folder, config)
        if source is None:
            return None
        tokens = {name: _content(config[name]) for name in _SPECIAL_TOKENS if config.get(name)}
        return cls(source, tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for a conversation, up to where the assistant begins.

        Raises:
            InvalidRequest: when the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, **self._special_tokens
            )
        except (TemplateError, TypeError, ValueError) as error:
            reason = f"the model's chat template refuses it: {error}"
            raise InvalidRequest.of([FieldViolation("conversation", reason)]) from error


def _find_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several named templates
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found if isinstance(found, str) else None


def _content(token: str | Mapping[str, str]) -> str:
    return token if isinstance(token, str) else token["content"]


def _to_json(value: object, indent: int | None = None) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)
