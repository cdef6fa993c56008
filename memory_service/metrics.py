"""The memory service's numbers as Prometheus metrics; docs/metrics.md explains each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memory_service.demand import RefusalReason
from quire.distribution import STEP_BOUNDS_S, Distribution
from quire.errors import NoPool
from quire.metrics import counter, counters, gauge, gauges, histogram

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

    from memory_service.demand import StepAnswer
    from memory_service.pool import Pool
    from memory_service.pool_registry import PoolRegistry
    from memory_service.sessions import Sessions
    from memory_service.state_store import StateStore


class StepTally:
    """Counts of what was answered since the process began."""

    def __init__(self) -> None:
        self.answer_time = Distribution(STEP_BOUNDS_S)  # one value a step
        self.num_refusals = dict.fromkeys(RefusalReason, 0)  # of admissions
        self.num_integrity_checks = 0
        self.num_integrity_findings = 0

    def answered(self, answer: StepAnswer, num_admits: int, seconds: float) -> None:
        """A step was answered within `seconds`."""
        self.answer_time.observe(seconds)
        # Admissions are refused last: the refusals before theirs are of running sequences.
        num_refused = num_admits - len(answer.admissions)
        for _, reason in answer.refusals[len(answer.refusals) - num_refused :]:
            self.num_refusals[reason] += 1

    def checked(self, num_findings: int) -> None:
        """The books of the idle pool were verified."""
        self.num_integrity_checks += 1
        self.num_integrity_findings += num_findings


def memory_metrics(
    registry: PoolRegistry, sessions: Sessions, tally: StepTally, store: StateStore | None
) -> Iterator[Metric]:
    """Every family, as of now; those of the pool once there is one."""
    writer = registry.writer
    is_alive = writer is not None and writer.is_connected
    yield gauge("quire_writer_alive", "1 while a compute service is attached.", is_alive)
    yield gauge("quire_num_sessions", "Live sessions.", len(sessions))
    num_log_bytes = store.num_log_bytes if store else 0
    yield gauge("quire_log_bytes", "Log since its last snapshot; 0 without one.", num_log_bytes)
    yield from _answers(tally)
    try:
        pool = registry.pool
    except NoPool:
        return
    yield from _blocks(pool)
    yield from _tenants(pool)
    yield from _prefix_cache(pool)


def _answers(tally: StepTally) -> Iterator[Metric]:
    yield counter("quire_memory_num_steps", "Steps answered.", tally.answer_time.count)
    yield histogram("quire_memory_answer_seconds", "Time to answer a step.", tally.answer_time)
    yield counters(
        "quire_num_admissions_refused",
        "Admissions refused, each time they were asked for, by reason.",
        "reason",
        {reason.name: count for reason, count in tally.num_refusals.items()},
    )
    yield counter(
        "quire_integrity_checks",
        "Checks of the pool's books when idle.",
        tally.num_integrity_checks,
    )
    yield counter(
        "quire_integrity_findings",
        "Disagreements that those checks found; any is a defect.",
        tally.num_integrity_findings,
    )


def _blocks(found: Pool) -> Iterator[Metric]:
    pool = found.manager.pool
    num_used = int(((pool.ref_counts > 0) | (pool.pins > 0)).sum())
    yield gauge(
        "quire_pool_num_blocks", "All blocks: 1 null block + free + cached + used.", pool.num_blocks
    )
    yield gauges(
        "quire_pool_blocks",
        "Blocks but the null block, by state.",
        "state",
        {"free": pool.num_free, "cached": pool.num_cached, "used": num_used},
    )
    num_shared = int((pool.ref_counts > 1).sum())
    yield gauge(
        "quire_pool_num_shared_blocks", "Used blocks that several sequences hold.", num_shared
    )
    num_pinned = int((pool.pins > 0).sum())
    yield gauge("quire_pool_num_pinned_blocks", "Blocks that a copy reads.", num_pinned)
    yield gauge("quire_pool_bytes", "Size of the pool.", found.size_bytes)
    yield gauge("quire_pool_block_bytes", "Size of a block over all layers.", found.block_bytes)
    yield gauge(
        "quire_pool_num_sequences", "Sequences that hold blocks.", found.manager.num_sequences
    )


def _tenants(found: Pool) -> Iterator[Metric]:
    pool = found.manager.pool
    yield gauge("quire_num_tenants", "Tenants that hold blocks or have a quota.", len(pool.tenants))
    yield gauge(
        "quire_pool_num_retained_blocks", "Blocks that a retention protects.", pool.num_retained
    )


def _prefix_cache(found: Pool) -> Iterator[Metric]:
    manager, counters = found.manager, found.manager.ledger.counters
    yield counter(
        "quire_prefix_query_tokens",
        "Tokens of all admissions, those after a preemption too.",
        manager.num_prefix_query_tokens,
    )
    yield counter(
        "quire_prefix_hit_tokens",
        "Those of them that were found in the prefix cache.",
        manager.num_prefix_hit_tokens,
    )
    yield counter(
        "quire_prefix_partial_hit_tokens",
        "Those of them that came with a copy of a partly matching block.",
        counters.num_partial_hit_tokens,
    )
    yield counter(
        "quire_num_deduplicated_blocks",
        "Blocks freed because another one with the same content was there.",
        counters.num_deduplicated_blocks,
    )
    yield counter(
        "quire_num_evictions", "Cached blocks given to others.", manager.pool.num_evictions
    )
