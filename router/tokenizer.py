"""Text to tokens and back, with the `tokenizers` library: `transformers` would bring torch into this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import structlog
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from quire.errors import FieldViolation, InvalidRequest
from quire.serving import StartupError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# Tokens of the prompt that the decoder sees before the output: enough for the rules about spaces at a beginning.
_CONTEXT_TOKENS = 8
_MOST_CONTEXT = 256  # that is kept before it is cut back to as many
_FILE = "tokenizer.json"
_WITHOUT = f"this model's folder has no {_FILE}"
_INVALID_PREFIX = "Invalid prefix encountered"

_logger = structlog.get_logger()


def load_tokenizer(folder: Path) -> ModelTokenizer | NoTokenizer:
    """The tokenizer of a model folder; raises StartupError when its file cannot be read."""
    path = folder / _FILE
    if not path.is_file():
        _logger.warning("no_tokenizer", missing=str(path), consequence="only token prompts")
        return NoTokenizer()
    try:
        return ModelTokenizer(path)
    except Exception as error:  # the library raises nothing more special
        raise StartupError(f"{path} cannot be read: {error}") from error


class NoTokenizer:
    """Stands in for the tokenizer of a folder that has none: tokens go in and out, text does not."""

    def encode(self, _text: str, *, add_special_tokens: bool) -> NoReturn:  # noqa: ARG002 -- as ModelTokenizer
        """Refuse; raises InvalidRequest."""
        raise InvalidRequest.of([FieldViolation("prompt", f"{_WITHOUT}; send tokens")])

    def decode(self, _token_ids: Sequence[int]) -> NoReturn:
        """Refuse; raises InvalidRequest."""
        raise InvalidRequest.of([FieldViolation("token_ids", _WITHOUT)])

    def stream(self, _prompt_token_ids: Sequence[int]) -> None:
        """There is no text to stream."""


class ModelTokenizer:
    """The tokenizer of one model folder. Thread-safe: long prompts are encoded on other threads."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(path))
        # A stored truncation or padding belongs to training, not to serving.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`, special tokens left out."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def stream(self, prompt_token_ids: Sequence[int]) -> StreamDecoder:
        """A decoder for the output that follows a prompt."""
        return StreamDecoder(self._tokenizer, list(prompt_token_ids[-_CONTEXT_TOKENS:]))


class StreamDecoder:
    """Decodes one output as it comes; text never ends inside a character."""

    def __init__(self, tokenizer: Tokenizer, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=context, skip_special_tokens=True)
        self._context = context  # the last tokens whose text is out
        self._held: list[int] = []

    def steps(self, token_ids: list[int]) -> tuple[str, int]:
        """Text that tokens complete, and up to which of them: what `step` gives for one after the other, in one call."""
        if len(token_ids) == 1:
            text = self.step(token_ids[0])
            return text, 1 if text else 0
        if not self._held and (text := self._try_all(token_ids)):
            return text, len(token_ids)
        texts = [self.step(token_id) for token_id in token_ids]
        num_complete = max((at for at, text in enumerate(texts, 1) if text), default=0)
        return "".join(texts), num_complete

    def _try_all(self, token_ids: list[int]) -> str:
        """Empty, and as if nothing had been tried, when the last one ends inside a character.

        The library cannot tell then which of the others could go.
        """
        try:
            text: str | None = self._stream.step(self._tokenizer, token_ids)
        except Exception as error:
            if not str(error).startswith(_INVALID_PREFIX):
                raise
            text = None
        if text:
            self._keep(token_ids)
            return text
        self._stream = DecodeStream(ids=self._context[-_CONTEXT_TOKENS:], skip_special_tokens=True)
        return ""

    def step(self, token_id: int) -> str:
        """Text that `token_id` completes; empty when it ends inside a character or shows nothing."""
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception as error:
            # The library raises this for some byte sequences that a model may well produce; starting afresh costs at
            # most the text of the tokens that it held.
            if not str(error).startswith(_INVALID_PREFIX):
                raise
            self._stream = DecodeStream(skip_special_tokens=True)
            text = self._stream.step(self._tokenizer, token_id)
        if text is None:
            self._held.append(token_id)
            return ""
        if self._held:
            self._keep(self._held)
            self._held.clear()
        self._keep([token_id])
        return text

    def _keep(self, token_ids: list[int]) -> None:
        self._context += token_ids
        if len(self._context) > _MOST_CONTEXT:
            del self._context[:-_CONTEXT_TOKENS]

    def flush(self) -> str:
        """Text of the tokens held: an unfinished character shows as U+FFFD."""
        held, self._held = self._held, []
        return self._tokenizer.decode(held, skip_special_tokens=True) if held else ""
