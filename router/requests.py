"""The live requests, and those of their sequences that wait."""

from __future__ import annotations

import time
from collections import deque
from itertools import count
from typing import TYPE_CHECKING

from quire.errors import QueueFull, RequestIdInUse, RequestNotFound
from router.request import first_sequence
from router.waiting_queue import WaitingQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from router.request import Request

_NUM_ENDS = 16
_FIRST_RETRY_S = 1.0  # as long as too few have ended to tell
_RETRY_RANGE_S = (0.05, 60.0)


class RequestTable:
    """Requests by tenant and id. A request is live from `add` until every sample has ended.

    No tenant learns of another's ids: the same id may be live for each of them.
    """

    def __init__(self, queue_limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue_limit = queue_limit
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=_NUM_ENDS)  # when the last requests ended
        self._arrivals = count()
        self._requests: dict[tuple[str, str], Request] = {}
        self.waiting = WaitingQueue()

    def __len__(self) -> int:
        """Live requests."""
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """The live requests, oldest first."""
        return iter(list(self._requests.values()))

    def is_live(self, request: Request) -> bool:
        """Whether `request` was added and has not ended."""
        return self._requests.get(request.key) is request

    def get(self, tenant: str, request_id: str) -> Request:
        """The live request of `tenant` with this id; raises RequestNotFound."""
        request = self._requests.get((tenant, request_id))
        if request is None:
            message = f"no live request has the id {request_id!r}; it may have finished"
            raise RequestNotFound(message, metadata={"request_id": request_id})
        return request

    def add(self, request: Request) -> None:
        """Let `request` wait.

        Raises:
            RequestIdInUse: when a live request of its tenant has its id.
            QueueFull: when as many wait as may.
        """
        self._check_room(request)
        request.arrival = next(self._arrivals)
        self._requests[request.key] = request
        self.waiting.add(first_sequence(request))

    def _check_room(self, request: Request) -> None:
        if request.key in self._requests:
            name = request.request_id
            message = f"request_id {name!r} belongs to a live request; choose another one"
            raise RequestIdInUse(message, metadata={"request_id": name})
        num_waiting = len(self.waiting)
        if num_waiting >= self._queue_limit:
            message = f"{num_waiting} requests wait, {self._queue_limit} are allowed; repeat later"
            raise QueueFull(
                message,
                metadata={"num_waiting": num_waiting, "queue_limit": self._queue_limit},
                retry_after_s=self._seconds_to_a_place(),
            )

    def _seconds_to_a_place(self) -> float:
        """One over the rate at which requests end and their blocks come free."""
        if len(self._ends) < _NUM_ENDS:
            return _FIRST_RETRY_S
        seconds = (self._clock() - self._ends[0]) / len(self._ends)
        return min(max(seconds, _RETRY_RANGE_S[0]), _RETRY_RANGE_S[1])

    def forget_if_finished(self, request: Request) -> bool:
        """Let the id of a request go once every sample has ended; whether that was now."""
        if not request.is_finished or self._requests.pop(request.key, None) is None:
            return False
        self._ends.append(self._clock())
        return True
