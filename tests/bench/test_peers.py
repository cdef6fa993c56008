"""The comparison with peers stays alive; how fast anybody is is not tested."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.peer_engines.findings import Cell, Run, ratio
from bench.peer_engines.wire import Arrivals, Request
from bench.peer_engines.workloads import WORKLOADS

ROOT = Path(__file__).parents[2]


def test_the_benchmark_runs() -> None:
    """On a tiny model Quire and transformers do all six workloads, and a ratio stands in each row."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.peers", "--quick"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("│")]
    rates = [line for line in rows if line.count(" tok/s ") == 2]
    assert [row.split("│")[1].strip() for row in rates] == [found.title for found in WORKLOADS]
    assert all(float(row.split("│")[4]) > 0 for row in rates)
    assert any("peak memory" in row and row.count("GiB") == 2 for row in rows)


def test_all_engines_are_asked_the_same_and_every_round_something_new() -> None:
    """Prompts follow from workload and round; only the shared part occurs twice."""
    for workload in WORKLOADS:
        found = workload.requests(0, 1_024)
        assert found == workload.requests(0, 1_024)
        assert len(found) == workload.num_requests
        prompts = [tuple(request.prompt) for request in found + workload.requests(1, 1_024)]
        assert len(set(prompts)) == len(prompts)
        assert {len(prompt) for prompt in prompts} == {workload.num_input}
        shared = {tuple(request.prompt[: workload.num_shared]) for request in found}
        assert len(shared) == 1
        assert found[0].arrival_s == 0


def test_times_are_reckoned_from_the_arrival() -> None:
    """Two requests, the second half a second late: four tokens in two seconds."""
    requests = [Request(0.0, [1], 2), Request(0.5, [1], 2)]
    run = Run.of(requests, [[0.25, 0.75], [1.0, 2.0]])
    assert run == Run(tokens_per_s=2.0, ttft_s=[0.25, 0.5], itl_s=[0.5, 1.0])
    with pytest.raises(ValueError, match="1 tokens instead of 2"):
        Run.of(requests, [[0.25, 0.75], [1.0]])


def cell(*rates: float) -> Cell:
    return Cell({at: Run(rate, [1.0], [0.1]) for at, rate in enumerate(rates)})


def test_a_ratio_is_that_of_rounds_which_both_ran() -> None:
    """Ours against the fastest of those that finished; a machine that slows down slows both."""
    ours, slow, capped = cell(4.0, 2.0, 9.0), cell(1.0, 1.0, 1.0), Cell(problem="not done in 5 s")
    assert ratio(ours, [slow, cell(2.0, 2.0), capped]) == "1.50\n(1.00-2.00)"
    assert ratio(ours, [capped]) == "-"
    assert ratio(capped, [slow]) == ratio(ours, []) == "-"
    assert capped.lines() == "not done in 5 s"
    assert "not done" in Cell(slow.runs, "not done in 5 s").lines()
    assert Cell().lines() == "no time left"


def test_requests_arrive_in_order_of_time() -> None:
    """Those that are due are handed out once, with their places; the others keep the clock waiting."""
    arrivals = Arrivals([Request(0.05, [1], 1), Request(0.0, [2], 1)])
    assert [place for place, _ in arrivals.due()] == [1]
    arrivals.sleep()
    assert [place for place, _ in arrivals.due()] == [0]
    assert arrivals.now() >= 0.05
    assert not arrivals
