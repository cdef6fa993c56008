"""The claims of the PagedAttention paper (arXiv 2309.06180), measured again on the block manager, without a model.

    python -m bench.paging [--seed 1] [--quick]

Four tables, the paper's numbers beside ours: how much of what tables hold holds tokens; how many sequences a pool has at
once beside reserving room for whole ones; how many blocks parallel samples and beams share; what a common prefix saves.
The loads are those of `bench.paged_load`, `bench.beam_load` and `bench.contiguous_load`, the lengths those of
`bench.length_distributions`. Time is counted in steps, and a step is a step, whatever it runs. All books are checked on
the way and at each load's end.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from bench.beam_load import BeamLoad
from bench.contiguous_load import ContiguousLoad, Reservation
from bench.length_distributions import ALPACA, FIVE_SHOT, LMSYS, ONE_SHOT, SHAREGPT
from bench.paged_attention_paper import (
    PAPER_AT_ONCE,
    PAPER_BEAMS,
    PAPER_POOL_SHARE,
    PAPER_PREFIX,
    PAPER_SAMPLES,
)
from bench.paged_load import STEPS_IN_FLIGHT, WATERMARK, PagedLoad, new_manager

if TYPE_CHECKING:
    from bench.contiguous_load import ContiguousUsage
    from bench.length_distributions import Request, Workload

BLOCK_SIZE = 16
BEAM_ROOM = 4  # pools: with beams nobody is to wait for blocks
WIDE_WATERMARK = 0.1
MIN_PARTIAL_TOKENS = 4
LIBRARIES = ("numpy",)
console = Console(width=122)


@dataclass(frozen=True, slots=True)
class Setting:
    """How much is run: each load has so many output tokens, roughly."""

    seed: int
    num_slots: int = 15_728  # 12 GiB for OPT-13B, Table 1 of the paper
    num_paged_tokens: int = 120_000
    num_sampled_tokens: int = 70_000  # of each sample
    num_contiguous_tokens: int = 1_000_000
    num_beam_tokens: int = 8_000  # of each beam
    shrink: int = 1  # divides the mean lengths
    block_sizes: tuple[int, ...] = (8, BLOCK_SIZE, 32)
    output_cvs: tuple[float, ...] = (0.5, 1.2)  # beside the one that the paper implies
    numbers: tuple[int, ...] = (2, 4, 6)  # samples, beams

    def requests(self, workload: Workload, num_tokens: int) -> list[Request]:
        """Requests with so many output tokens, samples not counted; never fewer than make a load."""
        shrunk = workload.shrunk(self.shrink)
        return list(shrunk.requests(max(12, int(num_tokens / shrunk.mean_output)), self.seed))


QUICK = Setting(1, 2_048, 3_500, 1_000, 4_000, 100, 4, (BLOCK_SIZE,), (), (4,))


@cache
def paged(
    setting: Setting,
    workload: Workload,
    block_size: int = BLOCK_SIZE,
    steps_in_flight: int = STEPS_IN_FLIGHT,
    watermark: float = WATERMARK,
    min_partial_tokens: int = 0,
) -> PagedLoad:
    """A load on our block manager."""
    manager = new_manager(setting.num_slots, block_size, min_partial_tokens)
    is_sampled = workload.num_samples > 1
    num_tokens = setting.num_sampled_tokens if is_sampled else setting.num_paged_tokens
    requests = setting.requests(workload, num_tokens)
    load = PagedLoad(manager, requests, steps_in_flight=steps_in_flight, watermark=watermark)
    return load.run()


@cache
def contiguous(setting: Setting, workload: Workload, reservation: Reservation) -> ContiguousUsage:
    """Such requests under a baseline; more of them, since they cost little."""
    requests = setting.requests(workload, setting.num_contiguous_tokens)
    return ContiguousLoad(setting.num_slots, reservation).run(requests)


def beams(setting: Setting, workload: Workload, beam_width: int) -> BeamLoad:
    """Beam search in a pool with room for all."""
    manager = new_manager(BEAM_ROOM * setting.num_slots, BLOCK_SIZE)
    requests = setting.requests(workload.sampled(beam_width), setting.num_beam_tokens)
    return BeamLoad(manager, requests, beam_width=beam_width, seed=setting.seed).run()


def new_table(title: str, *headings: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table


def percent(share: float) -> str:
    """For a cell."""
    return f"{100 * share:.1f}"


def quoted(number: float | None, form: str = ".1f") -> str:
    """What the paper prints, if it does."""
    return "" if number is None else format(number, form)


def held_table(setting: Setting) -> Table:
    """Of the slots in blocks that tables hold, those with tokens."""
    table = new_table(
        "Held share: slots with tokens / slots in blocks that tables hold, each block once, %; steps: in flight",
        *("requests", "block size", "steps", "acknowledged", "with those in flight", "paper"),
    )
    cases = [
        (workload, size, STEPS_IN_FLIGHT)
        for workload in (SHAREGPT, ALPACA)
        for size in setting.block_sizes
    ]
    cases += [(LMSYS, BLOCK_SIZE, STEPS_IN_FLIGHT), (SHAREGPT, BLOCK_SIZE, 1)]
    cases += [
        (
            replace(SHAREGPT, name=f"ShareGPT, outputs' cv {cv}", output_cv=cv),
            BLOCK_SIZE,
            STEPS_IN_FLIGHT,
        )
        for cv in setting.output_cvs
    ]
    for workload, size, in_flight in cases:
        usage = paged(setting, workload, size, in_flight).usage
        is_papers = workload is SHAREGPT and size == BLOCK_SIZE
        table.add_row(
            *(workload.name, str(size), str(in_flight)),
            *(percent(usage.held_share), percent(usage.reserved_share)),
            quoted(PAPER_POOL_SHARE[None] if is_papers else None),
        )
    return table


def at_once_table(setting: Setting) -> Table:
    """Sequences in the same pool, beside the baselines."""
    table = new_table(
        f"At once in {setting.num_slots:,} slots while a request waits; tokens: % of all slots; rate: requests in "
        "1000 steps; preempted: times a request; again: tokens run again",
        *("requests", "memory", "at once", "paper", "tokens", "paper"),
        *("rate", "preempted", "again, %"),
    )
    for workload in (SHAREGPT, ALPACA, LMSYS):
        papers = PAPER_AT_ONCE.get(workload.name, {})
        shares = PAPER_POOL_SHARE if workload is SHAREGPT else {}
        for kind in Reservation:
            usage = contiguous(setting, workload, kind)
            table.add_row(
                *(workload.name, kind.value, f"{usage.sequences_at_once:.1f}"),
                *(quoted(papers.get(kind)), percent(usage.pool_share), quoted(shares.get(kind))),
                f"{1000 * usage.ends_per_step:.0f}",
            )
        for watermark in (WATERMARK, WIDE_WATERMARK):
            load = paged(setting, workload, watermark=watermark)
            is_default = watermark == WATERMARK
            table.add_row(
                *(workload.name, f"Quire, watermark {watermark:.0%}"),
                f"{load.usage.sequences_at_once:.1f}",
                quoted(papers.get(None) if is_default else None),
                percent(load.usage.pool_share(setting.num_slots)),
                quoted(shares.get(None) if is_default else None),
                *(f"{1000 * load.ends_per_step:.0f}", f"{load.preemptions_per_request:.2f}"),
                percent(load.recomputed_share),
            )
    return table


def sharing_table(setting: Setting) -> Table:
    """Blocks that samples and beams of a request share."""
    table = new_table(
        "Saved by sharing: 1 - distinct blocks / table entries, %",
        *("requests", "samples or beams", "parallel sampling", "paper", "beam search", "paper"),
        "copies a beam's token",
    )
    for workload in (ALPACA, SHAREGPT):
        for number in setting.numbers:
            samples = paged(setting, workload.sampled(number)).usage
            searched = beams(setting, workload, number)
            table.add_row(
                *(workload.name, str(number), percent(samples.saved(BLOCK_SIZE))),
                quoted(PAPER_SAMPLES[workload.name].get(number)),
                percent(searched.usage.saved(BLOCK_SIZE)),
                quoted(PAPER_BEAMS[workload.name].get(number)),
                f"{searched.num_copies / searched.num_tokens:.2f}",
            )
    return table


def prefix_table(setting: Setting) -> Table:
    """A prefix that all requests begin with."""
    table = new_table(
        "A common prefix, beside Orca (Oracle), which shares nothing; rate: requests a step",
        *("requests", "prefix", "hits", "prompt hit, %", "blocks saved, %", "at once", "Orca"),
        *("rate / Orca's", "paper"),
    )
    cases = [(ONE_SHOT, 0), (FIVE_SHOT, 0), (FIVE_SHOT, MIN_PARTIAL_TOKENS)]
    for workload, min_partial_tokens in cases:
        load = paged(setting, workload, min_partial_tokens=min_partial_tokens)
        orca = contiguous(setting, workload, Reservation.ORACLE)
        table.add_row(
            *(workload.name, str(workload.num_prefix_tokens)),
            f"partial from {min_partial_tokens}" if min_partial_tokens else "whole blocks",
            percent(load.num_hit_tokens / load.num_prompt_tokens),
            percent(load.usage.saved(BLOCK_SIZE)),
            *(f"{load.usage.sequences_at_once:.0f}", f"{orca.sequences_at_once:.0f}"),
            f"{load.ends_per_step / orca.ends_per_step:.2f}",
            quoted(PAPER_PREFIX[workload.name], ".2f"),
        )
    return table


def main() -> None:
    """Print four tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="see that it runs: requests too few and too short to compare",
    )
    arguments = parser.parse_args()
    setting = replace(QUICK if arguments.quick else Setting(1), seed=arguments.seed)
    started = time.perf_counter()
    for make_table in (held_table, at_once_table, sharing_table, prefix_table):
        console.print(make_table(setting))
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    console.print(f"Seed {setting.seed}; {time.perf_counter() - started:.0f} s.")
    console.print(
        f"Python {platform.python_version()}, {versions}; {os.cpu_count()} cores, {platform.machine()}"
    )


if __name__ == "__main__":
    main()
