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

    def flush(self) -> str:
        """Text of the tokens that completed nothing."""


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """Output that may be sent."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class _HeldToken:
    token_id: int
    logprobs: TokenLogprobs | None
    text_end: int  # characters of all text so far that must be out before this token goes


class TextOutput:
    """The text of one sequence.

    `[0, sent)` of the text was given out by `take`; `[sent, end)` is held back because it may begin a stop string. A
    token goes out with the text that it completes; without a decoder there is no text, and it goes out at once.
    """

    def __init__(
        self,
        decoder: TokenDecoder | None,
        stop_strings: tuple[str, ...],
        *,
        include_stop_string: bool,
    ) -> None:
        self._decoder = decoder
        self._stop_strings = stop_strings
        self._include_stop_string = include_stop_string
        self._held_text = ""
        self._held_tokens: list[_HeldToken] = []
        self._ready: list[_HeldToken] = []
        self._ready_text = ""
        self._num_chars = 0  # of all text decoded so far
        self._num_sent = 0  # of it, moved to ready

    def append(
        self, token_id: int, logprobs: TokenLogprobs | None, *, may_stop: bool
    ) -> StopMatch | None:
        """Add a token; the match when it completes a stop string, after which only `take` may follow.

        Args:
            token_id: the token.
            logprobs: its log-probabilities, if asked for.
            may_stop: False while the sequence has fewer than min_tokens: its text is then not searched, now or later.
        """
        text = self._decoder.step(token_id) if self._decoder else ""
        self._hold(token_id, logprobs, text)
        if not may_stop or not self._decoder:
            self._release(len(self._held_text))
            return None
        return self._search() if text else None

    def append_silent(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Add a token whose text is not shown: an end token."""
        self._hold(token_id, logprobs, "")

    def finish(self) -> None:
        """Let everything out that is held: no more tokens will come."""
        tail = self._decoder.flush() if self._decoder else ""
        self._held_text += tail
        self._num_chars += len(tail)
        self._release(len(self._held_text))
        self._release_all_tokens()

    def take(self) -> OutputDelta | None:
        """What may be sent since the last call, if anything."""
        if not self._ready and not self._ready_text:
            return None
        delta = OutputDelta(
            tuple(token.token_id for token in self._ready),
            self._ready_text,
            tuple(token.logprobs for token in self._ready if token.logprobs is not None),
        )
        self._ready = []
        self._ready_text = ""
        return delta

    def _hold(self, token_id: int, logprobs: TokenLogprobs | None, text: str) -> None:
        self._held_text += text
        self._num_chars += len(text)
        # A token that completes no text waits for the next one that does.
        end = self._num_chars if text or not self._decoder else self._num_chars + 1
        self._held_tokens.append(_HeldToken(token_id, logprobs, end))

    def _search(self) -> StopMatch | None:
        match = find_stop(self._held_text, self._stop_strings)
        if match is None:
            held = held_back_length(self._held_text, self._stop_strings)
            self._release(len(self._held_text) - held)
            return None
        self._release(match.end if self._include_stop_string else match.begin)
        self._held_text = ""
        self._release_all_tokens()
        return match

    def _release(self, num_chars: int) -> None:
        self._ready_text += self._held_text[:num_chars]
        self._held_text = self._held_text[num_chars:]
        self._num_sent += num_chars
        while self._held_tokens and self._held_tokens[0].text_end <= self._num_sent:
            self._ready.append(self._held_tokens.pop(0))

    def _release_all_tokens(self) -> None:
        self._ready += self._held_tokens
        self._held_tokens = []
