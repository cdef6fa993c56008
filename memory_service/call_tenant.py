"""Whose a call is, by its metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from memory_service.tenants import MAX_TENANT_CHARS
from quire.errors import FieldViolation, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, Protocol

    class Call(Protocol):
        """What of a servicer's context is needed here."""

        def invocation_metadata(self) -> Iterable[tuple[str, Any]] | None:
            """The call's metadata."""


TENANT_KEY: Final = "quire-tenant"
NO_TENANT: Final = ""  # the tenant of all who have none


def tenant_of(call: Call) -> str | None:
    """The tenant that the call names; None when it names none.

    Raises:
        InvalidRequest: when it names several, or what cannot be a tenant's name.
    """
    metadata = call.invocation_metadata() or ()
    names = [str(value) for key, value in metadata if key == TENANT_KEY]
    if len(names) > 1:
        # One of them may have been added by somebody who was to be kept apart.
        wrong = FieldViolation(TENANT_KEY, f"stands {len(names)} times in the metadata of the call")
        raise InvalidRequest.of([wrong])
    if not names:
        return None
    if (wrong_name := name_violation(TENANT_KEY, names[0])) is not None:
        raise InvalidRequest.of([wrong_name])
    return names[0]


def refuse_tenant(call: Call, why: str) -> None:
    """Raise InvalidRequest for a call that names a tenant, since it speaks for that one alone."""
    if tenant_of(call) is not None:
        raise InvalidRequest.of([FieldViolation(TENANT_KEY, f"must be absent: {why}")])


def name_violation(field: str, name: str) -> FieldViolation | None:
    """What is wrong with a tenant's name."""
    if len(name) <= MAX_TENANT_CHARS and name.isprintable():
        return None
    description = f"has more than {MAX_TENANT_CHARS} characters, or some that cannot be printed"
    return FieldViolation(field, description)
