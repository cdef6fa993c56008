"""What a client may ask of sampling and stopping, checked. Knows nothing of messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.errors import FieldViolation

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_NUM_SAMPLES = 64
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 64


@dataclass(frozen=True, slots=True)
class Range:
    """Allowed values of a field; `low` itself is not allowed when `above_low`."""

    low: float
    high: float
    above_low: bool = False

    def __contains__(self, value: float) -> bool:
        """Whether `value` is allowed; NaN never is."""
        return (value > self.low if self.above_low else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        """The range in words."""
        return f"{'above' if self.above_low else 'from'} {self.low:g} to {self.high:g}"


_SAMPLING_RANGES = {
    "temperature": Range(0, 2),
    "top_p": Range(0, 1, above_low=True),
    "top_k": Range(0, 2**31 - 1),
    "min_p": Range(0, 1),
    "num_samples": Range(1, MAX_NUM_SAMPLES),
    "repetition_penalty": Range(0, 10, above_low=True),
    "frequency_penalty": Range(-2, 2),
    "presence_penalty": Range(-2, 2),
}
_BIAS_RANGE = Range(-100, 100)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. `quire.router.v1.SamplingParams` explains each field; these are its defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    num_samples: int = 1
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_logprobs: int | None = None

    def violations(self, vocab_size: int) -> Iterator[FieldViolation]:
        """Every field that is out of range."""
        for name, allowed in _SAMPLING_RANGES.items():
            value = getattr(self, name)
            if value not in allowed:
                yield FieldViolation(f"sampling.{name}", f"is {value:g}; must be {allowed}")
        if self.num_logprobs is not None and self.num_logprobs not in Range(0, MAX_LOGPROBS):
            yield FieldViolation(
                "sampling.num_logprobs", f"is {self.num_logprobs}; must be from 0 to {MAX_LOGPROBS}"
            )
        yield from self._bias_violations(vocab_size)

    def _bias_violations(self, vocab_size: int) -> Iterator[FieldViolation]:
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            yield FieldViolation("sampling.logit_bias", f"has more than {MAX_LOGIT_BIAS} entries")
        if len({token_id for token_id, _ in self.logit_bias}) < len(self.logit_bias):
            yield FieldViolation("sampling.logit_bias", "names a token twice")
        for index, (token_id, bias) in enumerate(self.logit_bias):
            where = f"sampling.logit_bias[{index}]"
            yield from token_id_violations(f"{where}.token_id", token_id, vocab_size)
            if bias not in _BIAS_RANGE:
                yield FieldViolation(f"{where}.bias", f"is {bias:g}; must be {_BIAS_RANGE}")


@dataclass(frozen=True, slots=True)
class StoppingCriteria:
    """When output ends. `quire.router.v1.StoppingCriteria` explains each field."""

    max_tokens: int | None = None  # None: the default that fits the kind of prompt
    min_tokens: int = 0
    stop_strings: tuple[str, ...] = ()
    include_stop_string: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def violations(self, vocab_size: int) -> Iterator[FieldViolation]:
        """Every field that is out of range or contradicts another."""
        if self.max_tokens is not None and self.max_tokens < 1:
            yield FieldViolation("stopping.max_tokens", f"is {self.max_tokens}; must be at least 1")
        if self.min_tokens < 0:
            yield FieldViolation("stopping.min_tokens", f"is {self.min_tokens}; must be at least 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            yield FieldViolation(
                "stopping.min_tokens", f"is {self.min_tokens}, above max_tokens {self.max_tokens}"
            )
        yield from self._stop_violations(vocab_size)

    def _stop_violations(self, vocab_size: int) -> Iterator[FieldViolation]:
        if len(self.stop_strings) > MAX_STOP_STRINGS:
            yield FieldViolation("stopping.stop_strings", f"has more than {MAX_STOP_STRINGS}")
        if "" in self.stop_strings:
            yield FieldViolation("stopping.stop_strings", "has an empty string")
        if self.include_stop_string and not self.stop_strings:
            yield FieldViolation("stopping.include_stop_string", "is set without stop_strings")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            yield FieldViolation("stopping.stop_token_ids", f"has more than {MAX_STOP_TOKEN_IDS}")
        for index, token_id in enumerate(self.stop_token_ids):
            yield from token_id_violations(
                f"stopping.stop_token_ids[{index}]", token_id, vocab_size
            )


def token_id_violations(field: str, token_id: int, vocab_size: int) -> Iterator[FieldViolation]:
    """A violation of `field` when `token_id` is outside the vocabulary."""
    if not 0 <= token_id < vocab_size:
        yield FieldViolation(field, f"is {token_id}; must be from 0 to {vocab_size - 1}")
