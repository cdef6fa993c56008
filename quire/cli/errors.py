"""How the commands that talk to services tell of failures."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from quire.errors import QuireError
from quire.rpc_status import RemoteError

if TYPE_CHECKING:
    from collections.abc import Iterator

_INTERRUPTED = 130


@dataclass(slots=True)
class Outcome:
    """What the process will end with."""

    status: int = 0


@contextmanager
def reporting_errors(address: str) -> Iterator[Outcome]:
    """Turn a failed call to `address` into one line on stderr and status 1, Ctrl-C into status 130."""
    outcome = Outcome()
    try:
        yield outcome
    except QuireError as error:
        print(f"error: {_in_words(error, address)}", file=sys.stderr)
        outcome.status = 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        outcome.status = _INTERRUPTED


def _in_words(error: QuireError, address: str) -> str:
    if isinstance(error, RemoteError) and error.status_code is grpc.StatusCode.UNAVAILABLE:
        return f"nothing answers on {address}; is `quire up` running? ({error.message})"
    if isinstance(error, RemoteError) and error.status_code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"{address} did not answer in time; --timeout-s gives it more"
    return error.message
