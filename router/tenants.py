"""Who a call belongs to: learned from its metadata, never from the request's body."""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from quire.errors import Unauthenticated
from quire.serving import StartupError
from router.tenants_file import TENANT_NAME, is_tenant_name, read_tenants

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from quire.settings import RouterSettings

    Metadata: TypeAlias = Iterable[tuple[str, Any]] | None

NO_TENANT = ""  # the tenant of all who have none
_AUTHORIZATION = "authorization"
_WANTED = "`authorization: Bearer TOKEN`"


class Tenants(Protocol):
    """Tells calls apart by tenant."""

    def of(self, metadata: Metadata) -> str:
        """The tenant of a call with this metadata; raises Unauthenticated."""


def tenants_of(settings: RouterSettings) -> Tenants:
    """What the settings ask for; raises StartupError when they contradict each other or the file is malformed."""
    if settings.tenants is not None and settings.tenant_metadata is not None:
        raise StartupError(
            "--tenants and --tenant-metadata are two answers to one question: give only one of them"
        )
    if settings.tenants is not None:
        return TenantsByToken(read_tenants(settings.tenants))
    if settings.tenant_metadata is not None:
        return TenantsByGateway(settings.tenant_metadata)
    return OneTenant()


class OneTenant:
    """Nobody is asked: every call belongs to the tenant of all who have none."""

    def of(self, _metadata: Metadata) -> str:
        """No tenant."""
        return NO_TENANT


class TenantsByToken:
    """Each tenant has bearer tokens, of which only digests are known here."""

    def __init__(self, tokens: Sequence[tuple[bytes, str]]) -> None:
        """`tokens`: SHA-256 of each token with its tenant."""
        self._tokens = tuple(tokens)

    def of(self, metadata: Metadata) -> str:
        """The tenant of the call's one token."""
        values = _values(metadata, _AUTHORIZATION)
        if len(values) != 1:
            raise Unauthenticated(f"the call needs exactly one {_WANTED}, it has {len(values)}")
        scheme, _, token = values[0].strip().partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthenticated(f"the call's authorization is not {_WANTED}")
        return self._find(hashlib.sha256(token.strip().encode()).digest())

    def _find(self, digest: bytes) -> str:
        found: str | None = None
        for known, tenant in self._tokens:
            # All are looked at, each in constant time: how long it takes tells nothing of what is known.
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None:
            raise Unauthenticated("the call's bearer token is not known here")
        return found


class TenantsByGateway:
    """Something in front that is trusted has found out who calls, and says so in the call's metadata."""

    def __init__(self, key: str) -> None:
        self._key = key

    def of(self, metadata: Metadata) -> str:
        """The tenant that the gateway names; no tenant when it names none."""
        values = _values(metadata, self._key)
        if len(values) > 1:
            # One of them may be the client's own.
            raise Unauthenticated(f"the call has {len(values)} entries of {self._key}")
        tenant = values[0] if values else NO_TENANT
        if tenant and not is_tenant_name(tenant):
            raise Unauthenticated(f"the tenant in {self._key} is none: it has {TENANT_NAME}")
        return tenant


def _values(metadata: Metadata, key: str) -> list[str]:
    return [str(value) for name, value in metadata or () if name == key]
