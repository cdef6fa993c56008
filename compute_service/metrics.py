"""The compute service's numbers as Prometheus metrics; docs/metrics.md explains each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compute_service.step import StepFailed
from quire.distribution import STEP_BOUNDS_S, Distribution
from quire.metrics import counter, gauge, histogram, info

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

    from compute_service.engine import Answer
    from compute_service.model_loader import LoadedModel
    from compute_service.step import Step


@dataclass(frozen=True, slots=True)
class _Loaded:
    """The model that was loaded."""

    architecture: str
    dtype: str
    max_model_len: int
    seconds: float


class EngineTally:
    """Counts of steps since the process began. The engine's thread counts, another one reads."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_step_failures = 0
        self.num_tokens = 0
        self.num_outputs = 0
        self.device_time = Distribution(STEP_BOUNDS_S)
        self.queued_time = Distribution(STEP_BOUNDS_S)
        self._loaded: _Loaded | None = None

    def model_loaded(self, model: LoadedModel, seconds: float) -> None:
        """The model is there, and proven, after `seconds`."""
        dtype = str(model.dtype).removeprefix("torch.")
        self._loaded = _Loaded(model.architecture, dtype, model.max_model_len, seconds)

    def answered(self, step: Step, answer: Answer) -> None:
        """The engine answered `step`."""
        self.num_steps += 1
        if isinstance(answer, StepFailed):
            self.num_step_failures += 1
            return
        self.num_tokens += sum(step.num_tokens)
        self.num_outputs += len(answer.tokens)
        self.device_time.observe(answer.device_us * 1e-6)
        self.queued_time.observe(answer.queued_us * 1e-6)

    def collect(self) -> Iterator[Metric]:
        """Every family, as of now; those of the model once it is loaded."""
        yield counter("quire_compute_num_steps", "Steps answered.", self.num_steps)
        yield counter(
            "quire_compute_num_step_failures",
            "Steps that did not run to their end, or were of another epoch.",
            self.num_step_failures,
        )
        yield counter("quire_compute_tokens", "Tokens that steps ran.", self.num_tokens)
        yield counter("quire_compute_outputs", "Tokens that were sampled.", self.num_outputs)
        yield histogram(
            "quire_compute_device_seconds", "Time of a step on the device.", self.device_time
        )
        yield histogram(
            "quire_compute_queued_seconds", "Time that a step waited for it.", self.queued_time
        )
        if self._loaded is not None:
            yield from _model(self._loaded)


def _model(loaded: _Loaded) -> Iterator[Metric]:
    labels = {
        "architecture": loaded.architecture,
        "dtype": loaded.dtype,
        "max_model_len": str(loaded.max_model_len),
    }
    yield info("quire_model_info", "Model that is loaded; always 1.", labels)
    yield gauge(
        "quire_compute_model_load_seconds", "Time to load and prove the model.", loaded.seconds
    )
