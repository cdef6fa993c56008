"""What it costs a decode step of 256 sequences that somebody explains, or watches.

    python -m bench.watching

The books alone; remembering decisions, as the service always does; after the last watcher left; with one watcher, whose
messages are made outside of the step. Steps of the four take turns, so that what else the machine does meets all alike.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from bench.decode_load import DecodeLoad
from memory_service.block_hash import BlockHasher
from memory_service.block_manager import BlockManager
from memory_service.explanations import Explanations
from memory_service.watch_hub import RingBounds, Watcher, WatchHub
from memory_service.watch_messages import WatchMessages

if TYPE_CHECKING:
    from protos.memory.v1 import inspection_pb2 as pb

NUM_SEQS, BLOCK_SIZE, NUM_STEPS, SESSION = 256, 16, 2000, 1


@dataclass
class Bench:
    """Books under decode steps, and who hears of those."""

    manager: BlockManager
    explanations: Explanations | None = None
    watcher: Watcher[pb.WatchResponse] | None = None
    steps: list[float] = field(default_factory=list)
    messages: list[float] = field(default_factory=list)
    load: DecodeLoad = field(default_factory=lambda: DecodeLoad(NUM_SEQS))

    def step(self) -> None:
        """One step, then what it leaves to the watcher."""
        demand = self.load.next_step()
        started = time.perf_counter()
        answer = self.manager.apply(SESSION, demand)
        if self.explanations is not None:
            self.explanations.answered(SESSION, answer)
        self.steps.append(time.perf_counter() - started)
        if self.watcher is not None:
            started = time.perf_counter()
            for _ in self.watcher.answers():
                pass
            self.messages.append(time.perf_counter() - started)


def begin(*, is_explained: bool, is_watched: bool, was_watched: bool = False) -> Bench:
    """Sequences that decode."""
    manager = BlockManager(
        NUM_SEQS * (NUM_STEPS // BLOCK_SIZE + 8), BLOCK_SIZE, BlockHasher(b"secret", b"root")
    )
    bench = Bench(manager)
    manager.open_session(SESSION, NUM_SEQS, "bench")
    if is_explained:
        bench.explanations = Explanations()
        bench.explanations.listen_to(manager)
    hub = WatchHub(manager, "epoch", WatchMessages(), bounds=RingBounds(idle_s=0.0))
    if is_watched:
        bench.watcher = hub.join(None, lambda: None)
    if was_watched:
        hub.join(None, lambda: None).leave()
    for demand in bench.load.admissions():
        manager.apply(SESSION, demand)
    return bench


def main() -> None:
    """Measure and print."""
    benches = {
        "the books alone": begin(is_explained=False, is_watched=False),
        "decisions remembered": begin(is_explained=True, is_watched=False),
        "and once watched": begin(is_explained=True, is_watched=False, was_watched=True),
        "and one watcher": begin(is_explained=True, is_watched=True),
    }
    gc.disable()
    for _ in range(NUM_STEPS):
        for bench in benches.values():
            bench.step()
    for name, bench in benches.items():
        low, median = np.percentile(np.array(bench.steps) * 1e6, [20, 50])
        print(f"{name:22} {low:7.1f} us (20th percentile) {median:7.1f} us (median)")
    made = np.percentile(np.array(benches["and one watcher"].messages) * 1e6, 20)
    print(f"{'its messages':22} {made:7.1f} us (20th percentile), outside of the step")


if __name__ == "__main__":
    main()
