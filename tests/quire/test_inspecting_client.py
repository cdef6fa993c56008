"""`PoolInspector` and `PoolController` against a server whose answers are known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from scripted_memory import ScriptedMemory, serving

from protos.memory.v1 import control_pb2
from protos.memory.v1 import inspection_pb2 as pb
from quire.client import PoolController, PoolInspector, RemoteError
from quire.errors import BlockNotFound, InvalidRequest, NoPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from google.protobuf.message import Message


@pytest.fixture
def memory(address: str) -> Iterator[ScriptedMemory]:
    found = ScriptedMemory()
    with serving(found, address):
        yield found


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/memory.sock"


@pytest.fixture
def inspector(address: str) -> Iterator[PoolInspector]:
    with PoolInspector(address) as found:
        yield found


@pytest.fixture
def controller(address: str) -> Iterator[PoolController]:
    with PoolController(address) as found:
        yield found


QUESTIONS: list[tuple[str, Callable[[PoolInspector], object], Message, Message]] = [
    ("GetPool", lambda one: one.get_pool(tenant="red"), pb.GetPoolRequest(), pb.GetPoolResponse()),
    (
        "GetSequence",
        lambda one: one.get_sequence("a/0", tenant="red"),
        pb.GetSequenceRequest(sequence_id="a/0"),
        pb.GetSequenceResponse(revision="1"),
    ),
    (
        "GetBlock",
        lambda one: one.get_block(3, tenant="red"),
        pb.GetBlockRequest(block_id=3),
        pb.GetBlockResponse(revision="1"),
    ),
    (
        "ListTenants",
        lambda one: one.list_tenants(tenant="red"),
        pb.ListTenantsRequest(),
        pb.ListTenantsResponse(revision="1"),
    ),
    (
        "ListRetentions",
        lambda one: one.list_retentions(tenant="red"),
        pb.ListRetentionsRequest(),
        pb.ListRetentionsResponse(revision="1"),
    ),
    (
        "ProbePrefix",
        lambda one: one.probe_prefix([1, 2], tenant="red"),
        pb.ProbePrefixRequest(token_ids=[1, 2]),
        pb.ProbePrefixResponse(num_cached_tokens=1),
    ),
    (
        "Explain",
        lambda one: one.explain(sequence_id="a/0", tenant="red"),
        pb.ExplainRequest(sequence_id="a/0"),
        pb.ExplainResponse(revision="1"),
    ),
    (
        "Explain",
        lambda one: one.explain(block_id=0, tenant="red"),
        pb.ExplainRequest(block_id=0),
        pb.ExplainResponse(revision="1"),
    ),
]


@pytest.mark.parametrize(("method", "ask", "request_", "answer"), QUESTIONS)
def test_a_question_is_asked_for_a_tenant(
    method: str,
    ask: Callable[[PoolInspector], object],
    request_: Message,
    answer: Message,
    memory: ScriptedMemory,
    inspector: PoolInspector,
) -> None:
    """The request carries the arguments, the metadata the tenant, and the answer comes back whole."""
    memory.answers[method] = [answer]
    assert ask(inspector) == answer
    assert memory.asked(method) == [(request_, {"quire-tenant": "red"})]


def test_without_a_tenant_there_is_no_metadata(
    memory: ScriptedMemory, inspector: PoolInspector
) -> None:
    """None asks about all tenants."""
    memory.answers["GetPool"] = [pb.GetPoolResponse(pool_id="p")]
    assert inspector.get_pool().pool_id == "p"
    assert memory.asked("GetPool") == [(pb.GetPoolRequest(), {})]


def test_blocks_come_page_by_page(memory: ScriptedMemory, inspector: PoolInspector) -> None:
    """Two pages are one iteration; the filters go with each page."""
    memory.answers["ListBlocks"] = [
        pb.ListBlocksResponse(blocks=[pb.Block(block_id=1)], next_page_token="then"),  # noqa: S106 -- of a page
        pb.ListBlocksResponse(blocks=[pb.Block(block_id=2)]),
    ]
    found = inspector.list_blocks(
        state="cached",
        min_ref_count=2,
        block_hash_prefix="ab",
        sequence_id="a/0",
        retained=True,
        min_idle_seconds=1.5,
        tenant="red",
    )
    assert [block.block_id for block in found] == [1, 2]
    first, second = (request for request, _ in memory.asked("ListBlocks"))
    assert first == pb.ListBlocksRequest(
        page_size=1000,
        state=pb.BLOCK_STATE_CACHED,
        min_ref_count=2,
        block_hash_prefix="ab",
        sequence_id="a/0",
        retained=True,
        min_idle_seconds=1.5,
    )
    assert second.page_token == "then"  # noqa: S105 -- as above
    assert second.state == pb.BLOCK_STATE_CACHED
    assert memory.asked("ListBlocks")[1][1] == {"quire-tenant": "red"}


def test_sequences_can_be_filtered(memory: ScriptedMemory, inspector: PoolInspector) -> None:
    """By request and by session."""
    memory.answers["ListSequences"] = [pb.ListSequencesResponse()]
    assert list(inspector.list_sequences(request_id="a", session_id="s", tenant="red")) == []
    assert memory.asked("ListSequences") == [
        (
            pb.ListSequencesRequest(page_size=1000, request_id="a", session_id="s"),
            {"quire-tenant": "red"},
        )
    ]


def test_what_is_refused_is_raised(memory: ScriptedMemory, inspector: PoolInspector) -> None:
    """The service's error comes as the class that it is, with its numbers."""
    memory.answers["GetBlock"] = [BlockNotFound("no block", metadata={"block_id": 9})]
    with pytest.raises(BlockNotFound, match="no block") as raised:
        inspector.get_block(9)
    assert raised.value.metadata == {"block_id": "9"}


def test_what_cannot_be_asked_is_refused_at_once(
    memory: ScriptedMemory, inspector: PoolInspector, controller: PoolController
) -> None:
    """Nothing or both to be explained or retained, a name that metadata cannot carry: no call is made."""
    with pytest.raises(InvalidRequest):
        inspector.explain()
    with pytest.raises(InvalidRequest):
        inspector.explain(sequence_id="a/0", block_id=1)
    with pytest.raises(InvalidRequest):
        controller.retain(priority=1)
    with pytest.raises(InvalidRequest, match="tenant"):
        inspector.get_pool(tenant="rot\n")
    assert memory.calls == []


def test_a_watch_begins_where_it_is_told(memory: ScriptedMemory, inspector: PoolInspector) -> None:
    """The token is sent; answers come one by one until it is cancelled."""
    memory.changes.put(pb.WatchResponse(revision="7"))
    with inspector.watch(resume_token="t") as answers:  # noqa: S106 -- of a stream
        assert answers.wait_until_accepted()
        assert next(answers).revision == "7"
        answers.cancel()
        with pytest.raises(RemoteError, match="ancelled"):
            next(answers)
    assert memory.asked("Watch") == [
        (pb.WatchRequest(resume_token="t"), {})  # noqa: S106 -- as above
    ]


def test_a_watch_is_not_asked_again_by_itself(
    memory: ScriptedMemory, inspector: PoolInspector
) -> None:
    """Unlike the other questions it fails at once: whoever watches is to know."""
    memory.changes.put(NoPool("no pool yet"))
    with pytest.raises(NoPool), inspector.watch() as answers:
        next(answers)
    assert len(memory.asked("Watch")) == 1


WISHES: list[tuple[str, Callable[[PoolController], object], Message, Message]] = [
    (
        "Retain",
        lambda one: one.retain(sequence_id="a/0", priority=3, time_to_live_s=1.5, tenant="red"),
        control_pb2.RetainRequest(
            sequence_id="a/0", priority=3, time_to_live={"seconds": 1, "nanos": 500_000_000}
        ),
        control_pb2.RetainResponse(retention_id="r"),
    ),
    (
        "Retain",
        lambda one: one.retain(token_ids=[1, 2], priority=1, tenant="red"),
        control_pb2.RetainRequest(prefix={"token_ids": [1, 2]}, priority=1),
        control_pb2.RetainResponse(retention_id="r"),
    ),
    (
        "Release",
        lambda one: one.release("r", tenant="red"),
        control_pb2.ReleaseRequest(retention_id="r"),
        control_pb2.ReleaseResponse(verdict=control_pb2.VERDICT_REJECTED),
    ),
    (
        "Flush",
        lambda one: one.flush([4], tenant="red"),
        control_pb2.FlushRequest(token_ids=[4]),
        control_pb2.FlushResponse(num_freed_blocks=2),
    ),
    (
        "PublishPrefix",
        lambda one: one.publish_prefix([4, 5], tenant="red"),
        control_pb2.PublishPrefixRequest(token_ids=[4, 5]),
        control_pb2.PublishPrefixResponse(prefix_id="x"),
    ),
    (
        "WithdrawPrefix",
        lambda one: one.withdraw_prefix("x", tenant="red"),
        control_pb2.WithdrawPrefixRequest(prefix_id="x"),
        control_pb2.WithdrawPrefixResponse(verdict=control_pb2.VERDICT_ACCEPTED),
    ),
]


@pytest.mark.parametrize(("method", "wish", "request_", "answer"), WISHES)
def test_a_wish_is_made_for_a_tenant(
    method: str,
    wish: Callable[[PoolController], object],
    request_: Message,
    answer: Message,
    memory: ScriptedMemory,
    controller: PoolController,
) -> None:
    """The request carries the arguments, the metadata the tenant, and a rejection is an answer."""
    memory.answers[method] = [answer]
    assert wish(controller) == answer
    assert memory.asked(method) == [(request_, {"quire-tenant": "red"})]


def test_a_quota_that_is_none_is_absent(memory: ScriptedMemory, controller: PoolController) -> None:
    """Absent is not zero; the tenant is in the request, not in the metadata."""
    answer = control_pb2.SetQuotaResponse(revision="4")
    memory.answers["SetQuota"] = [answer]
    assert controller.set_quota("red", soft_blocks=0, hard_blocks=None) == answer
    ((request, metadata),) = memory.asked("SetQuota")
    assert request == control_pb2.SetQuotaRequest(tenant="red", soft_quota_blocks=0)
    assert not request.HasField("hard_quota_blocks")
    assert metadata == {}


def test_no_wish_is_repeated(memory: ScriptedMemory, controller: PoolController) -> None:
    """A second Retain would be another retention, so UNAVAILABLE is told at once."""
    memory.answers["Retain"] = [NoPool("no pool"), control_pb2.RetainResponse()]
    with pytest.raises(NoPool):
        controller.retain(sequence_id="a/0", priority=1)
    assert len(memory.calls) == 1
