"""Finding the sequence that makes steps fail."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from router.request import Sequence


class FailureIsolation:
    """Bisection by sequence.

    The first failure of a step is forgiven: everything is tried again. When it fails again its sequences are halved, and
    each group runs alone, until a group of one fails: that sequence is guilty. A group that ran is cleared.
    """

    def __init__(self) -> None:
        self._groups: list[list[Sequence]] = []
        self._has_failed = False

    def suspects(self) -> list[Sequence] | None:
        """The only sequences that may run now; None when all may."""
        return self._groups[-1] if self._groups else None

    @property
    def is_active(self) -> bool:
        """Whether a step failed and nobody, or not everybody, has run since."""
        return self._has_failed or bool(self._groups)

    def step_succeeded(self, ran: Iterable[Sequence]) -> None:
        """Clear the sequences that ran."""
        self._has_failed = False
        self.forget(ran)

    def forget(self, sequences: Iterable[Sequence]) -> None:
        """Take `sequences` out: they ran, or they are gone."""
        if not self._groups:
            return
        gone = set(map(id, sequences))
        kept = ([found for found in group if id(found) not in gone] for group in self._groups)
        self._groups = [group for group in kept if group]

    def step_failed(self, ran: list[Sequence], num_ran: int) -> Sequence | None:
        """Note the failure; the guilty sequence once it is found.

        Args:
            ran: those of the step that are still there.
            num_ran: how many were in it: who left meanwhile may have been the guilty one.
        """
        if not ran:
            return None
        if not self._has_failed and not self._groups:
            self._has_failed = True
            return None
        self.forget(ran)
        if num_ran == 1:
            return ran[0]
        middle = len(ran) // 2
        self._groups += [group for group in (ran[middle:], ran[:middle]) if group]
        return None
