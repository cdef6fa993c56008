"""How the commands that talk to services tell of failures."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from quire.errors import QuireError
from quire.rpc_status import RemoteError

if TYPE_CHECKING:
    from collections.abc import Iterator

INTERRUPTED = 130


@dataclass(slots=True)
class Outcome:
    """What the process will end with."""

    status: int = 0


@contextmanager
def reporting_errors(
    address: str, *, named_by: str = "--router-address", interrupted: int = INTERRUPTED
) -> Iterator[Outcome]:
    """Turn a failed call to `address` into one line on stderr and status 1, Ctrl-C into status `interrupted`.

    `named_by` is the flag that would name another address. A reader of our output who has enough, such as `head`, is no
    failure.
    """
    outcome = Outcome()
    try:
        yield outcome
        sys.stdout.flush()
    except QuireError as error:
        print(f"error: {_in_words(error, address, named_by)}", file=sys.stderr)
        outcome.status = 1
    except KeyboardInterrupt:
        if interrupted:
            print(file=sys.stderr)
        outcome.status = interrupted
    except BrokenPipeError:
        # The interpreter would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _in_words(error: QuireError, address: str, named_by: str) -> str:
    if isinstance(error, RemoteError) and error.status_code is grpc.StatusCode.UNAVAILABLE:
        return (
            f"nothing answers on {address}; is `quire up` running? "
            f"{named_by} names another address ({error.message})"
        )
    if isinstance(error, RemoteError) and error.status_code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"{address} did not answer in time; --timeout-s gives it more"
    return error.message
