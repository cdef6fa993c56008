"""From sampled tokens to text that may be sent: whole characters, stop strings held back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from router.stop_strings import StopMatch, find_stop, held_back_length

if TYPE_CHECKING:
    from array import array

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
    are decoded when they are taken: what nobody takes yet costs a step nothing. Stop strings must be noticed at their
    token: with them tokens are decoded as they come, and text that may begin one is held back.

    Args:
        token_ids: of the sequence: what is appended to them from now on is output.
        decoder: turns them into text; None: there is none.
        stop_strings: end the output.
        include_stop_string: show the one that did.
    """

    def __init__(
        self,
        token_ids: array[int],
        decoder: TokenDecoder | None,
        stop_strings: tuple[str, ...],
        *,
        include_stop_string: bool,
    ) -> None:
        self._token_ids = token_ids
        self._decoder = decoder
        self._stop_strings = stop_strings if decoder else ()
        self._include_stop_string = include_stop_string
        self.is_searched = bool(self._stop_strings)
        """Whether `search` is to be called for each token."""
        self.is_told = False
        """Whether somebody was told that there is something to take."""
        # Of `token_ids` `[0, taken_end)` are prompt or taken, `[taken_end, ready_end)` may go, `[ready_end, decoded_end)`
        # wait for text, the others to be decoded.
        self._taken_end = self._ready_end = self._decoded_end = len(token_ids)
        self._logprobs: list[TokenLogprobs] = []  # of those not taken, if they were asked for
        self._text = ""  # not taken yet, may go
        self._held_text = ""  # behind it, may begin a stop string
        # With stop strings, of each token not taken: characters of the held text that must go before it, seen from the
        # beginning of all text.
        self._text_ends: list[int] = []
        self._num_chars = 0  # of all text searched so far
        self._num_released = 0  # of it, not held any more

    def add_logprobs(self, logprobs: TokenLogprobs) -> None:
        """Those of the last token."""
        self._logprobs.append(logprobs)

    def hide_last(self) -> None:
        """The last token is an end token: its text is not shown."""
        self._decode(len(self._token_ids) - 1)
        self._decoded_end += 1

    def finish(self) -> None:
        """Let everything out that is held: no more tokens will come."""
        self._decode(len(self._token_ids))
        self._text += self._held_text
        self._held_text = ""
        if self._decoder:
            self._text += self._decoder.flush()
        self._ready_end = len(self._token_ids)

    def take(self) -> OutputDelta | None:
        """What may be sent since the last call, if anything."""
        self.is_told = False
        self._decode(len(self._token_ids))
        begin, end = self._taken_end, self._ready_end
        if begin == end and not self._text:
            return None
        count = end - begin
        delta = OutputDelta(
            tuple(self._token_ids[begin:end]), self._text, tuple(self._logprobs[:count])
        )
        del self._logprobs[:count], self._text_ends[:count]
        self._taken_end = end
        self._text = ""
        return delta

    def _decode(self, end: int) -> None:
        """Decode all tokens before `end` that no search has decoded."""
        begin, self._decoded_end = self._decoded_end, end
        if self._decoder is None:
            self._ready_end = end
        elif begin < end:
            text, num_complete = self._decoder.steps(self._token_ids[begin:end].tolist())
            if num_complete:
                self._text += text
                self._ready_end = begin + num_complete

    def search(self, *, may_stop: bool) -> StopMatch | None:
        """The match when the last token completes a stop string, after which only `take` may follow.

        Args:
            may_stop: False while the sequence has fewer than min_tokens: its text is then not searched, now or later.
        """
        assert self._decoder is not None
        text = self._decoder.step(self._token_ids[-1])
        self._decoded_end += 1
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
        self._ready_end = len(self._token_ids)

    def _release(self, num_chars: int) -> None:
        self._text += self._held_text[:num_chars]
        self._held_text = self._held_text[num_chars:]
        self._num_released += num_chars
        for text_end in self._text_ends[self._ready_end - self._taken_end :]:
            if text_end > self._num_released:
                break
            self._ready_end += 1
