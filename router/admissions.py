"""Who comes in: which waiting sequences memory is asked about, and what becomes of its answer."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from router.request import SequenceState
from router.step import RefusalReason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from router.request import Sequence
    from router.rows import RowTable
    from router.step import Admission, MemoryAnswer, StepPlan
    from router.waiting_queue import WaitingQueue

# Admissions asked for in one step: each costs its whole prompt on the wire.
MAX_ADMITS_PER_STEP = 16
# Steps that a tenant over its quota waits before it is asked about again, unless it gives blocks up before.
QUOTA_RETRY_STEPS = 16


class Admissions:
    """Sequences that wait, and those that memory is being asked about.

    The most urgent are asked about, and nobody overtakes; but a tenant that memory refused as over its quota stands
    aside. It is asked about again, with its most urgent sequence alone, when it gave blocks up and otherwise now and
    then: however much it has waiting, others find room in the message and rows to run in.
    """

    def __init__(self, waiting: WaitingQueue, rows: RowTable) -> None:
        self._waiting = waiting
        self._rows = rows
        self._asked: list[Sequence] = []  # memory has not answered yet
        self._over_quota: dict[str, int] = {}  # tenant -> step from which on it is asked about

    @property
    def num_waiting(self) -> int:
        """Sequences that wait, those included that memory is being asked about."""
        return len(self._waiting) + len(self._unanswered())

    def plan(self, plan: StepPlan, budget: int) -> None:
        """Ask for as many as there are rows for."""
        plan.admit_token_budget = budget
        num_rows = self._rows.num_unclaimed
        for sequence in list(islice(self._candidates(plan.step), MAX_ADMITS_PER_STEP)):
            num_rows -= sequence.num_sequences
            if num_rows < 0:
                break
            self._rows.give(sequence)
            self._waiting.remove(sequence)
            plan.admits.append(sequence)
        self._asked = plan.admits

    def _candidates(self, step: int) -> Iterator[Sequence]:
        asked: set[str] = set()
        for sequence in self._waiting:
            tenant = sequence.request.tenant
            if tenant in self._over_quota:
                if tenant in asked or step < self._over_quota[tenant]:
                    continue
                asked.add(tenant)
            yield sequence

    def take(self, plan: StepPlan, answer: MemoryAnswer) -> Iterator[tuple[Sequence, Admission]]:
        """Those that came in, aborted ones included; the others wait again."""
        self._asked = []
        for sequence in plan.admits:
            admission = answer.admissions.get(sequence.row)
            if admission is None:
                self._refused(sequence, plan, answer)
            else:
                self._over_quota.pop(sequence.request.tenant, None)
                yield sequence, admission

    def _refused(self, sequence: Sequence, plan: StepPlan, answer: MemoryAnswer) -> None:
        if answer.refusals.get(sequence.row) is RefusalReason.OVER_QUOTA:
            self._over_quota[sequence.request.tenant] = plan.step + QUOTA_RETRY_STEPS
        self._rows.free([sequence.row])
        if sequence.state is not SequenceState.FINISHED:
            self.wait_again(sequence)

    def wait_again(self, sequence: Sequence) -> None:
        """Let a sequence that has no row any more wait in its place."""
        sequence.lose_row()
        self._waiting.add(sequence)

    def gave_blocks_up(self, sequence: Sequence) -> None:
        """A sequence lost its row: its tenant may have room now."""
        if sequence.request.tenant in self._over_quota:
            self._over_quota[sequence.request.tenant] = 0

    def remove(self, sequence: Sequence) -> None:
        """Take `sequence` out if it waits."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)

    def session_resumed(self) -> list[Sequence]:
        """The answer that was waited for does not come; the sequences that it was about."""
        unanswered, self._asked = self._unanswered(), []
        return unanswered

    def _unanswered(self) -> list[Sequence]:
        return [found for found in self._asked if found.state is not SequenceState.FINISHED]
