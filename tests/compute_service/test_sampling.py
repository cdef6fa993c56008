"""Sampling: each setting against transformers or against numbers worked out by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from compute_service.philox import philox_4x32, uniform
from compute_service.sampling import RowSampling, SampledToken, SampleRow, _adjusted, sample

if TYPE_CHECKING:
    from torch import Tensor

VOCAB_SIZE = 50
NEUTRAL = RowSampling(
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    seed=7,
    repetition_penalty=1.0,
    frequency_penalty=0.0,
    presence_penalty=0.0,
    logit_bias=(),
    num_logprobs=-1,
    min_tokens=0,
    suppressed_token_ids=(),
)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_numbers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    """The known answers that its authors publish with their code."""
    assert philox_4x32(counter, key) == expected


def test_noise_depends_on_seed_sample_and_position() -> None:
    """Every argument counts, all 64 bits of the seed among them; numbers lie in [0, 1)."""
    tokens = list(itertools.product((0, 1, 1 << 40, (1 << 64) - 1), range(3), range(50)))
    found = set(uniform(*zip(*tokens, strict=True)).tolist())
    assert len(found) == 600
    assert 0 <= min(found) < max(found) < 1


def row(position: int = 5, output: tuple[int, ...] = (), **changes: Any) -> SampleRow:
    return SampleRow(
        logits_row=0,
        sampling=replace(NEUTRAL, **changes),
        position=position,
        prompt_token_ids=np.array([1, 2, 2], dtype=np.int32),
        output_token_ids=np.array(output, dtype=np.int32),
        num_output_tokens=len(output),
    )


def draw(logits: Tensor, **changes: Any) -> SampledToken:
    (found,) = sample(logits[None], [row(**changes)])
    return found


def draws(logits: Tensor, count: int, **changes: Any) -> list[int]:
    rows = [row(position, **changes) for position in range(count)]
    return [found.token_id for found in sample(logits[None], rows)]


@pytest.fixture
def logits() -> Tensor:
    return 3 * torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(0))


def test_frequencies_are_the_softmax(logits: Tensor) -> None:
    """Over many positions each token comes as often as its probability says."""
    count = 4000
    found = torch.bincount(torch.tensor(draws(logits, count)), minlength=VOCAB_SIZE) / count
    expected = torch.softmax(logits, 0)
    # Five standard deviations of a binomial share.
    assert (found - expected).abs().max() < 5 * (0.25 / count) ** 0.5
    assert found[expected > 0.02].min() > 0


@pytest.mark.parametrize(
    ("changes", "warper"),
    [
        ({"top_k": 5}, TopKLogitsWarper(5)),
        ({"top_p": 0.8}, TopPLogitsWarper(0.8)),
        ({"min_p": 0.1}, MinPLogitsWarper(0.1)),
    ],
)
def test_filters_keep_what_transformers_keeps(
    changes: dict[str, Any], warper: Any, logits: Tensor
) -> None:
    """The tokens that are ever drawn are those that transformers leaves."""
    kept = torch.isfinite(warper(None, logits[None])[0]).nonzero()[:, 0].tolist()
    assert set(draws(logits, 3000, **changes)) == set(kept)


def test_top_p_reaches_as_far_as_it_must() -> None:
    """A nearly flat distribution keeps thousands of tokens, as transformers does."""
    logits = -1e-4 * torch.arange(3000.0)
    kept = torch.isfinite(TopPLogitsWarper(0.9)(None, logits[None])[0]).sum()
    found = draws(logits, 4000, top_p=0.9)
    assert 2500 < max(found) < kept < 2800


def test_a_top_k_of_one_is_greedy(logits: Tensor) -> None:
    """However hot, one candidate is no choice; a top_k above the vocabulary is none either."""
    assert set(draws(logits, 50, top_k=1, temperature=2.0)) == {int(logits.argmax())}
    assert draws(logits, 50, top_k=10_000) == draws(logits, 50)


def test_temperature_zero_is_greedy_and_low_temperature_nearly(logits: Tensor) -> None:
    """No noise at zero."""
    assert set(draws(logits, 20, temperature=0.0)) == {int(logits.argmax())}
    assert set(draws(logits, 20, temperature=0.01)) == {int(logits.argmax())}


def test_the_repetition_penalty_is_that_of_transformers(logits: Tensor) -> None:
    """Prompt and output tokens are divided or multiplied, whichever makes them less likely."""
    seen = [1, 2, 2, 9, 9]
    penalized = RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([seen]), logits[None].clone())[0]
    for token_id in range(VOCAB_SIZE):
        # A bias on one token brings it near the top, so that its own penalty decides.
        bias = float(penalized.max() - penalized[token_id]) / (1.8 if token_id in seen else 1)
        for shift in (-20.0, 20.0):
            biased = logits.clone()
            biased[token_id] += bias + shift
            expected = RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([seen]), biased[None])
            found = draw(biased, temperature=0.0, repetition_penalty=1.8, output=(9, 9)).token_id
            assert found == int(expected.argmax())


def test_frequency_and_presence_count_the_output_alone() -> None:
    """Each occurrence costs frequency_penalty, the first also presence_penalty; the prompt costs nothing."""
    logits = torch.tensor([0.0, 5.0, 0.0, 4.0, 3.0])
    assert draw(logits, temperature=0.0, output=(3,)).token_id == 1
    # Token 1: 5 - 2 x 0.6 - 0.3 = 3.5 against token 3: 4.
    changes = {"frequency_penalty": 0.6, "presence_penalty": 0.3, "temperature": 0.0}
    assert draw(logits, output=(1, 1), **changes).token_id == 3
    # Token 3: 4 - 0.6 - 0.3 = 3.1 falls behind token 1: 5 - 0.6 - 0.3 = 4.1.
    assert draw(logits, output=(1, 3), **changes).token_id == 1


def test_a_bias_is_added_and_end_tokens_wait_for_min_tokens() -> None:
    """Bias moves a token; what may not end the output yet is never drawn."""
    logits = torch.tensor([0.0, 5.0, 0.0, 4.0])
    assert draw(logits, temperature=0.0, logit_bias=((2, 5.5),)).token_id == 2
    waiting = {"temperature": 0.0, "min_tokens": 2, "suppressed_token_ids": (1,)}
    assert draw(logits, output=(0,), **waiting).token_id == 3
    assert draw(logits, output=(0, 0), **waiting).token_id == 1


def test_logprobs_are_those_of_the_model(logits: Tensor) -> None:
    """Log-probabilities come from the raw logits, whatever else is set."""
    expected = torch.log_softmax(logits, 0)
    found = draw(logits, num_logprobs=3, logit_bias=((4, 100.0),), temperature=0.3)
    assert found.token_id == 4
    assert found.logprob == pytest.approx(float(expected[4]))
    assert [token_id for token_id, _ in found.top] == expected.topk(3).indices.tolist()
    assert draw(logits, num_logprobs=0).top == ()
    assert draw(logits).logprob is None


def test_rows_of_a_batch_do_not_meet(logits: Tensor) -> None:
    """Each row of a batch with different settings gets what it gets alone."""
    both = torch.stack([logits, logits.flip(0)])
    rows = [
        replace(row(position, temperature=0.5 + position / 10), logits_row=position % 2)
        for position in range(20)
    ]
    alone = [next(iter(sample(both, [found]))).token_id for found in rows]
    assert [found.token_id for found in sample(both, rows)] == alone


def test_a_logit_that_is_no_number_fails(logits: Tensor) -> None:
    """NaN is an error that names the output, never a token."""
    broken = torch.stack([logits, logits.clone().fill_(float("nan"))])
    with pytest.raises(ValueError, match="first in output 1"):
        list(sample(broken, [row()]))


def test_settings_are_applied_where_the_logits_are() -> None:
    """On a GPU (here one without memory, which checks devices only) no setting brings a tensor of the CPU into play."""
    sampling = replace(
        NEUTRAL,
        repetition_penalty=1.2,
        frequency_penalty=0.5,
        presence_penalty=0.5,
        logit_bias=((3, 1.0),),
        min_tokens=5,
        suppressed_token_ids=(1, 2),
    )
    row = SampleRow(0, sampling, 5, np.array([1, 2, 3]), np.array([4, 5]), 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits = torch.empty(VOCAB_SIZE, device="cuda")
        assert _adjusted(logits, row).device == logits.device
