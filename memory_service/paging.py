"""Pages of a list that changes while it is read: the token of a page is the key of its last item."""

from __future__ import annotations

import base64
import json
from typing import Final, TypeVar

from quire.errors import FieldViolation, InvalidRequest

_DEFAULT_PAGE_SIZE: Final = 100
_MAX_PAGE_SIZE: Final = 1000

KeyT = TypeVar("KeyT", bound=tuple[str | int, ...])


def page_size(asked: int) -> int:
    """Items of a page; raises InvalidRequest."""
    if asked < 0:
        raise InvalidRequest.of([FieldViolation("page_size", "is below 0")])
    return min(asked or _DEFAULT_PAGE_SIZE, _MAX_PAGE_SIZE)


def encode_page_token(key: tuple[str | int, ...]) -> str:
    """The token of a page whose last item has `key`."""
    return base64.urlsafe_b64encode(json.dumps(key, separators=(",", ":")).encode()).decode()


def decode_page_token(token: str, first: KeyT) -> KeyT:
    """The key that stands in `token`; `first`, which is below all keys, for an empty one.

    Raises:
        InvalidRequest: when this service gave no such token.
    """
    if not token:
        return first
    try:
        key = json.loads(base64.b64decode(token, altchars=b"-_", validate=True))
    except ValueError:
        key = None
    kinds = [type(part) for part in first]
    if not isinstance(key, list) or [type(part) for part in key] != kinds:
        raise InvalidRequest.of([FieldViolation("page_token", "is none that this service gave")])
    return tuple(key)  # type: ignore[return-value]  # of the same types, as was just seen
