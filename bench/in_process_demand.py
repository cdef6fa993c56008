"""A router's plan to the block manager's demand, and its answer back, without messages between them."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np

from memory_service import demand
from memory_service.record import ReleaseReason
from router.step import Admission, MemoryAnswer, RefusalReason

if TYPE_CHECKING:
    from collections.abc import Iterable

    from router.request import Sequence
    from router.step import Fork, StepPlan


def demand_of(plan: StepPlan) -> demand.StepDemand:
    """What the router plans, as the block manager is asked for it."""
    token_ids = b"".join(plan.commits.token_ids)
    return demand.StepDemand(
        step=plan.step,
        acknowledged_step=plan.acknowledged_step,
        commit_rows=_ints(plan.commits.rows),
        commit_num_computed_tokens=_ints(plan.commits.num_computed_tokens),
        commit_token_ids=np.frombuffer(token_ids, dtype=np.int32),
        releases=tuple(found.row for found in plan.releases),
        release_reasons=tuple(ReleaseReason(found.reason.value) for found in plan.releases),
        forks=tuple(_fork_demand(found) for found in plan.forks),
        extend_rows=_ints(plan.extends.rows),
        extend_starts=_ints(plan.extends.starts),
        extend_num_tokens=_ints(plan.extends.num_tokens),
        admits=tuple(_admit(found) for found in plan.admits),
        admit_token_budget=plan.admit_token_budget,
        watermark_blocks=plan.watermark_blocks,
    )


def _fork_demand(fork: Fork) -> demand.Fork:
    child = fork.child
    request_id = child.request.request_id
    return demand.Fork(
        fork.parent_row,
        child.row,
        child.incarnation,
        child.sequence_id,
        request_id,
        fork.num_tokens,
    )


def _admit(sequence: Sequence) -> demand.Admit:
    return demand.Admit(
        sequence.row,
        sequence.incarnation,
        sequence.sequence_id,
        sequence.request.request_id,
        np.array(sequence.token_ids, dtype=np.int32),
        sequence.num_sequences,
        sequence.request.tenant,
    )


def memory_answer(answer: demand.StepAnswer) -> MemoryAnswer:
    """What the block manager gave, as the router knows it."""
    return MemoryAnswer(
        step=answer.step,
        admissions={
            found.row: Admission(
                found.num_cached_tokens, found.num_scheduled_tokens, found.block_table.tolist()
            )
            for found in answer.admissions
        },
        new_blocks=answer.new_blocks,
        forked_tables={row: table.tolist() for row, table in answer.forked_tables},
        copies=answer.copies,
        remaps=answer.remaps,
        refusals={row: RefusalReason(reason.value) for row, reason in answer.refusals},
        num_available_blocks=answer.num_available_blocks,
    )


def _ints(values: Iterable[int]) -> demand.IntArray:
    return np.array(array("i", values), dtype=np.int32)
