"""The router's numbers once more, under the names and labels that dashboards of vLLM ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.metrics import counter, counters, gauge, histogram, info
from router.request import FinishReason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

    from router.node import Node

_FINISHED_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.ERROR: "error",
}


def vllm_metrics(node: Node) -> Iterator[Metric]:
    """Every family with the label `model_name`."""
    for family in _families(node):
        for index, sample in enumerate(family.samples):
            labels = {"model_name": node.served_model_name, **sample.labels}
            family.samples[index] = sample._replace(labels=labels)
        yield family


def _families(node: Node) -> Iterator[Metric]:
    yield _cache_config(node)
    yield from _gauges(node)
    yield from _counters(node)
    yield from _histograms(node)


def _cache_config(node: Node) -> Metric:
    labels = {
        "block_size": str(node.terms.block_size),
        "num_gpu_blocks": str(node.terms.num_blocks),
        "cache_dtype": node.model.dtype,
        "enable_prefix_caching": str(node.terms.prefix_cache_enabled),
    }
    return info("vllm:cache_config_info", "The KV pool; always 1.", labels)


def _gauges(node: Node) -> Iterator[Metric]:
    scheduler = node.scheduler
    num_running = scheduler.num_running_requests
    num_waiting = len(scheduler.requests) - num_running
    yield gauge("vllm:num_requests_running", "As quire_num_requests_running.", num_running)
    yield gauge("vllm:num_requests_waiting", "As quire_num_requests_waiting.", num_waiting)
    yield gauge("vllm:kv_cache_usage_perc", "Share of blocks in use, 0 to 1.", _pool_usage(node))


def _pool_usage(node: Node) -> float:
    """Cached blocks count as available, as vLLM has it."""
    num_blocks = node.terms.num_blocks - 1  # but the null block
    num_available = node.scheduler.num_available_blocks
    return 0.0 if num_available is None else 1.0 - num_available / num_blocks


def _counters(node: Node) -> Iterator[Metric]:
    tally = node.tally
    same = (
        ("vllm:prefix_cache_queries", "quire_prompt_tokens", tally.num_prompt_tokens),
        ("vllm:prefix_cache_hits", "quire_prompt_tokens_cached", tally.num_cached_prompt_tokens),
        ("vllm:num_preemptions", "quire_num_preemptions", tally.num_preemptions),
        ("vllm:prompt_tokens", "quire_prompt_tokens", tally.num_prompt_tokens),
        ("vllm:generation_tokens", "quire_output_tokens", tally.num_output_tokens),
    )
    for name, ours, value in same:
        yield counter(name, f"As {ours}_total.", value)
    yield counters(
        "vllm:request_success",
        "As quire_requests_finished_total.",
        "finished_reason",
        {_FINISHED_REASONS[reason]: count for reason, count in tally.num_finished.items()},
    )


def _histograms(node: Node) -> Iterator[Metric]:
    tally = node.tally
    same = (
        (
            "vllm:time_to_first_token_seconds",
            "quire_time_to_first_token_seconds",
            tally.time_to_first_token,
        ),
        (
            "vllm:inter_token_latency_seconds",
            "quire_inter_token_latency_seconds",
            tally.inter_token_latency,
        ),
        ("vllm:e2e_request_latency_seconds", "quire_e2e_seconds", tally.end_to_end),
        ("vllm:request_queue_time_seconds", "quire_queue_seconds", tally.queue_time),
    )
    for name, ours, found in same:
        yield histogram(name, f"As {ours}.", found)
