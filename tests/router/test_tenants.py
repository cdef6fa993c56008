"""Who a call belongs to: its token or a gateway's word, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from quire.errors import Unauthenticated
from quire.serving import StartupError
from quire.settings import RouterSettings
from router.tenants import TenantsByGateway, tenants_of
from router.tenants_file import read_tenants

if TYPE_CHECKING:
    from router.tenants import Tenants

KEY = "x-quire-tenant"


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def settings(**given: Any) -> RouterSettings:
    return RouterSettings(**given)


@pytest.fixture
def by_token(tmp_path: Path) -> Tenants:
    file = tmp_path / "tenants.yaml"
    file.write_text(
        f"alice:\n  - {digest('a-old')}\n  - {digest('a-new').upper()}\n'7': [{digest('seven')}]\n"
    )
    return tenants_of(settings(tenants=file))


def test_without_settings_nobody_is_asked() -> None:
    """Every call belongs to the tenant of all who have none, whatever it brings."""
    tenants = tenants_of(settings())
    assert tenants.of(()) == tenants.of((("authorization", "Bearer x"), (KEY, "alice"))) == ""


@pytest.mark.parametrize(
    ("token", "tenant"), [("a-old", "alice"), ("a-new", "alice"), ("seven", "7")]
)
def test_a_known_token_names_its_tenant(by_token: Tenants, token: str, tenant: str) -> None:
    """Each of a tenant's tokens is as good as the others, however the scheme is written."""
    assert by_token.of((("authorization", f"Bearer {token}"),)) == tenant
    assert by_token.of((("x-other", "1"), ("authorization", f"bearer {token}"))) == tenant


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        (),
        ((KEY, "alice"),),
        (("authorization", "Bearer wrong"),),
        (("authorization", "Bearer "),),
        (("authorization", "a-old"),),
        (("authorization", "Basic a-old"),),
        (("authorization", f"Bearer {digest('a-old')}"),),
        (("authorization", "Bearer a-old"), ("authorization", "Bearer a-old")),
        (("authorization", "Bearer a-old"), ("authorization", "Bearer seven")),
    ],
)
def test_a_call_without_one_known_token_is_refused(
    by_token: Tenants, metadata: tuple[tuple[str, str], ...] | None
) -> None:
    """Missing, unknown, doubled, of another scheme, or the digest itself: refused, without repeating what was sent."""
    with pytest.raises(Unauthenticated) as caught:
        by_token.of(metadata)
    assert not any(secret in str(caught.value) for secret in ("a-old", "seven", "wrong"))
    assert caught.value.metadata == {}


def test_json_is_read_too(tmp_path: Path) -> None:
    """JSON is YAML."""
    file = tmp_path / "tenants.json"
    file.write_text(json.dumps({"alice": [digest("a")], "on": [digest("b")]}))
    assert read_tenants(file) == [
        (hashlib.sha256(b"a").digest(), "alice"),
        (hashlib.sha256(b"b").digest(), "on"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "dictionary"),
        ("{}", "at least 1"),
        ("- alice\n", "dictionary"),
        ("alice:\n", " alice: Input should be a valid list"),
        ("alice: []\n", " alice: List should have at least 1"),
        ("alice: [secret-token]\n", " alice 0: Value error, not a SHA-256 digest"),
        (f"alice: [{'a' * 63}]\n", " alice 0: Value error, not a SHA-256 digest"),
        (f"'': [{'a' * 64}]\n", "1 to 128 printable"),
        (f"{'n' * 129}: [{'a' * 64}]\n", "1 to 128 printable"),
        (f"Björk: [{'a' * 64}]\n", "printable ASCII"),
        (f"' a': [{'a' * 64}]\n", "no space at either end"),
        (f"a: [{'a' * 64}]\nb: [{'A' * 64}]\n", "'a' and 'b' have the same token"),
        (f"a: [{'a' * 64}]\na: [{'b' * 64}]\n", "'a' stands there twice"),
        ("a: [\n", "in line 2"),
        ("a: \x00", "is not text"),
    ],
)
def test_a_malformed_file_is_one_clear_line(tmp_path: Path, text: str, expected: str) -> None:
    """It names file and place and says what is wrong; what stands where a digest belongs is not repeated."""
    file = tmp_path / "tenants.yaml"
    file.write_text(text)
    with pytest.raises(StartupError) as caught:
        read_tenants(file)
    message = str(caught.value)
    assert expected in message
    assert str(file) in message
    assert "\n" not in message
    assert "secret-token" not in message


def test_a_file_that_is_not_there_is_named() -> None:
    """A wrong path is one clear line too."""
    with pytest.raises(StartupError, match=r"/nowhere\.yaml cannot be read: No such file"):
        read_tenants(Path("/nowhere.yaml"))


def test_a_gateway_names_the_tenant() -> None:
    """One entry is the tenant, none is nobody in particular; two are refused, for one may be the client's own."""
    tenants = tenants_of(settings(tenant_metadata=KEY))
    assert tenants.of(((KEY, "alice"), ("authorization", "Bearer x"))) == "alice"
    assert tenants.of(()) == tenants.of(None) == ""
    with pytest.raises(Unauthenticated, match="2 entries"):
        tenants.of(((KEY, "alice"), (KEY, "alice")))


@pytest.mark.parametrize("name", ["n" * 129, "a\x7fb", "a\nb", "Björk"])
def test_a_gateways_word_is_checked(name: str) -> None:
    """What no tenant can be called is refused before it reaches a log or the memory service."""
    with pytest.raises(Unauthenticated):
        TenantsByGateway(KEY).of(((KEY, name),))


def test_two_ways_at_once_are_refused(tmp_path: Path) -> None:
    """A token and a gateway's word may contradict each other."""
    with pytest.raises(StartupError, match="only one of them"):
        tenants_of(settings(tenants=tmp_path / "t.yaml", tenant_metadata=KEY))


@pytest.mark.parametrize("key", ["X-Tenant", "tenant-bin", "grpc-tenant", "authorization", "a b"])
def test_the_key_must_be_one_of_text_metadata(key: str) -> None:
    """Such a key is never delivered as text, or what it holds is a secret: said at start."""
    with pytest.raises(ValidationError, match="must be a key of text metadata"):
        settings(tenant_metadata=key)
