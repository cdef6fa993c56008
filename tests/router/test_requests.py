"""The table of live requests, and the names that tell them apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_requests import make_request

from quire.errors import RequestIdInUse, RequestNotFound
from router.request import first_sequence
from router.requests import RequestTable

NAMES = st.text(st.sampled_from("ab/@%0"), min_size=1, max_size=6)


def test_an_id_is_a_tenants_own() -> None:
    """The same id is live for two tenants; neither learns of the other's, by asking or by colliding."""
    table = RequestTable(queue_limit=10)
    a = make_request("same", [1], tenant="a")
    b = make_request("same", [1], tenant="b")
    table.add(a)
    with pytest.raises(RequestNotFound):
        table.get("b", "same")
    table.add(b)
    with pytest.raises(RequestIdInUse):
        table.add(make_request("same", [1], tenant="b"))
    assert (table.get("a", "same"), table.get("b", "same")) == (a, b)
    assert table.is_live(a)
    with pytest.raises(RequestNotFound):
        table.get("", "same")


def test_a_request_without_a_tenant_has_a_plain_sequence_id() -> None:
    """Request id and sample; the tenant is behind an @ where there is one."""
    assert first_sequence(make_request("r", [1])).sequence_id == "r/0"
    assert first_sequence(make_request("r", [1], tenant="a/b@c")).sequence_id == "r/0@a%2Fb%40c"


@given(left=st.tuples(st.just("") | NAMES, NAMES), right=st.tuples(st.just("") | NAMES, NAMES))
def test_sequence_ids_are_unique(left: tuple[str, str], right: tuple[str, str]) -> None:
    """Whatever clients and tenants are called, two live requests never have a sequence id in common."""
    ids = [
        first_sequence(make_request(request_id, [1], tenant=tenant)).sequence_id
        for tenant, request_id in (left, right)
    ]
    assert (ids[0] == ids[1]) == (left == right)
