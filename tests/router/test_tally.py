"""What is counted of requests, tokens and steps, with a clock that tests turn."""

from __future__ import annotations

from array import array
from itertools import permutations

import pytest

from quire.errors import ErrorReason
from router.output_stream import OutputStream
from router.request import FinishReason, Request, Sequence, first_sequence
from router.sampling_params import SamplingParams, StoppingCriteria
from router.step import StepFailure, StepResult
from router.tally import StepTimes, Tally
from router.text_output import TextOutput

TIMES = StepTimes(plan=0.001, memory=0.002, compute=0.030, publish=0.004)


class Clock:
    """Seconds, turned by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_request(num_samples: int = 1) -> Request:
    return Request(
        request_id="r",
        prompt_token_ids=array("i", range(7)),
        sampling=SamplingParams(num_samples=num_samples),
        stopping=StoppingCriteria(),
        seed=0,
        max_tokens=9,
        end_token_ids=frozenset(),
        eos_token_ids=frozenset(),
        priority=0,
        sink=OutputStream(num_samples),
        new_output=lambda token_ids: TextOutput(token_ids, None, (), include_stop_string=False),
    )


@pytest.mark.parametrize("reasons", list(permutations(FinishReason, 2)))
def test_a_request_ended_for_its_gravest_reason(reasons: tuple[FinishReason, ...]) -> None:
    """ERROR before CANCELLED before LENGTH before STOP, in whatever order the samples ended."""
    gravest_first = [
        FinishReason.ERROR,
        FinishReason.CANCELLED,
        FinishReason.LENGTH,
        FinishReason.STOP,
    ]
    request, tally = make_request(num_samples=2), Tally()
    for sample_index, reason in enumerate(reasons):
        request.finish_sample(sample_index, reason)
    tally.finished(request)
    expected = min(reasons, key=gravest_first.index)
    assert tally.num_finished == {reason: int(reason is expected) for reason in FinishReason}


def test_times_run_from_when_a_request_was_received() -> None:
    """Queue, first token and end; a gap is between two tokens of one sequence."""
    clock = Clock()
    tally, request = Tally(clock), make_request()
    sequence = first_sequence(request)
    tally.accepted(request, received_at=99.0)
    request.num_cached_tokens = 4
    tally.admitted(request)
    for seconds in (1.0, 0.25, 0.5):
        clock.now += seconds
        tally.tokens([sequence], clock.now)
    request.finish_sample(0, FinishReason.LENGTH)
    clock.now += 2
    tally.finished(request)
    sums = [
        (found.count, found.sum)
        for found in (
            tally.queue_time,
            tally.time_to_first_token,
            tally.inter_token_latency,
            tally.end_to_end,
        )
    ]
    assert sums == [(1, 1.0), (1, 2.0), (2, 0.75), (1, 4.75)]
    assert (tally.num_prompt_tokens, tally.num_cached_prompt_tokens) == (7, 4)
    assert tally.num_output_tokens == 3


def test_samples_have_one_first_token_and_gaps_of_their_own() -> None:
    """Two samples, two tokens each: one first token of the request, two gaps."""
    clock = Clock()
    tally, request = Tally(clock), make_request(num_samples=2)
    tally.accepted(request, received_at=100.0)
    first = first_sequence(request)
    samples: list[Sequence] = [first, first.fork(1)]
    for _ in range(2):
        clock.now += 1
        tally.tokens(samples, clock.now)
    assert (tally.time_to_first_token.count, tally.time_to_first_token.sum) == (1, 1.0)
    assert (tally.inter_token_latency.count, tally.inter_token_latency.sum) == (2, 2.0)


def test_a_step_is_split_into_stages() -> None:
    """What compute did not spend on the device is waiting; a failed step has no stages."""
    tally = Tally()
    tally.step_ended(TIMES, StepResult(1, [], [], {}, device_us=25_000))
    tally.step_ended(TIMES, StepFailure(2, "broken"))
    assert (tally.num_steps, tally.num_step_failures) == (2, 1)
    found = {stage: (times.count, times.sum) for stage, times in tally.step_stages.items()}
    assert found == {
        "plan": (1, 0.001),
        "memory": (1, 0.002),
        "device": (1, pytest.approx(0.025)),
        "compute_wait": (1, pytest.approx(0.005)),
        "publish": (1, 0.004),
    }


def test_reasons_of_rejection_are_told_before_they_happen() -> None:
    """A dashboard sees zero, not a gap; an unforeseen reason is counted all the same."""
    tally = Tally()
    assert tally.num_rejected[ErrorReason.QUEUE_FULL] == 0
    assert ErrorReason.INTERNAL not in tally.num_rejected
    tally.rejected(ErrorReason.INTERNAL)
    assert tally.num_rejected[ErrorReason.INTERNAL] == 1
