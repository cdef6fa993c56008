"""`generate` of transformers: requests that are there together run as one batch, others wait for its end.

python -m bench.peer_engines.transformers_driver FOLDER
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoModelForCausalLM, StoppingCriteria

from bench.peer_engines.wire import Arrivals, Request, TokenTimes, serve, warm_up_requests

if TYPE_CHECKING:
    from collections.abc import Sequence


def fastest_dtype() -> torch.dtype:
    """In which products are fast here: without instructions for bfloat16, torch's take longer in it."""
    native: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001 -- the only one who knows
    return torch.bfloat16 if native else torch.float32


def load(folder: str, attention: str) -> Any:  # noqa: ANN401 -- models have no types
    """The checkpoint's model, in the fastest dtype."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=fastest_dtype(), attn_implementation=attention
    )
    return model.eval()


def about_model(model: Any) -> dict[str, str]:  # noqa: ANN401 -- as above
    """What transformers runs in."""
    dtype = str(model.dtype).removeprefix("torch.")
    return {
        "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "precision": f"all in {dtype}",
    }


class Stamp(StoppingCriteria):
    """Notes when each step ended and stops nothing."""

    def __init__(self, arrivals: Arrivals) -> None:
        self.times: TokenTimes = []
        self._arrivals = arrivals

    def __call__(self, input_ids: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
        """Bool `[batch]`, asked for after every token."""
        self.times.append(self._arrivals.now())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class GenerateEngine:
    """One model."""

    def __init__(self, folder: str) -> None:
        self._model = load(folder, "sdpa")

    def about(self) -> dict[str, str]:
        """See `about_model`."""
        return about_model(self._model)

    def run(self, requests: list[Request]) -> list[TokenTimes]:
        """Batch after batch."""
        times: list[TokenTimes] = [[] for _ in requests]
        arrivals = Arrivals(requests)
        while arrivals:
            arrivals.sleep()
            if batch := dict(arrivals.due()):
                stamped = self._generate(list(batch.values()), arrivals)
                times = [stamped if place in batch else found for place, found in enumerate(times)]
        return times

    def _generate(self, batch: list[Request], arrivals: Arrivals) -> TokenTimes:
        """Prompts and outputs of one workload are equally long, so nothing is padded."""
        prompts, stamp = torch.tensor([request.prompt for request in batch]), Stamp(arrivals)
        with torch.inference_mode():
            self._model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=batch[0].num_output,
                min_new_tokens=batch[0].num_output,
                pad_token_id=0,
                stopping_criteria=[stamp],
            )
        return stamp.times


def main(arguments: Sequence[str]) -> None:
    """Load, warm up, serve."""
    engine = GenerateEngine(arguments[0])
    engine.run(warm_up_requests())
    serve(engine)


if __name__ == "__main__":
    main(sys.argv[1:])
