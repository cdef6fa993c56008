"""The router's numbers as Prometheus metrics; docs/metrics.md explains each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.metrics import counter, counters, gauge, histogram, histograms, info

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

    from router.node import Node


def router_metrics(node: Node) -> Iterator[Metric]:
    """Every family, as of now."""
    yield _model(node)
    yield from _requests(node)
    yield from _tokens(node)
    yield from _latencies(node)
    yield from _steps(node)


def _model(node: Node) -> Metric:
    labels = {
        "model_name": node.served_model_name,
        "architecture": node.model.architecture,
        "dtype": node.model.dtype,
        "max_model_len": str(node.model.max_model_len),
    }
    return info("quire_model_info", "Model that is served; always 1.", labels)


def _requests(node: Node) -> Iterator[Metric]:
    tally, scheduler = node.tally, node.scheduler
    num_running = scheduler.num_running_requests
    yield counter("quire_requests_accepted", "Requests accepted.", tally.num_accepted)
    yield counters(
        "quire_requests_finished",
        "Accepted requests that ended, by the gravest reason among their samples.",
        "finish_reason",
        {reason.name: count for reason, count in tally.num_finished.items()},
    )
    yield counters(
        "quire_requests_rejected",
        "Requests refused before they waited, by reason.",
        "reason",
        {reason.value: count for reason, count in tally.num_rejected.items()},
    )
    yield gauge(
        "quire_num_requests_running", "Live requests of which a sequence runs.", num_running
    )
    yield gauge(
        "quire_num_requests_waiting",
        "Live requests of which no sequence runs.",
        len(scheduler.requests) - num_running,
    )
    yield gauge("quire_num_sequences_running", "Sequences that run.", scheduler.num_running)
    yield gauge(
        "quire_num_sequences_waiting", "Sequences that wait for admission.", scheduler.num_waiting
    )
    yield counter("quire_num_preemptions", "Sequences preempted.", tally.num_preemptions)


def _tokens(node: Node) -> Iterator[Metric]:
    tally = node.tally
    yield counter(
        "quire_prompt_tokens",
        "Prompt tokens of requests, counted when they are first admitted.",
        tally.num_prompt_tokens,
    )
    yield counter(
        "quire_prompt_tokens_cached",
        "Those of them that were found in the prefix cache.",
        tally.num_cached_prompt_tokens,
    )
    yield counter("quire_output_tokens", "Tokens generated.", tally.num_output_tokens)


def _latencies(node: Node) -> Iterator[Metric]:
    tally = node.tally
    yield histogram(
        "quire_time_to_first_token_seconds",
        "Request received to its first token, queue included.",
        tally.time_to_first_token,
    )
    yield histogram(
        "quire_inter_token_latency_seconds",
        "Gaps between the tokens of a sequence.",
        tally.inter_token_latency,
    )
    yield histogram("quire_e2e_seconds", "Request received to its end.", tally.end_to_end)
    yield histogram(
        "quire_queue_seconds", "Request received to its first admission.", tally.queue_time
    )


def _steps(node: Node) -> Iterator[Metric]:
    tally = node.tally
    yield counter("quire_num_steps", "Steps that the compute service answered.", tally.num_steps)
    yield counter("quire_num_step_failures", "Those of them that failed.", tally.num_step_failures)
    yield histograms(
        "quire_step_seconds", "Time of each stage of a step that ran.", "stage", tally.step_stages
    )
    yield counter(
        "quire_stream_reconnects",
        "Times that lost streams to memory and compute were opened again.",
        tally.num_reconnects,
    )
