"""What a sequence does with each token: when its sink is told, and which text is shown."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quire import demo_model
from router.request import Finish, FinishReason, Request, Sequence, first_sequence
from router.sampling_params import SamplingParams, StoppingCriteria
from router.text_output import TextOutput
from router.tokenizer import ModelTokenizer

if TYPE_CHECKING:
    from quire.errors import QuireError

TOKENIZER = ModelTokenizer(demo_model.path() / "tokenizer.json")
END = 9


def tokens_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


@dataclass
class CountingSink:
    """Takes nothing by itself."""

    outputs: list[TextOutput] = field(default_factory=list)
    finishes: list[Finish] = field(default_factory=list)

    def output(self, sample_index: int, output: TextOutput) -> None:
        self.outputs.append(output)

    def finished(self, finish: Finish) -> None:
        self.finishes.append(finish)

    def failed(self, error: QuireError) -> None:
        raise error


def make_sequence(*stop_strings: str) -> tuple[Sequence, CountingSink]:
    sink, prompt = CountingSink(), array("i", tokens_of("x = "))
    request = Request(
        request_id="r",
        prompt_token_ids=prompt,
        sampling=SamplingParams(),
        stopping=StoppingCriteria(stop_strings=stop_strings),
        seed=0,
        max_tokens=50,
        end_token_ids=frozenset({END}),
        eos_token_ids=frozenset(),
        priority=0,
        sink=sink,
        new_output=lambda token_ids: TextOutput(
            token_ids, TOKENIZER.stream(token_ids), stop_strings, include_stop_string=False
        ),
    )
    return first_sequence(request), sink


def append(sequence: Sequence, *token_ids: int) -> None:
    for token_id in token_ids:
        sequence.append(token_id, None)


def test_who_has_not_taken_is_told_once() -> None:
    """Told again after a take, and at the end."""
    sequence, sink = make_sequence()
    one, two = tokens_of("a")[0], tokens_of("b")[0]
    append(sequence, one, two, one)
    assert len(sink.outputs) == 1
    assert sink.outputs[0].take() is not None
    append(sequence, two, one)
    assert len(sink.outputs) == 2
    append(sequence, END)
    assert len(sink.outputs) == 3
    assert [finish.reason for finish in sink.finishes] == [FinishReason.STOP]


def test_a_sink_that_found_nothing_to_take_is_told_again() -> None:
    """The first token ends within a character: nothing may go, and the one that completes it is told."""
    sequence, sink = make_sequence()
    first, *others = tokens_of("\N{HUGGING FACE}")
    append(sequence, first)
    assert sink.outputs[0].take() is None
    append(sequence, *others)
    assert len(sink.outputs) == 2
    delta = sink.outputs[1].take()
    assert delta is not None
    assert delta.text == "\N{HUGGING FACE}"


def check_hidden_end(*stop_strings: str) -> None:
    sequence, sink = make_sequence(*stop_strings)
    shown = tokens_of("ab")
    append(sequence, *shown, END)
    delta = sink.outputs[-1].take()
    assert delta is not None
    assert delta.token_ids == (*shown, END)
    assert delta.text == "ab"


def test_an_end_token_shows_no_text_and_those_before_it_do() -> None:
    """Whether tokens were decoded as they came, for a stop string, or wait to be taken."""
    assert TOKENIZER.decode([END])
    check_hidden_end()
    check_hidden_end("never")
