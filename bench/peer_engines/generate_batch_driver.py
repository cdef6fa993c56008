"""transformers' own continuous batching, which is what `generate_batch` runs.

python -m bench.peer_engines.generate_batch_driver FOLDER
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from transformers import ContinuousBatchingConfig, GenerationConfig

from bench.peer_engines.transformers_driver import about_model, load
from bench.peer_engines.wire import Arrivals, Request, TokenTimes, serve, warm_up_requests

if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE_SIZE = 256  # tokens; its default
MAX_BATCHED_TOKENS = 512  # as Quire's


class GenerateBatchEngine:
    """One model; each run has a manager of its own, sized for its requests and made before its clock starts."""

    def __init__(self, folder: str) -> None:
        self._model = load(folder, "sdpa")

    def about(self) -> dict[str, str]:
        """See `about_model`."""
        return about_model(self._model)

    def run(self, requests: list[Request]) -> list[TokenTimes]:
        """Hand over requests as they arrive, until all have ended."""
        with self._model.continuous_batching_context_manager(
            generation_config=greedy(),
            continuous_batching_config=sized_for(requests),
        ) as manager:
            return follow(manager, requests)


def greedy() -> GenerationConfig:
    """Past any end token."""
    return GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)  # type: ignore[no-untyped-call]


def sized_for(requests: list[Request]) -> ContinuousBatchingConfig:
    """Left to itself it takes nine tenths of the memory that is free."""
    longest = max(len(request.prompt) + request.num_output for request in requests)
    return ContinuousBatchingConfig(
        page_size=PAGE_SIZE,
        num_blocks=len(requests) * (-(-longest // PAGE_SIZE) + 1),
        max_batch_tokens=MAX_BATCHED_TOKENS,
    )


def follow(manager: Any, requests: list[Request]) -> list[TokenTimes]:  # noqa: ANN401 -- without types
    """Token times as the manager recorded them; it delivers a request only when it has ended."""
    times: list[TokenTimes] = [[] for _ in requests]
    num_running, arrivals = 0, Arrivals(requests)
    while arrivals or num_running:
        for place, request in arrivals.due():
            manager.add_request(
                request.prompt,
                request_id=str(place),
                max_new_tokens=request.num_output,
                record_timestamps=True,
            )
            num_running += 1
        result = manager.get_result(timeout=0.02)
        if result is None and not manager.is_running():
            raise RuntimeError("the thread that generates has ended; its error stands above")
        if result is not None and result.is_finished():
            times[int(result.request_id)] = [arrivals.since_start(at) for at in result.timestamps]
            num_running -= 1
    return times


def main(arguments: Sequence[str]) -> None:
    """Load, warm up, serve."""
    engine = GenerateBatchEngine(arguments[0])
    engine.run(warm_up_requests())
    serve(engine)


if __name__ == "__main__":
    main(sys.argv[1:])
