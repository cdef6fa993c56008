"""The paging benchmark stays alive and counts what it says; how much it finds is not tested."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from bench.beam_load import BeamLoad
from bench.contiguous_load import BuddyAllocator, ContiguousLoad, Reservation
from bench.length_distributions import ALPACA, SHAREGPT, Request
from bench.paged_load import PagedLoad, new_manager
from bench.pool_usage import SESSION, measure
from memory_service.demand import Admit, Fork, StepDemand

if TYPE_CHECKING:
    from memory_service.block_manager import BlockManager

ROOT = Path(__file__).parents[2]
SIZE = 16


def is_empty(manager: BlockManager) -> bool:
    return not manager.pool.ref_counts.any() and manager.num_sequences == 0


def test_the_benchmark_runs() -> None:
    """It prints its four tables and ends well; its loads check the manager's books themselves."""
    command = [sys.executable, "-m", "bench.paging", "--quick"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("│")]
    assert len(rows) == 4 + 15 + 2 + 3


@pytest.mark.parametrize(("num_samples", "num_blocks"), [(1, 48), (3, 80)])
def test_a_pool_that_is_too_small_for_all_loses_nothing(num_samples: int, num_blocks: int) -> None:
    """With preemptions, every request runs to its end and every block comes back."""
    manager = new_manager(num_blocks * SIZE, SIZE)
    workload = SHAREGPT.shrunk(4).sampled(num_samples)
    load = PagedLoad(manager, workload.requests(25, seed=3)).run()
    assert load.num_preemptions > 0
    assert load.usage.num_steps > 0
    assert load.usage.num_tokens <= load.usage.num_reserved <= load.usage.num_slots
    assert is_empty(manager)


def test_a_request_larger_than_the_pool_is_refused() -> None:
    """It would wait for ever."""
    request = Request(np.arange(33, dtype=np.int32), 20)
    with pytest.raises(ValueError, match="never fits"):
        PagedLoad(new_manager(2 * SIZE, SIZE), [request])


def test_a_slot_counts_once_however_many_tables_hold_it() -> None:
    """Two tables over the same two blocks: two blocks' slots, four entries, the acknowledged tokens of the longer one."""
    manager = new_manager(8 * SIZE, SIZE)
    tokens = np.arange(20, dtype=np.int32)
    admit = Admit(0, 1, "a", "a", tokens, num_sequences=2)
    manager.apply(SESSION, StepDemand(step=1, admits=(admit,), admit_token_budget=99))
    commit = StepDemand(
        step=2,
        commit_rows=np.array([0], dtype=np.int32),
        commit_num_computed_tokens=np.array([20], dtype=np.int32),
        commit_token_ids=tokens[:16],
        forks=(Fork(0, 1, 1, "b", "a", 18),),
    )
    manager.apply(SESSION, commit)
    held = measure(manager, {0: 21, 1: 18})
    assert (held.num_tokens, held.num_reserved, held.num_slots) == (20, 21, 32)
    assert (held.num_entries, held.num_sequences) == (4, 2)


def test_counts_that_disagree_with_the_tables_are_noticed() -> None:
    """A reference count that no table explains ends the benchmark."""
    manager = new_manager(8 * SIZE, SIZE)
    manager.pool.ref_counts[3] = 1
    with pytest.raises(RuntimeError, match="reference counts"):
        measure(manager, {})


def test_samples_share_the_full_blocks_of_their_prompt() -> None:
    """Of 3 x 4 blocks, 2 x 2 are saved: the prompt fills two, the outputs differ from their first token on."""
    manager = new_manager(64 * SIZE, SIZE)
    token_ids = np.arange(64, dtype=np.int32)
    load = PagedLoad(manager, [Request(token_ids, 32, num_samples=3)])
    for _ in range(25):
        load.step()
    held = measure(manager, load.ends())
    assert (held.num_slots // SIZE, held.num_entries) == (8, 12)


def test_beams_copy_before_they_write_and_give_all_back() -> None:
    """Beams that fork and end at every step leave clean books, share much, and need copies; one beam shares nothing."""
    manager = new_manager(1_024 * SIZE, SIZE)
    wide = BeamLoad(manager, ALPACA.requests(6, seed=1), beam_width=4, seed=1).run()
    assert wide.num_copies > 0
    assert wide.usage.saved(SIZE) > 0
    assert is_empty(manager)
    manager = new_manager(1_024 * SIZE, SIZE)
    alone = BeamLoad(manager, ALPACA.requests(6, seed=1), beam_width=1, seed=1).run()
    assert alone.usage.saved(SIZE) == 0
    assert alone.num_copies == 0


def test_buddies_merge() -> None:
    """Seven pieces of 2,048 fit into 15,728 slots, as in the paper; when all are freed the pool is whole again."""
    allocator = BuddyAllocator(15_728)
    pieces = [allocator.allocate(11) for _ in range(8)]
    assert pieces.pop() is None
    assert len(set(pieces)) == 7
    for begin in pieces:
        assert begin is not None
        allocator.free(begin, 11)
    assert allocator.num_free_slots == 15_728
    assert allocator.allocate(13) is not None


@pytest.mark.parametrize(
    ("reservation", "num_slots"),
    [(Reservation.MAX, 2_048), (Reservation.POW2, 7 + 32), (Reservation.ORACLE, 7 + 25)],
)
def test_reservations(reservation: Reservation, num_slots: int) -> None:
    """An output of 25 tokens is given 32 slots by Orca (Pow2): the paper's own example."""
    request = Request(np.zeros(7 + 25, dtype=np.int32), 7)
    assert reservation.num_slots(request) == num_slots


def test_a_reserved_request_holds_one_token_more_each_step() -> None:
    """Alone in the pool, 4 tokens in and 3 out: the steps begin with 4, 5 and 6 tokens."""
    requests = [Request(np.zeros(7, dtype=np.int32), 4)] * 2
    usage = ContiguousLoad(2_048, Reservation.MAX).run(requests)
    assert (usage.num_steps, usage.num_token_steps, usage.num_ends) == (3, 15, 1)
