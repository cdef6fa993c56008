"""The block manager under any sequence of steps, against a naive model of what each slot holds."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import (
    run_state_machine_as_test,
)
from pool_machine import NUM_ROWS, SESSION, PoolMachine, ints, make_manager

from memory_service import tenants
from memory_service.block_pool import BlockPool
from memory_service.demand import Admit, Fork, RefusalReason, StepAnswer, StepDemand
from memory_service.integrity import check_integrity
from memory_service.slots import SlotAllocator
from quire.errors import BrokenContract

if TYPE_CHECKING:
    from memory_service.block_manager import BlockManager
    from memory_service.sequence_table import SequenceTable

PoolMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("QUIRE_TEST_EXAMPLES", "80")),
    stateful_step_count=40,
    deadline=None,
)
test_every_slot_holds_what_its_readers_expect = PoolMachine.TestCase


def never_shared(
    _: SlotAllocator, __: SequenceTable, rows: np.ndarray, *___: np.ndarray
) -> np.ndarray:
    return np.zeros(len(rows), dtype=np.int32)


MUTATIONS: dict[str, tuple[object, str, Any]] = {
    "all tenants have one salt": (tenants, "tenant_salt", lambda _: b"salt"),
    "no copy before a shared block is written": (SlotAllocator, "_num_shared", never_shared),
    "no pin for the source of a copy": (BlockPool, "pin", lambda _, __: None),
    "a tail that is kept by one reference too few": (
        BlockPool,
        "acquire",
        lambda pool, block_id: (
            pool.queue.remove(block_id, pool.home_of(block_id))
            if pool._is_cached(block_id)
            else None
        ),
    ),
    "a block is freed while it is held": (
        BlockPool,
        "_settle",
        lambda pool, block_id: pool.free.append(block_id),
    ),
}


@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_the_machine_notices_a_broken_manager(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rule, broken on purpose, makes the test above fail."""
    monkeypatch.setattr(*MUTATIONS[name])
    with pytest.raises(Exception):  # noqa: B017, PT011 -- whichever check sees it first
        run_state_machine_as_test(
            PoolMachine,
            settings=settings(
                max_examples=200,
                stateful_step_count=40,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
            ),
        )


def admit(
    manager: BlockManager, row: int, tokens: list[int], step: int, budget: int = 99
) -> StepAnswer:
    demand = StepDemand(
        step=step, admits=(Admit(row, 1, f"s{row}", "r", ints(tokens)),), admit_token_budget=budget
    )
    return manager.apply(SESSION, demand)


def test_prefix_in_progress_waits_and_then_hits() -> None:
    """A prompt whose next block a running sequence computes is passed over, and hits once that is committed."""
    manager = make_manager()
    tokens = list(range(9))
    admit(manager, 0, tokens, 1)
    assert admit(manager, 1, tokens, 2).refusals == [(1, RefusalReason.PREFIX_IN_PROGRESS)]
    commit = StepDemand(
        step=3,
        commit_rows=ints([0]),
        commit_num_computed_tokens=ints([9]),
        commit_token_ids=ints(tokens[:8]),
    )
    manager.apply(SESSION, commit)
    (admission,) = admit(manager, 1, tokens, 4).admissions
    assert (admission.num_cached_tokens, admission.num_scheduled_tokens) == (8, 1)
    assert manager.table(SESSION).block_table(0)[:2].tolist() == admission.block_table[:2].tolist()


def test_a_hit_leaves_a_token_to_run() -> None:
    """A prompt that is wholly cached and ends with a full block runs that block again: its last logits are needed."""
    manager = make_manager()
    tokens = list(range(8))
    admit(manager, 0, tokens, 1)
    commit = StepDemand(
        step=2,
        commit_rows=ints([0]),
        commit_num_computed_tokens=ints([8]),
        commit_token_ids=ints(tokens),
    )
    manager.apply(SESSION, commit)
    (admission,) = admit(manager, 1, tokens, 3).admissions
    assert (admission.num_cached_tokens, admission.num_scheduled_tokens) == (4, 4)


@pytest.mark.parametrize(("num_blocks", "fits"), [(5, False), (6, True)])
def test_siblings_count_at_admission(num_blocks: int, *, fits: bool) -> None:
    """Three samples of a prompt of three blocks need two copies of the last one besides."""
    manager = make_manager(num_blocks)
    demand = StepDemand(
        step=1,
        admits=(Admit(0, 1, "a", "a", ints(list(range(10))), num_sequences=3),),
        admit_token_budget=99,
    )
    assert bool(manager.apply(SESSION, demand).admissions) == fits


@pytest.mark.parametrize(("watermark", "fits"), [(2, True), (3, False)])
def test_admissions_leave_the_watermark_unless_alone(watermark: int, *, fits: bool) -> None:
    """A second sequence must leave as many blocks as the watermark says; the first one need not."""
    manager = make_manager(num_blocks=6)
    admit(manager, 0, list(range(8)), 1)
    demand = StepDemand(
        step=2,
        admits=(Admit(1, 1, "b", "b", ints([90])),),
        admit_token_budget=99,
        watermark_blocks=watermark,
    )
    assert bool(manager.apply(SESSION, demand).admissions) == fits
    alone = make_manager(num_blocks=3)
    demand = StepDemand(
        step=1,
        admits=(Admit(0, 1, "a", "a", ints(list(range(8)))),),
        admit_token_budget=99,
        watermark_blocks=5,
    )
    assert alone.apply(SESSION, demand).admissions


def test_the_tail_of_a_chain_is_evicted_before_its_head() -> None:
    """What is evicted first is what no later prompt can use without the rest."""
    manager = make_manager(num_blocks=4)
    tokens = list(range(12))
    admit(manager, 0, tokens, 1)
    commit = {
        "commit_rows": ints([0]),
        "commit_num_computed_tokens": ints([12]),
        "commit_token_ids": ints(tokens),
    }
    manager.apply(SESSION, StepDemand(step=2, releases=(0,), **commit))
    admit(manager, 1, [50], 3)
    manager.apply(SESSION, StepDemand(step=4, releases=(1,)))
    (admission,) = admit(manager, 2, tokens, 5).admissions
    assert admission.num_cached_tokens == 8


def test_the_same_tokens_behind_another_prefix_are_another_block() -> None:
    """The key of a block depends on everything before it."""
    manager = make_manager()
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    admit(manager, 0, tokens, 1)
    commit = {
        "commit_rows": ints([0]),
        "commit_num_computed_tokens": ints([8]),
        "commit_token_ids": ints(tokens),
    }
    manager.apply(SESSION, StepDemand(step=2, releases=(0,), **commit))
    (admission,) = admit(manager, 1, [9, 9, 9, 9, *tokens[4:], 0], 3).admissions
    assert admission.num_cached_tokens == 0
    (admission,) = admit(manager, 2, [*tokens[4:], 0], 4).admissions
    assert admission.num_cached_tokens == 0


def test_scarcity_is_a_refusal_and_ends_the_admissions() -> None:
    """Who comes behind a refused admission is refused too, even when there were blocks for it."""
    manager = make_manager(num_blocks=6)
    demand = StepDemand(
        step=1,
        admits=(
            Admit(0, 1, "a", "a", ints([1] * 8)),
            Admit(1, 1, "b", "b", ints([2] * 20)),
            Admit(2, 1, "c", "c", ints([3] * 4)),
        ),
        admit_token_budget=99,
    )
    answer = manager.apply(SESSION, demand)
    assert [found.row for found in answer.admissions] == [0]
    assert answer.refusals == [(1, RefusalReason.NO_BLOCKS), (2, RefusalReason.NO_BLOCKS)]


def test_nobody_overtakes_a_running_sequence_that_lacks_blocks() -> None:
    """Behind a refused extend, those that need blocks are refused too; those that need none run on."""
    manager = make_manager(num_blocks=5)
    for row, length in enumerate((4, 4, 3)):
        admit(manager, row, [10 * row + i for i in range(length)], row + 1)
    demand = StepDemand(
        step=9,
        extend_rows=ints([0, 1, 2]),
        extend_starts=ints([4, 4, 3]),
        extend_num_tokens=ints([5, 1, 1]),
    )
    answer = manager.apply(SESSION, demand)
    assert answer.refusals == [(0, RefusalReason.NO_BLOCKS), (1, RefusalReason.NO_BLOCKS)]
    assert answer.new_blocks == []


@pytest.mark.parametrize(
    "demand",
    [
        StepDemand(step=1, releases=(3,)),
        StepDemand(
            step=1, extend_rows=ints([2]), extend_starts=ints([0]), extend_num_tokens=ints([1])
        ),
        StepDemand(
            step=1, extend_rows=ints([0]), extend_starts=ints([0]), extend_num_tokens=ints([0])
        ),
        StepDemand(step=1, commit_rows=ints([0]), commit_num_computed_tokens=ints([8])),
        StepDemand(step=1, commit_rows=ints([0]), commit_num_computed_tokens=ints([80])),
        StepDemand(
            step=1, extend_rows=ints([0]), extend_starts=ints([13]), extend_num_tokens=ints([1])
        ),
        StepDemand(
            step=1,
            extend_rows=ints([0]),
            extend_starts=ints([9]),
            extend_num_tokens=ints([2**31 - 1]),
        ),
        StepDemand(step=1, watermark_blocks=-1),
        StepDemand(step=1, forks=(Fork(0, 0, 1, "x", "r", 1),)),
        StepDemand(step=1, admits=(Admit(NUM_ROWS, 1, "x", "r", ints([1])),)),
        StepDemand(step=1, admits=(Admit(1, 1, "x", "r", ints([])),)),
    ],
)
def test_a_broken_contract_changes_nothing(demand: StepDemand) -> None:
    """A demand that cannot be meant raises and leaves every count as it was."""
    manager = make_manager()
    admit(manager, 0, [1] * 9, 1)
    before = (
        manager.revision,
        manager.pool.num_available,
        manager.table(SESSION).num_computed.tolist(),
    )
    with pytest.raises(BrokenContract):
        manager.apply(SESSION, demand)
    after = (
        manager.revision,
        manager.pool.num_available,
        manager.table(SESSION).num_computed.tolist(),
    )
    assert after == before
    assert check_integrity(manager) == []
