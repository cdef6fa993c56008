"""From what a client asks to a `Request`: every check that can be made before memory is asked."""

from __future__ import annotations

import secrets
from array import array
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from quire.errors import ContextLengthExceeded, FieldViolation, InvalidRequest, PoolTooSmall
from router.request import Request
from router.sampling_params import MAX_NUM_SAMPLES, token_id_violations
from router.text_output import TextOutput
from router.tokenizer import NoTokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from router.request import Sink
    from router.sampling_params import SamplingParams, StoppingCriteria
    from router.tokenizer import ModelTokenizer

MAX_REQUEST_ID_CHARS = 128
DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt in tokens."""

    token_ids: Sequence[int]
    field: str  # field of the request that it came from
    is_conversation: bool = False


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """What the served model and its pool allow."""

    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]
    block_size: int
    num_blocks: int  # the null block included
    max_num_seqs: int


class Intake:
    """Builds requests; raises before anything of a wrong one exists."""

    def __init__(self, limits: IntakeLimits, tokenizer: ModelTokenizer | NoTokenizer) -> None:
        self._limits = limits
        self._tokenizer = tokenizer

    def build(
        self,
        request_id: str,
        prompt: Prompt,
        sampling: SamplingParams,
        stopping: StoppingCriteria,
        priority: int,
        sink: Sink,
        *,
        tenant: str,
    ) -> Request:
        """The request with all defaults filled in.

        Raises:
            InvalidRequest: with every offending field.
            ContextLengthExceeded: when prompt and max_tokens do not fit the model.
            PoolTooSmall: when the pool could not hold it even alone.
        """
        self._check_fields(request_id, prompt, sampling, stopping)
        max_tokens = self._max_tokens(prompt, stopping)
        self._check_pool(len(prompt.token_ids), max_tokens, sampling.num_samples)
        eos_token_ids = frozenset() if stopping.ignore_eos else self._limits.eos_token_ids
        return Request(
            request_id=request_id or secrets.token_hex(8),
            prompt_token_ids=array("i", prompt.token_ids),
            sampling=sampling,
            stopping=stopping,
            seed=secrets.randbits(64) if sampling.seed is None else sampling.seed,
            max_tokens=max_tokens,
            end_token_ids=eos_token_ids | frozenset(stopping.stop_token_ids),
            eos_token_ids=eos_token_ids,
            priority=priority,
            sink=sink,
            new_output=partial(self._new_output, stopping),
            tenant=tenant,
        )

    def _new_output(self, stopping: StoppingCriteria, token_ids: array[int]) -> TextOutput:
        return TextOutput(
            token_ids,
            self._tokenizer.stream(token_ids),
            stopping.stop_strings,
            include_stop_string=stopping.include_stop_string,
        )

    def _check_fields(
        self,
        request_id: str,
        prompt: Prompt,
        sampling: SamplingParams,
        stopping: StoppingCriteria,
    ) -> None:
        violations = [
            *_request_id_violations(request_id),
            *self._prompt_violations(prompt),
            *sampling.violations(self._limits.vocab_size),
            *self._num_samples_violations(sampling),
            *stopping.violations(self._limits.vocab_size),
            *self._text_violations(stopping),
        ]
        if violations:
            raise InvalidRequest.of(violations)

    def _prompt_violations(self, prompt: Prompt) -> Iterator[FieldViolation]:
        if not prompt.token_ids:
            yield FieldViolation(prompt.field, "is empty; at least one token is needed")
        for index, token_id in enumerate(prompt.token_ids):
            where = f"{prompt.field}[{index}]"
            violation = next(token_id_violations(where, token_id, self._limits.vocab_size), None)
            if violation is not None:
                yield violation
                return  # one wrong token is told; a list of thousands helps nobody

    def _text_violations(self, stopping: StoppingCriteria) -> Iterator[FieldViolation]:
        if stopping.stop_strings and isinstance(self._tokenizer, NoTokenizer):
            reason = "need text, and this model has no tokenizer; use stop_token_ids"
            yield FieldViolation("stopping.stop_strings", reason)

    def _num_samples_violations(self, sampling: SamplingParams) -> Iterator[FieldViolation]:
        limit = self._limits.max_num_seqs
        if limit < sampling.num_samples <= MAX_NUM_SAMPLES:
            reason = f"is {sampling.num_samples}; this server runs {limit} sequences at once"
            yield FieldViolation("sampling.num_samples", reason)

    def _max_tokens(self, prompt: Prompt, stopping: StoppingCriteria) -> int:
        room = self._limits.max_model_len - len(prompt.token_ids)
        wanted = stopping.max_tokens
        if room < max(1, wanted or 1, stopping.min_tokens):
            raise self._context_length_error(prompt, wanted)
        if wanted is not None:
            return wanted
        return (
            room
            if prompt.is_conversation
            else min(room, max(DEFAULT_MAX_TOKENS, stopping.min_tokens))
        )

    def _context_length_error(self, prompt: Prompt, wanted: int | None) -> ContextLengthExceeded:
        num_tokens, limit = len(prompt.token_ids), self._limits.max_model_len
        asked = "" if wanted is None else f" and max_tokens {wanted}"
        message = f"a prompt of {num_tokens} tokens{asked} does not fit max_model_len {limit}"
        return ContextLengthExceeded(
            message,
            metadata={"num_prompt_tokens": num_tokens, "max_model_len": limit},
            violations=[FieldViolation(prompt.field, message)],
        )

    def _check_pool(self, num_prompt_tokens: int, max_tokens: int, num_samples: int) -> None:
        size, num_usable = self._limits.block_size, self._limits.num_blocks - 1
        alone = -(-(num_prompt_tokens + max_tokens - 1) // size)
        forked = -(-num_prompt_tokens // size) + num_samples - 1
        needed = max(alone, forked)
        if needed > num_usable:
            message = f"the request needs {needed} blocks, the pool has {num_usable}"
            raise PoolTooSmall(
                message, metadata={"num_blocks_needed": needed, "num_blocks": num_usable}
            )


def _request_id_violations(request_id: str) -> Iterator[FieldViolation]:
    if len(request_id) > MAX_REQUEST_ID_CHARS:
        yield FieldViolation("request_id", f"has more than {MAX_REQUEST_ID_CHARS} characters")
    if not request_id.isprintable():
        yield FieldViolation("request_id", "has characters that cannot be printed")
