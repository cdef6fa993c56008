"""Messages of `quire.router.v1` to the router's nouns and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.router.v1 import router_pb2 as pb
from router.sampling_params import SamplingParams, StoppingCriteria

if TYPE_CHECKING:
    from router.request import Finish, Request
    from router.step import TokenLogprobs
    from router.text_output import OutputDelta

_LOGIT_BIAS = "logit_bias"


def sampling_params(message: pb.SamplingParams) -> SamplingParams:
    """How tokens are chosen, with defaults for what is absent."""
    # ListFields gives what was set: every singular field is optional.
    given = {field.name: value for field, value in message.ListFields()}
    given[_LOGIT_BIAS] = tuple((entry.token_id, entry.bias) for entry in message.logit_bias)
    return SamplingParams(**given)


def stopping_criteria(message: pb.StoppingCriteria) -> StoppingCriteria:
    """When output ends."""
    return StoppingCriteria(
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        min_tokens=message.min_tokens,
        stop_strings=tuple(message.stop_strings),
        include_stop_string=message.include_stop_string,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
    )


def accepted(request: Request) -> pb.Accepted:
    """The first event of a request."""
    return pb.Accepted(
        request_id=request.request_id,
        num_prompt_tokens=len(request.prompt_token_ids),
        seed=request.seed,
    )


def delta(sample_index: int, output: OutputDelta) -> pb.GenerateResponse:
    """New output of one sample."""
    response = pb.GenerateResponse()
    # Filled in place: through constructors the same costs three times as much.
    message = response.delta
    message.sample_index = sample_index
    message.token_ids.extend(output.token_ids)
    message.text = output.text
    if output.logprobs:
        message.logprobs.extend(_logprobs(found) for found in output.logprobs)
    return response


def extend(completion: pb.Completion, output: OutputDelta) -> None:
    """Add output to what a sample has so far."""
    completion.token_ids.extend(output.token_ids)
    completion.text += output.text
    completion.logprobs.extend(_logprobs(found) for found in output.logprobs)


def _logprobs(found: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        token_id=found.token_id,
        logprob=found.logprob,
        top=[pb.TokenLogprob(token_id=token, logprob=value) for token, value in found.top],
    )


def finished(finish: Finish) -> pb.Finished:
    """The end of one sample."""
    message = pb.Finished(
        sample_index=finish.sample_index,
        finish_reason=pb.FinishReason.ValueType(finish.reason.value),
        usage=pb.Usage(
            num_prompt_tokens=finish.num_prompt_tokens,
            num_output_tokens=finish.num_output_tokens,
            num_cached_tokens=finish.num_cached_tokens,
        ),
    )
    if isinstance(finish.matched, str):
        message.stop_string = finish.matched
    elif finish.matched is not None:
        message.stop_token_id = finish.matched
    return message
