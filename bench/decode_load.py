"""Steps of many decoding sequences for the block manager, as demands and as messages."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from memory_service.demand import Admit, StepDemand
from protos.memory.v1 import memory_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    IntArray = NDArray[np.int32]

VOCAB_SIZE = 50_000
ADMITS_PER_STEP = 16
BLOCK_SIZE = 16


@dataclass(slots=True)
class DecodeLoad:
    """`num_seqs` sequences whose lengths differ, so that each step opens and seals as many blocks as a steady state does.

    With a block size of 16 and 256 sequences these are 16 and 16. Each step commits the token of the one before it and
    runs the next.
    """

    num_seqs: int
    block_size: int = BLOCK_SIZE
    first_length: int = 64
    step: int = 0
    rows: IntArray = field(init=False)
    computed: IntArray = field(init=False)
    _random: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(0)
        self.rows = np.arange(self.num_seqs, dtype=np.int32)
        self.computed = self.first_length + self.rows % np.int32(self.block_size)

    def token_ids(self, count: int) -> IntArray:
        """Random ones."""
        return self._random.integers(0, VOCAB_SIZE, count, dtype=np.int32)

    def admissions(self) -> Iterator[StepDemand]:
        """The steps that bring all sequences in."""
        for begin in range(0, self.num_seqs, ADMITS_PER_STEP):
            self.step += 1
            rows = self.rows[begin : begin + ADMITS_PER_STEP].tolist()
            yield StepDemand(
                step=self.step,
                admits=tuple(
                    Admit(row, 1, f"seq-{row}", f"req-{row}", self.token_ids(self.computed[row]))
                    for row in rows
                ),
                admit_token_budget=1 << 30,
            )
        yield self._step(np.zeros_like(self.computed), self.computed)

    def next_step(self) -> StepDemand:
        """One decode step: every row commits a token and runs the next."""
        before, self.computed = self.computed, self.computed + np.int32(1)
        return self._step(before, self.computed)

    def _step(self, before: IntArray, after: IntArray) -> StepDemand:
        self.step += 1
        num_sealed = int((after // self.block_size - before // self.block_size).sum())
        return StepDemand(
            step=self.step,
            acknowledged_step=self.step - 1,
            commit_rows=self.rows,
            commit_num_computed_tokens=after,
            commit_token_ids=self.token_ids(num_sealed * self.block_size),
            extend_rows=self.rows,
            extend_starts=after,
            extend_num_tokens=np.ones_like(self.rows),
        )


def come_and_go(
    step: int, name: str, token_ids: IntArray, num_cached_tokens: int = 0
) -> tuple[StepDemand, StepDemand]:
    """The two steps of a sequence in row 0 that runs its tokens at once and leaves full blocks behind, from `step` on."""
    num_sealed = len(token_ids) // BLOCK_SIZE * BLOCK_SIZE
    return (
        StepDemand(
            step=step,
            acknowledged_step=step - 1,
            admits=(Admit(0, 1, name, name, token_ids),),
            admit_token_budget=1 << 30,
        ),
        StepDemand(
            step=step + 1,
            acknowledged_step=step,
            commit_rows=np.zeros(1, np.int32),
            commit_num_computed_tokens=np.array([len(token_ids)], np.int32),
            commit_token_ids=token_ids[num_cached_tokens:num_sealed],
            releases=(0,),
        ),
    )


def as_message(demand: StepDemand, generation: int) -> pb.SessionRequest:
    """The demand as the router would send it."""
    return pb.SessionRequest(
        step=pb.AllocateStep(
            generation=generation,
            step=demand.step,
            acknowledged_step=demand.acknowledged_step,
            commit_rows=demand.commit_rows.tolist(),
            commit_num_computed_tokens=demand.commit_num_computed_tokens.tolist(),
            commit_token_ids=demand.commit_token_ids.tobytes(),
            release_rows=demand.releases,
            extend_rows=demand.extend_rows.tolist(),
            extend_starts=demand.extend_starts.tolist(),
            extend_num_tokens=demand.extend_num_tokens.tolist(),
            admits=[
                pb.AdmitDemand(
                    row=found.row,
                    incarnation=found.incarnation,
                    sequence_id=found.sequence_id,
                    request_id=found.request_id,
                    token_ids=array("i", found.token_ids.tolist()).tobytes(),
                    num_sequences=found.num_sequences,
                )
                for found in demand.admits
            ],
            admit_token_budget=demand.admit_token_budget,
        )
    )
