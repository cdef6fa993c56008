"""Text that goes out: whole characters, nothing of a stop string, every token with the text it completes."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire import demo_model
from router.stop_strings import find_stop, held_back_length
from router.text_output import TextOutput
from router.tokenizer import ModelTokenizer

TOKENIZER = ModelTokenizer(demo_model.path() / "tokenizer.json")


class PieceDecoder:
    """Each token is a piece of text, by its number."""

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = pieces

    def step(self, token_id: int) -> str:
        return self._pieces[token_id]

    def steps(self, token_ids: list[int]) -> tuple[str, int]:
        pieces = [self._pieces[token_id] for token_id in token_ids]
        return "".join(pieces), max((at for at, piece in enumerate(pieces, 1) if piece), default=0)

    def flush(self) -> str:
        return ""


def run(
    pieces: list[str], stops: tuple[str, ...], *, include: bool = False, min_tokens: int = 0
) -> tuple[list[tuple[tuple[int, ...], str]], str | None]:
    """What went out, token by token, and the stop string that was found."""
    token_ids = array("i")
    output = TextOutput(token_ids, PieceDecoder(pieces), stops, include_stop_string=include)
    sent = []
    for token_id in range(len(pieces)):
        token_ids.append(token_id)
        match = output.search(may_stop=token_id + 1 >= min_tokens) if output.is_searched else None
        is_last = token_id == len(pieces) - 1
        if match is None and is_last:
            output.finish()
        if (delta := output.take()) is not None:
            sent.append((delta.token_ids, delta.text))
        if match is not None:
            return sent, match.stop_string
    return sent, None


def naive(
    pieces: list[str], stops: tuple[str, ...], *, include: bool
) -> tuple[str, int, str | None]:
    """Text, number of tokens and stop string of the same, by looking at all text after each token."""
    text = ""
    for count, piece in enumerate(pieces, 1):
        text += piece
        found = [(text.find(stop), index) for index, stop in enumerate(stops) if stop in text]
        if found:
            begin, index = min(found)
            return text[: begin + len(stops[index]) * include], count, stops[index]
    return text, len(pieces), None


letters = st.text("ab", max_size=3)


@given(
    pieces=st.lists(letters, min_size=1, max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3, unique=True),
    include=st.booleans(),
)
def test_stop_strings_end_the_text_wherever_tokens_are_cut(
    pieces: list[str], stops: list[str], *, include: bool
) -> None:
    """Text and tokens that went out, put together, are those of a search over the whole text."""
    sent, stop = run(pieces, tuple(stops), include=include)
    text, num_tokens, expected_stop = naive(pieces, tuple(stops), include=include)
    assert "".join(part for _, part in sent) == text
    assert [token for tokens, _ in sent for token in tokens] == list(range(num_tokens))
    assert stop == expected_stop


@given(
    pieces=st.lists(letters, min_size=1, max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_token_never_goes_before_its_text(pieces: list[str], stops: list[str]) -> None:
    """Whenever something goes out, the tokens so far stand for no more text than is out."""
    sent, stop = run(pieces, tuple(stops))
    num_tokens, num_chars = 0, 0
    for tokens, text in sent[: -1 if stop else None]:
        num_tokens += len(tokens)
        num_chars += len(text)
        assert sum(map(len, pieces[:num_tokens])) <= num_chars


def test_text_is_sent_at_once_when_it_can_begin_no_stop_string() -> None:
    """Only what may still become a stop string waits."""
    sent, _ = run(["xy", "a", "z"], ("ab",))
    assert sent == [((0,), "xy"), ((1, 2), "az")]


def test_a_token_that_completes_nothing_goes_with_the_one_that_does() -> None:
    """The first bytes of a character are a token without text: it waits."""
    for min_tokens in (0, 9):
        sent, _ = run(["x", "", "y"], (), min_tokens=min_tokens)
        assert sent == [((0,), "x"), ((1, 2), "y")]


def test_min_tokens_hides_earlier_text_from_the_search() -> None:
    """A stop string inside the first tokens is text; across the border it is too."""
    sent, stop = run(["a", "b", "b", "ab"], ("ab",), min_tokens=3)
    assert ("".join(text for _, text in sent), stop) == ("abb", "ab")


@pytest.mark.parametrize(
    ("text", "stops", "length"),
    [("xab", ("abc",), 2), ("xab", ("bc", "abc"), 2), ("xb", ("bc",), 1), ("abc", ("xyz",), 0)],
)
def test_as_much_is_held_back_as_may_begin_a_stop_string(
    text: str, stops: tuple[str, ...], length: int
) -> None:
    """The longest end of the text that begins one."""
    assert held_back_length(text, stops) == length


def test_of_two_stop_strings_the_one_that_begins_first_wins() -> None:
    """Position decides, then the order in which they were given."""
    found = find_stop("xabc", ("bc", "ab"))
    assert found is not None
    assert (found.stop_string, found.begin, found.end) == ("ab", 1, 3)


def output_behind(prompt: str) -> tuple[array[int], TextOutput]:
    """The tokens of a sequence, to append output to, and their text."""
    token_ids = array("i", TOKENIZER.encode(prompt, add_special_tokens=False))
    stream = TOKENIZER.stream(token_ids)
    return token_ids, TextOutput(token_ids, stream, (), include_stop_string=False)


@given(st.text(max_size=30))
def test_characters_are_never_cut(text: str) -> None:
    """Through the real tokenizer, byte by byte where it must: every piece is whole, and together they are the text."""
    output_ids, output = output_behind("x")
    parts = []
    for token_id in TOKENIZER.encode(text, add_special_tokens=False):
        output_ids.append(token_id)
        parts.append(output.take())
    output.finish()
    parts.append(output.take())
    assert "".join(part.text for part in parts if part is not None) == text


def take_at(token_ids: list[int], places: set[int]) -> tuple[list[tuple[int, ...]], str]:
    """Tokens and text that went out, taken after the tokens at some places and at the end."""
    output_ids, output = output_behind("x")
    deltas = []
    for place, token_id in enumerate(token_ids):
        output_ids.append(token_id)
        if place in places:
            deltas.append(output.take())
    output.finish()
    deltas.append(output.take())
    found = [delta for delta in deltas if delta is not None]
    return [delta.token_ids for delta in found], "".join(delta.text for delta in found)


@given(text=st.text(max_size=30), places=st.sets(st.integers(0, 60)))
def test_when_tokens_are_taken_changes_no_text(text: str, places: set[int]) -> None:
    """Decoded together or one by one, and wherever a take cuts a character."""
    token_ids = TOKENIZER.encode(text, add_special_tokens=False)
    taken, found = take_at(token_ids, places)
    assert found == text
    assert [token for tokens in taken for token in tokens] == token_ids


@given(
    token_ids=st.lists(st.integers(0, 255), max_size=30),
    places=st.sets(st.integers(0, 30)),
)
def test_bytes_that_are_no_text_lose_no_token(token_ids: list[int], places: set[int]) -> None:
    """A model may sample any bytes."""
    taken, _ = take_at(token_ids, places)
    assert [token for tokens in taken for token in tokens] == token_ids


def test_tokens_go_with_the_character_that_the_last_of_them_begins() -> None:
    """Those whose text is complete do not wait for it."""
    token_ids = TOKENIZER.encode("ab\N{HUGGING FACE}", add_special_tokens=False)
    output_ids, output = output_behind("x")
    for token_id in token_ids[:-1]:
        output_ids.append(token_id)
    delta = output.take()
    assert delta is not None
    assert delta.text == "ab"
    output_ids.append(token_ids[-1])
    delta = output.take()
    assert delta is not None
    assert delta.text == "\N{HUGGING FACE}"
