"""A router, operators and lapsing leases at random: steps and wishes that a block manager accepts, and what it told."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from flushing import flush

from memory_service.demand import Admit, Fork, StepDemand
from memory_service.record import ReleaseReason

if TYPE_CHECKING:
    from memory_service.block_manager import BlockManager
    from memory_service.demand import StepAnswer

NUM_ROWS = 6
TENANTS = ("", "blue", "red")


def ints(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int32)


@dataclass
class DrivenSequence:
    """A sequence as its router knows it."""

    tokens: list[int]
    computed: int
    table: list[int]
    in_flight: int = 0  # tokens that the last step runs


@dataclass
class DrivenSession:
    """A session as its router knows it."""

    key: int
    step: int = 0
    rows: dict[int, DrivenSequence] = field(default_factory=dict)


class PoolDriver:
    """Does one random thing at a time. The same seed does the same to equal managers."""

    def __init__(self, manager: BlockManager, seed: int) -> None:
        self.manager = manager
        self.sessions: dict[int, DrivenSession] = {}
        self._random = random.Random(seed)  # noqa: S311 -- the same at every run
        self._last_key = self._last_generation = self._num_sequences = 0

    def told_tables(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """Block tables as all answers so far told them, by session and row."""
        return {
            (key, row): tuple(found.table)
            for key, session in self.sessions.items()
            for row, found in session.rows.items()
        }

    def act(self) -> None:
        """One step of a session most times, else something rarer."""
        if not self.sessions or self._random.random() < 0.02:
            self._open()
        elif self._random.random() < 0.8:
            self._step(self._random.choice(list(self.sessions.values())))
        else:
            self._random.choice(
                [self._close, self._quota, self._retain, self._release, self._flush, self._publish]
            )()

    # Sessions

    def _open(self) -> None:
        self._last_key += 1
        self._last_generation += 1
        self.sessions[self._last_key] = DrivenSession(self._last_key)
        name = f"router-{self._last_key}"
        self.manager.open_session(self._last_key, NUM_ROWS, name, self._last_generation)

    def _close(self) -> None:
        if self._random.random() < 0.2:
            session = self._random.choice(list(self.sessions.values()))
            self.manager.close_session(session.key)
            del self.sessions[session.key]
        else:
            self.manager.attach_writer(self._random.randrange(1, 9), 1, 2)

    # Wishes

    def _quota(self) -> None:
        soft, hard = (self._random.choice([None, 3, 8]) for _ in range(2))
        self.manager.sharing.set_quota(self._random.choice(TENANTS), soft, hard)

    def _retain(self) -> None:
        tenant, expires_at = self._random.choice(TENANTS), self._random.choice([None, 4e9])
        priority = self._random.randrange(1, 8)
        if self._random.random() < 0.5:
            self.manager.sharing.retain_prefix(tenant, self._tokens(9), priority, expires_at)
        else:
            name = f"s{self._random.randrange(1, self._num_sequences + 2)}"
            self.manager.sharing.retain_sequence(tenant, name, priority, expires_at)

    def _release(self) -> None:
        retentions = list(self.manager.ledger.retentions.by_id.values())
        if retentions:
            found = self._random.choice(retentions)
            self.manager.sharing.release(found.home.tenant.name, found.retention_id)

    def _flush(self) -> None:
        length = self._random.choice([0, 4, 8])
        flush(self.manager, self._random.choice(TENANTS), self._tokens(length))

    def _publish(self) -> None:
        published = list(self.manager.ledger.retentions.published)
        if published and self._random.random() < 0.5:
            self.manager.sharing.withdraw(self._random.choice(published))
        else:
            self.manager.sharing.publish(self._tokens(8))

    def _tokens(self, length: int) -> np.ndarray:
        return ints([self._random.randrange(2) for _ in range(length)])

    # Steps

    def _step(self, session: DrivenSession) -> None:
        session.step += 1
        commits = self._acknowledge(session)
        releases = [row for row in session.rows if self._random.random() < 0.15]
        for row in releases:
            del session.rows[row]
        forks, extends = self._forks(session), self._extends(session)
        admits = self._admits(session)
        answer = self.manager.apply(
            session.key,
            StepDemand(
                step=session.step,
                acknowledged_step=session.step - 1,
                commit_rows=ints(commits[0]),
                commit_num_computed_tokens=ints(commits[1]),
                commit_token_ids=ints(commits[2]),
                releases=tuple(releases),
                release_reasons=(ReleaseReason.FINISHED,) * len(releases),
                forks=tuple(forks),
                extend_rows=ints([row for row, _, _ in extends]),
                extend_starts=ints([start for _, start, _ in extends]),
                extend_num_tokens=ints([count for _, _, count in extends]),
                admits=tuple(admits),
                admit_token_budget=self._random.randrange(1, 30),
            ),
        )
        self._take(session, answer, extends, admits)

    def _acknowledge(self, session: DrivenSession) -> tuple[list[int], list[int], list[int]]:
        size = self.manager.block_size
        rows, counts, token_ids = [], [], []
        for row, found in session.rows.items():
            if found.in_flight:
                end = found.computed + found.in_flight
                token_ids += found.tokens[found.computed // size * size : end // size * size]
                found.computed, found.in_flight = end, 0
                rows.append(row)
                counts.append(end)
        return rows, counts, token_ids

    def _forks(self, session: DrivenSession) -> list[Fork]:
        forks = []
        for row, found in list(session.rows.items()):
            unused = [dst for dst in range(NUM_ROWS) if dst not in session.rows]
            if unused and found.computed and self._random.random() < 0.15:
                tokens = found.tokens[: found.computed]
                session.rows[unused[0]] = DrivenSequence(tokens, found.computed, [])
                forks.append(Fork(row, unused[0], 1, self._name(), "r", found.computed))
        return forks

    def _extends(self, session: DrivenSession) -> list[tuple[int, int, int]]:
        extends = []
        for row, found in session.rows.items():
            if self._random.random() < 0.8:
                count = self._random.randrange(1, 6)
                missing = found.computed + count - len(found.tokens)
                found.tokens += self._tokens(max(0, missing)).tolist()
                extends.append((row, found.computed, count))
        return extends

    def _admits(self, session: DrivenSession) -> list[Admit]:
        unused = [row for row in range(NUM_ROWS) if row not in session.rows]
        return [
            Admit(
                row,
                session.step,
                self._name(),
                f"request-{row}",
                self._tokens(self._random.randrange(1, 18)),
                tenant=self._random.choice(TENANTS),
            )
            for row in unused[: self._random.randrange(3)]
        ]

    def _name(self) -> str:
        self._num_sequences += 1
        return f"s{self._num_sequences}"

    def _take(
        self,
        session: DrivenSession,
        answer: StepAnswer,
        extends: list[tuple[int, int, int]],
        admits: list[Admit],
    ) -> None:
        """Keep what the answer told, as a router does."""
        for row, table in answer.forked_tables:
            session.rows[row].table = table.tolist()
        for row, block_id in answer.new_blocks:
            session.rows[row].table.append(block_id)
        for row, index, block_id in answer.remaps:
            session.rows[row].table[index] = block_id
        refused = {row for row, _ in answer.refusals}
        for row, _, count in extends:
            session.rows[row].in_flight = 0 if row in refused else count
        tokens = {admit.row: admit.token_ids.tolist() for admit in admits}
        for found in answer.admissions:
            session.rows[found.row] = DrivenSequence(
                tokens[found.row],
                found.num_cached_tokens,
                found.block_table.tolist(),
                found.num_scheduled_tokens,
            )
