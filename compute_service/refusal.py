"""How a checkpoint is refused: in one sentence, whoever found the reason."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class ModelRefused(Exception):
    """A checkpoint cannot be served; the message is one sentence with the reason."""


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Whatever a model's code raises, it is refused in one sentence."""
    try:
        yield
    except ModelRefused:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelRefused(f"{what}: {type(error).__name__}: {reason}") from error
