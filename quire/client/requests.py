"""Plain values to a `GenerateRequest`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

from protos.router.v1 import router_pb2 as pb

if TYPE_CHECKING:
    from google.protobuf.message import Message

# A text, token ids, or the messages of a conversation: {"role": "user", "content": "hello"}, oldest first.
Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, str]]

_SAMPLING = frozenset(field.name for field in pb.SamplingParams.DESCRIPTOR.fields)
_STOPPING = frozenset(field.name for field in pb.StoppingCriteria.DESCRIPTOR.fields)
_REQUEST = frozenset({"request_id", "priority"})


class GenerateOptions(TypedDict, total=False):
    """Fields of `GenerateRequest`, `SamplingParams` and `StoppingCriteria`; what is absent or None has their default."""

    request_id: str | None
    priority: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    num_samples: int | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    logit_bias: Mapping[int, float] | None
    num_logprobs: int | None
    max_tokens: int | None
    min_tokens: int | None
    stop_strings: Sequence[str] | None
    include_stop_string: bool | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None


def generate_request(prompt: Prompt, options: GenerateOptions) -> pb.GenerateRequest:
    """The message for a prompt and options.

    Raises:
        TypeError: an option does not exist, or the prompt is of another kind.
    """
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    for name in given:
        _check_name(name)
    if "logit_bias" in given:
        given["logit_bias"] = _logit_bias(options)
    request = pb.GenerateRequest(
        sampling=pb.SamplingParams(**_among(given, _SAMPLING)),
        stopping=pb.StoppingCriteria(**_among(given, _STOPPING)),
        **_among(given, _REQUEST),
    )
    set_prompt(request, prompt)
    return request


def set_prompt(message: Message, prompt: Prompt) -> None:
    """Set the field of `message`'s oneof `prompt` that fits the kind of `prompt`."""
    if isinstance(prompt, str):
        message.text = prompt  # type: ignore[attr-defined]
    elif prompt and all(isinstance(found, Mapping) for found in prompt):
        messages = [pb.Message(**found) for found in prompt]  # type: ignore[arg-type]
        message.conversation.CopyFrom(pb.Conversation(messages=messages))  # type: ignore[attr-defined]
    else:
        message.tokens.CopyFrom(pb.TokenIds(ids=prompt))  # type: ignore[attr-defined,arg-type]


def _check_name(name: str) -> None:
    known = _SAMPLING | _STOPPING | _REQUEST
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        message = f"unknown option {name!r}; did you mean {nearest!r}?"
        raise TypeError(message)


def _logit_bias(options: GenerateOptions) -> list[pb.LogitBias]:
    bias = options.get("logit_bias") or {}
    return [pb.LogitBias(token_id=token_id, bias=value) for token_id, value in bias.items()]


def _among(given: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name in names}
