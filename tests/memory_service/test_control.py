"""Wishes of tenants and operators: checked field by field, met whole, in part or not, and never for somebody else."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_faces import SIZE, Call, OneRouter, ask, inspection_of, ints, new_manager, registry_of

from memory_service import sharing
from memory_service.control_servicer import ControlServicer
from memory_service.integrity import check_integrity
from protos.memory.v1 import control_pb2 as pb
from protos.memory.v1 import inspection_pb2
from quire.errors import InvalidRequest, NoPool

if TYPE_CHECKING:
    from google.protobuf.message import Message

NOW = 1.7e9
DAY_S = 24 * 60 * 60


class Pool:
    """Books with both faces."""

    def __init__(self, num_blocks: int = 40) -> None:
        self.manager = new_manager(num_blocks, clock=lambda: NOW)
        self.router = OneRouter(self.manager)
        self.registry = registry_of(self.manager)
        self.control = ControlServicer(self.registry)
        self._inspection = inspection_of(self.registry)

    def hit(self, tokens: list[int], *tenants: str) -> int:
        """Tokens that would hit; one more token is run."""
        request = inspection_pb2.ProbePrefixRequest(token_ids=[*tokens, 0])
        return int(ask(self._inspection.ProbePrefix, request, *tenants).num_cached_tokens)

    def retention_ids(self) -> list[str]:
        """Those that there are."""
        request = inspection_pb2.ListRetentionsRequest()
        listed = ask(self._inspection.ListRetentions, request).retentions
        return [found.retention_id for found in listed]


def prefix(tokens: list[int], priority: int = 1, **fields: Any) -> pb.RetainRequest:
    return pb.RetainRequest(prefix=pb.TokenRun(token_ids=tokens), priority=priority, **fields)


def told(answer: Any) -> tuple[str, str]:
    """Verdict and reason."""
    return pb.Verdict.Name(answer.verdict).removeprefix("VERDICT_"), answer.reason


# Quotas


def test_a_quota_is_set_and_shown() -> None:
    """Both bounds at once, absent ones are lifted; the answer is the tenant as it is after the change."""
    pool = Pool()
    pool.router.run(0, [1] * 8, tenant="red")
    request = pb.SetQuotaRequest(tenant="red", soft_quota_blocks=0, hard_quota_blocks=5)
    answer = ask(pool.control.SetQuota, request)
    assert answer.revision == str(pool.manager.revision)
    tenant = answer.tenant
    assert (tenant.tenant, tenant.num_blocks, tenant.num_sequences) == ("red", 2, 1)
    assert (tenant.HasField("soft_quota_blocks"), tenant.hard_quota_blocks) == (True, 5)
    lifted = ask(pool.control.SetQuota, pb.SetQuotaRequest(tenant="red")).tenant
    assert not lifted.HasField("soft_quota_blocks")
    assert not lifted.HasField("hard_quota_blocks")
    assert pool.manager.pool.tenants["red"].hard_blocks is None


def test_a_hard_quota_holds_from_the_next_answer_on() -> None:
    """Nothing is evicted before blocks are needed; then the tenant gets each only for one of its own."""
    pool = Pool()
    pool.router.cache([1] * 16, tenant="red")
    request = pb.SetQuotaRequest(tenant="red", hard_quota_blocks=2)
    assert ask(pool.control.SetQuota, request).tenant.num_blocks == 4
    assert len(pool.router.admit(0, [2] * 12, tenant="red").refusals) == 1
    assert len(pool.router.admit(0, [2] * 8, tenant="red").admissions) == 1
    assert pool.manager.pool.tenants["red"].num_blocks == 4
    assert pool.manager.pool.num_evictions == 2


# Retention


def test_a_prefix_is_retained_until_it_expires() -> None:
    """ACCEPTED with id, blocks and time; at that time it ends by itself, and not before."""
    pool = Pool()
    pool.router.cache([1] * 8, tenant="red")
    request = prefix([1] * 8, 3, time_to_live=Duration(seconds=60, nanos=500_000_000))
    answer = ask(pool.control.Retain, request, "red")
    assert told(answer) == ("ACCEPTED", "")
    assert (answer.retention_id, answer.num_blocks) == ("r-1", 2)
    assert answer.expire_time.ToMilliseconds() == 1_700_000_060_500
    assert answer.revision == str(pool.manager.revision)
    assert pool.manager.sharing.expire(NOW + 60) == 0
    assert pool.retention_ids() == ["r-1"]
    assert pool.manager.sharing.expire(NOW + 60.5) == 1
    assert pool.retention_ids() == []


def test_a_wish_that_is_met_in_part_says_what_was_cut() -> None:
    """CLIPPED when only a leading part is there; REJECTED, with no id, when nothing is."""
    pool = Pool()
    pool.router.cache([1] * 8)
    answer = ask(pool.control.Retain, prefix([1] * 8 + [2] * 8))
    assert told(answer) == ("CLIPPED", "2 of 4 blocks are not cached")
    assert (answer.num_blocks, answer.HasField("expire_time")) == (2, False)
    nothing = ask(pool.control.Retain, prefix([3] * 8, time_to_live=Duration(seconds=1)))
    assert told(nothing) == ("REJECTED", "no full block of these tokens is cached")
    assert (nothing.retention_id, nothing.HasField("expire_time")) == ("", False)


def test_a_sequence_is_retained_with_what_it_seals_later() -> None:
    """Blocks sealed after the wish count too; a sequence of another tenant is none."""
    pool = Pool()
    pool.router.run(0, [1] * 6, tenant="red")
    request = pb.RetainRequest(sequence_id="s0", priority=7)
    assert told(ask(pool.control.Retain, request, "blue"))[0] == "REJECTED"
    answer = ask(pool.control.Retain, request, "red")
    assert (told(answer)[0], answer.num_blocks) == ("ACCEPTED", 1)
    one = ints([0])
    pool.router.apply(extend_rows=one, extend_starts=ints([6]), extend_num_tokens=ints([2]))
    pool.router.apply(
        commit_rows=one, commit_num_computed_tokens=ints([8]), commit_token_ids=ints([1, 1, 5, 6])
    )
    assert pool.manager.pool.num_retained == 2


def test_only_its_tenant_ends_a_retention() -> None:
    """REJECTED for anybody else, as for one that there never was, and for a repeat."""
    pool = Pool()
    pool.router.cache([1] * 8, tenant="red")
    name = ask(pool.control.Retain, prefix([1] * 8), "red").retention_id
    request = pb.ReleaseRequest(retention_id=name)
    no_such = ("REJECTED", "this tenant has no such retention")
    assert told(ask(pool.control.Release, request)) == no_such
    assert told(ask(pool.control.Release, request, "blue")) == no_such
    unknown = pb.ReleaseRequest(retention_id="r-77")
    assert told(ask(pool.control.Release, unknown, "red")) == no_such
    assert told(ask(pool.control.Release, request, "red")) == ("ACCEPTED", "")
    assert told(ask(pool.control.Release, request, "red")) == no_such


def test_what_is_retained_goes_last() -> None:
    """Under a flood the oldest prefix stays because it is retained; once it is alone it is evicted all the same."""
    pool = Pool(20)
    pool.router.cache([1] * 8, tenant="red")
    assert told(ask(pool.control.Retain, prefix([1] * 8, 2), "red"))[0] == "ACCEPTED"
    for flood in range(10):
        pool.router.cache([2, flood] * 8, tenant="blue")
    assert pool.hit([1] * 8, "red") == 8
    assert len(pool.router.admit(0, [3] * 76, tenant="blue").admissions) == 1
    assert pool.hit([1] * 8, "red") == 0


# Flush


def test_a_flush_forgets_what_is_the_tenants() -> None:
    """ACCEPTED with freed blocks; CLIPPED while some are in use; REJECTED when nothing is left; others keep theirs."""
    pool = Pool()
    for tenant in ("red", "blue"):
        pool.router.cache([1] * 8, tenant=tenant)
    pool.router.run(0, [2] * 8, tenant="red")
    answer = ask(pool.control.Flush, pb.FlushRequest(), "red")
    assert told(answer) == (
        "CLIPPED",
        "2 blocks are in use: they are freed with their last holders",
    )
    assert (answer.num_freed_blocks, answer.num_used_blocks) == (2, 2)
    assert answer.revision == str(pool.manager.revision)
    hits = [pool.hit(tokens, "red") for tokens in ([1] * 8, [2] * 8)]
    assert (hits, pool.hit([1] * 8, "blue")) == ([0, 0], 8)
    repeat = ask(pool.control.Flush, pb.FlushRequest(), "red")
    assert told(repeat) == ("REJECTED", "nothing of this is cached")
    assert told(ask(pool.control.Flush, pb.FlushRequest(), "blue")) == ("ACCEPTED", "")


def test_a_flush_behind_a_prefix_leaves_the_rest() -> None:
    """What begins with the tokens is forgotten, what begins otherwise stays."""
    pool = Pool()
    head = [1] * 4
    for tail in (2, 3):
        pool.router.cache(head + [tail] * 8, tenant="red")
    pool.router.cache([4] * 8, tenant="red")
    request = pb.FlushRequest(token_ids=[*head, 2, 2, 2, 2])
    assert ask(pool.control.Flush, request, "red").num_freed_blocks == 2
    assert pool.hit(head + [2] * 8, "red") == 4
    assert pool.hit(head + [3] * 8, "red") == 12
    assert ask(pool.control.Flush, pb.FlushRequest(token_ids=head), "red").num_freed_blocks == 3
    assert (pool.hit(head + [3] * 8, "red"), pool.hit([4] * 8, "red")) == (0, 8)


def test_steps_are_answered_while_much_is_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush is made of bounded parts; between them others have their turn, and the answer counts all parts."""
    monkeypatch.setattr(sharing, "FLUSH_CHUNK", 3)
    pool = Pool(100)
    for prompt in range(10):
        pool.router.cache([prompt + 1] * 8, tenant="red")
    num_turns = 0

    async def flush_beside_others() -> Any:
        nonlocal num_turns
        flushing = asyncio.create_task(pool.control.Flush(pb.FlushRequest(), Call("red")))
        while not flushing.done():
            pool.router.run(0, [num_turns + 20])
            pool.router.release(0)
            num_turns += 1
            await asyncio.sleep(0)
        return await flushing

    answer = asyncio.run(flush_beside_others())
    assert (told(answer), answer.num_freed_blocks) == (("ACCEPTED", ""), 20)
    assert num_turns >= 7
    assert check_integrity(pool.manager) == []


def test_a_flush_ends_with_its_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """When another pool takes its place between two parts, nothing more is done to the old one."""
    monkeypatch.setattr(sharing, "FLUSH_CHUNK", 1)
    pool = Pool()
    pool.router.cache([1] * 16)

    async def replace_meanwhile() -> None:
        flushing = asyncio.create_task(pool.control.Flush(pb.FlushRequest(), Call()))
        await asyncio.sleep(0)
        revision = pool.manager.revision
        pool.registry.pool = registry_of(new_manager(10)).pool
        with pytest.raises(NoPool):
            await flushing
        assert pool.manager.revision == revision

    asyncio.run(replace_meanwhile())


# Published prefixes


def test_a_published_prefix_is_shared_by_all() -> None:
    """From the first tenant that computes it after that; a repeat has the same id; after its end nobody hits it."""
    pool = Pool()
    tokens = [1] * 8
    answer = ask(pool.control.PublishPrefix, pb.PublishPrefixRequest(token_ids=[*tokens, 2]))
    assert told(answer) == ("CLIPPED", "the last 1 tokens do not fill a block")
    assert (answer.prefix_id, answer.num_tokens) == ("p-1", 8)
    repeat = ask(pool.control.PublishPrefix, pb.PublishPrefixRequest(token_ids=tokens))
    assert (told(repeat), repeat.prefix_id) == (("ACCEPTED", ""), "p-1")
    pool.router.cache(tokens, tenant="red")
    assert pool.hit(tokens, "blue") == pool.hit(tokens) == 8
    request = pb.WithdrawPrefixRequest(prefix_id="p-1")
    assert told(ask(pool.control.WithdrawPrefix, request)) == ("ACCEPTED", "")
    assert pool.hit(tokens, "blue") == pool.hit(tokens, "red") == 0
    again = ask(pool.control.WithdrawPrefix, request)
    assert told(again) == ("REJECTED", "no published prefix has this id")


# Requests that are wrong

TOKENS = pb.TokenRun(token_ids=[1] * 4)


@pytest.mark.parametrize(
    ("method", "request_", "fields"),
    [
        ("SetQuota", pb.SetQuotaRequest(tenant="x" * 129), ["tenant"]),
        ("SetQuota", pb.SetQuotaRequest(tenant="a\tb"), ["tenant"]),
        ("SetQuota", pb.SetQuotaRequest(soft_quota_blocks=-1), ["soft_quota_blocks"]),
        ("SetQuota", pb.SetQuotaRequest(hard_quota_blocks=0), ["hard_quota_blocks"]),
        (
            "SetQuota",
            pb.SetQuotaRequest(soft_quota_blocks=6, hard_quota_blocks=5),
            ["soft_quota_blocks"],
        ),
        ("Retain", pb.RetainRequest(priority=1), ["subject"]),
        ("Retain", pb.RetainRequest(priority=1, sequence_id=""), ["subject"]),
        ("Retain", pb.RetainRequest(prefix=TOKENS), ["priority"]),
        ("Retain", pb.RetainRequest(prefix=TOKENS, priority=8), ["priority"]),
        ("Retain", prefix([1], time_to_live=Duration()), ["time_to_live"]),
        ("Retain", prefix([1], time_to_live=Duration(nanos=-1)), ["time_to_live"]),
        ("Retain", prefix([1], time_to_live=Duration(seconds=30 * DAY_S + 1)), ["time_to_live"]),
        ("Retain", pb.RetainRequest(priority=0), ["subject", "priority"]),
        ("Retain", prefix([]), ["prefix.token_ids"]),
        ("Retain", prefix([1, 2, -3]), ["prefix.token_ids[2]"]),
        ("Release", pb.ReleaseRequest(retention_id="p-1"), ["retention_id"]),
        ("Release", pb.ReleaseRequest(retention_id="r-" + "9" * 5000), ["retention_id"]),
        ("Release", pb.ReleaseRequest(), ["retention_id"]),
        ("Flush", pb.FlushRequest(token_ids=[-1] * 4), ["token_ids[0]"]),
        ("PublishPrefix", pb.PublishPrefixRequest(), ["token_ids"]),
        ("PublishPrefix", pb.PublishPrefixRequest(token_ids=[1] * 3), ["token_ids"]),
        ("PublishPrefix", pb.PublishPrefixRequest(token_ids=[1] * 200), ["token_ids"]),
        ("WithdrawPrefix", pb.WithdrawPrefixRequest(prefix_id="1"), ["prefix_id"]),
    ],
)
def test_wrong_fields_are_named(method: str, request_: Any, fields: list[str]) -> None:
    """INVALID_ARGUMENT with every field that is wrong, and nothing changes."""
    pool = Pool()
    revision = pool.manager.revision
    with pytest.raises(InvalidRequest) as caught:
        ask(getattr(pool.control, method), request_)
    assert [found.field for found in caught.value.violations] == fields
    assert pool.manager.revision == revision


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("SetQuota", pb.SetQuotaRequest(tenant="red")),
        ("Retain", prefix([1] * 4)),
        ("Release", pb.ReleaseRequest(retention_id="r-1")),
        ("Flush", pb.FlushRequest()),
        ("PublishPrefix", pb.PublishPrefixRequest(token_ids=[1] * 4)),
        ("WithdrawPrefix", pb.WithdrawPrefixRequest(prefix_id="p-1")),
    ],
)
def test_a_call_of_several_tenants_changes_nothing(method: str, request_: Any) -> None:
    """It cannot be told for whom it speaks."""
    pool = Pool()
    revision = pool.manager.revision
    with pytest.raises(InvalidRequest) as caught:
        ask(getattr(pool.control, method), request_, "red", "blue")
    assert [found.field for found in caught.value.violations] == ["quire-tenant"]
    assert pool.manager.revision == revision


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("SetQuota", pb.SetQuotaRequest(tenant="blue")),
        ("PublishPrefix", pb.PublishPrefixRequest(token_ids=[1] * 4)),
        ("WithdrawPrefix", pb.WithdrawPrefixRequest(prefix_id="p-1")),
    ],
)
def test_a_tenant_decides_for_itself_alone(method: str, request_: Message) -> None:
    """Its own bounds and what all share are not its to change: publishing a guess would tell whether others have it."""
    with pytest.raises(InvalidRequest, match="quire-tenant: must be absent"):
        ask(getattr(Pool().control, method), request_, "blue")


# Never wedged


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["red", "blue"]),
            st.lists(st.integers(0, 1), min_size=4, max_size=16),
            st.integers(1, 7),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_no_wish_wedges_the_pool(wishes: list[tuple[str, list[int], int]]) -> None:
    """Whatever is retained: at most half of the pool is, and a sequence as large as the pool is still admitted."""
    pool = Pool(16)
    for tenant, tokens, priority in wishes:
        pool.router.cache(tokens, tenant=tenant)
        ask(pool.control.Retain, prefix(tokens, priority), tenant)
        assert pool.manager.pool.num_retained <= 8
    assert len(pool.router.admit(0, [9] * 15 * SIZE).admissions) == 1
    assert check_integrity(pool.manager) == []
