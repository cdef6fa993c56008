"""What a client says of itself with every call."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

    Metadata: TypeAlias = Sequence[tuple[str, str]]


def call_metadata(token: str | None, metadata: Metadata) -> tuple[tuple[str, str], ...]:
    """Metadata of each call: `metadata`, and the bearer token if there is one."""
    bearer = () if token is None else (("authorization", f"Bearer {token}"),)
    return (*metadata, *bearer)
