"""From sampled tokens to text that may be sent: whole characters, stop strings held back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from router.stop_strings import StopMatch, find_stop, held_back_length

if TYPE_CHECKING:
    from router.step import TokenLogprobs


class TokenDecoder(Protocol):
    """Turns the tokens of one sequence into text, one after another."""

    def step(self, token_id: int) -> str:
        """Text that `token_id` completes; empty when it ends inside a character."""

    def steps(self, token_ids: list[int]) -> tuple[str, int]:
        """What `step` gives for several, put together, and how many of them are complete by that."""

    def flush(self) -> str:
        """Text of the tokens that completed nothing."""


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """Output that may be sent."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]


class TextOutput:
    """The text of one sequence.

    A token goes out with the text that it completes; without a decoder there is no text, and it goes out at once. Tokens
    are decoded when they are taken: what nobody takes yet costs a step next to nothing. Stop strings must be noticed at
    their token: with them tokens are decoded as they come, and text that may begin one is held back.
    """

    def __init__(
        self,
        decoder: TokenDecoder | None,
        stop_strings: tuple[str, ...],
        *,
        include_stop_string: bool,
    ) -> None:
        self._decoder = decoder
        self._stop_strings = stop_strings if decoder else ()
        self._include_stop_string = include_stop_string
        # Tokens not taken yet: `[0, num_ready)` may go, `[num_ready, num_decoded)` wait for text.
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []  # theirs, if they were asked for
        self._num_ready = 0
        self._num_decoded = 0
        self._text = ""  # not taken yet, may go
        self._held_text = ""  # behind it, may begin a stop string
        # With stop strings, of each decoded token: characters of the held text that must go before it, seen from the
        # beginning of all text.
        self._text_ends: list[int] = []
        self._num_chars = 0  # of all text searched so far
        self._num_released = 0  # of it, not held any more

    def append(
        self, token_id: int, logprobs: TokenLogprobs | None, *, may_stop: bool
    ) -> StopMatch | None:
        """Add a token; the match when it completes a stop string, after which only `take` may follow.

        Args:
            token_id: the token.
            logprobs: its log-probabilities, if asked for.
            may_stop: False while the sequence has fewer than min_tokens: its text is then not searched, now or later.
        """
        self._token_ids.append(token_id)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        if not self._stop_strings:
            return None
        return self._search(token_id, may_stop=may_stop)

    def append_silent(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Add a token whose text is not shown: an end token."""
        self._decode()
        self._token_ids.append(token_id)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        self._num_decoded += 1

    def finish(self) -> None:
        """Let everything out that is held: no more tokens will come."""
        self._decode()
        self._text += self._held_text
        self._held_text = ""
        if self._decoder:
            self._text += self._decoder.flush()
        self._num_ready = len(self._token_ids)

    def take(self) -> OutputDelta | None:
        """What may be sent since the last call, if anything."""
        self._decode()
        count = self._num_ready
        if not count and not self._text:
            return None
        delta = OutputDelta(
            tuple(self._token_ids[:count]), self._text, tuple(self._logprobs[:count])
        )
        del self._token_ids[:count], self._logprobs[:count], self._text_ends[:count]
        self._num_decoded -= count
        self._num_ready = 0
        self._text = ""
        return delta

    def _decode(self) -> None:
        """Decode all tokens that no search has decoded."""
        token_ids, begin = self._token_ids, self._num_decoded
        self._num_decoded = len(token_ids)
        if self._decoder is None:
            self._num_ready = len(token_ids)
            return
        if begin < len(token_ids):
            text, num_complete = self._decoder.steps(token_ids[begin:])
            if num_complete:
                self._text += text
                self._num_ready = begin + num_complete

    def _search(self, token_id: int, *, may_stop: bool) -> StopMatch | None:
        assert self._decoder is not None
        text = self._decoder.step(token_id)
        self._num_decoded += 1
        self._num_chars += len(text)
        # A token that completes no text waits for the next one that does.
        self._text_ends.append(self._num_chars if text else self._num_chars + 1)
        if not text:
            return None
        self._held_text += text
        match = find_stop(self._held_text, self._stop_strings) if may_stop else None
        if match is not None:
            self._end_at(match)
            return match
        held = held_back_length(self._held_text, self._stop_strings) if may_stop else 0
        self._release(len(self._held_text) - held)
        return None

    def _end_at(self, match: StopMatch) -> None:
        self._release(match.end if self._include_stop_string else match.begin)
        self._held_text = ""
        self._num_ready = len(self._token_ids)

    def _release(self, num_chars: int) -> None:
        self._text += self._held_text[:num_chars]
        self._held_text = self._held_text[num_chars:]
        self._num_released += num_chars
        ends = self._text_ends
        while self._num_ready < len(ends) and ends[self._num_ready] <= self._num_released:
            self._num_ready += 1
