"""Every call of inspection and control as lines of `buf curl` on real processes, and what wishes do under pressure."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from processes import Quire, assert_pool_is_idle, running_quire, suspended_compute

from quire import demo_model
from quire.client import Client, PoolController, PoolInspector

if TYPE_CHECKING:
    from collections.abc import Iterator

BUF = Path(__file__).parents[2] / "node_modules" / ".bin" / "buf"
GATEWAY_KEY = "x-quire-tenant"
# About a hundred blocks: a flood is through in seconds.
FLAGS = ("--memory-budget", "2MiB", "--max-model-len", "512", "--tenant-metadata", GATEWAY_KEY)
SYSTEM_PROMPT = list(range(300, 364))  # four blocks
SERVICES = {
    "GetPool": "InspectionService",
    "ListSequences": "InspectionService",
    "GetSequence": "InspectionService",
    "ListBlocks": "InspectionService",
    "GetBlock": "InspectionService",
    "ListTenants": "InspectionService",
    "ListRetentions": "InspectionService",
    "ProbePrefix": "InspectionService",
    "CheckIntegrity": "InspectionService",
    "SetQuota": "ControlService",
    "Retain": "ControlService",
    "Release": "ControlService",
    "Flush": "ControlService",
    "PublishPrefix": "ControlService",
    "WithdrawPrefix": "ControlService",
}


@pytest.fixture(scope="module")
def shared() -> Iterator[Quire]:
    """Services with a small pool, whose gateway names the tenant. Each test begins by forgetting what is cached."""
    with running_quire(demo_model.path(), *FLAGS, "--log-level", "error") as found:
        yield found


@pytest.fixture(autouse=True)
def _forget(shared: Quire) -> None:
    """No test hits what another one cached, or is bound by its quotas."""
    with PoolController(shared.addresses["memory"]) as controller:
        for tenant in ("red", "blue"):
            controller.set_quota(tenant, soft_blocks=None, hard_blocks=None)
            controller.flush(tenant=tenant)


def client_of(quire: Quire, tenant: str) -> Client:
    return Client(quire.addresses["router"], metadata=((GATEWAY_KEY, tenant),))


def run_curl(
    quire: Quire, method: str, data: dict[str, Any], caller: str | None
) -> subprocess.CompletedProcess[str]:
    path = quire.addresses["memory"].removeprefix("unix:")
    headers = [] if caller is None else ["--header", f"quire-tenant: {caller}"]
    address = f"http://localhost/quire.memory.v1.{SERVICES[method]}/{method}"
    command = ["curl", "--protocol", "grpc", "--http2-prior-knowledge", "--unix-socket", path]
    return subprocess.run(
        [str(BUF), *command, *headers, "--data", json.dumps(data), address],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def curl(quire: Quire, method: str, caller: str | None = None, **data: Any) -> dict[str, Any]:
    """What the call answers to a tenant, as JSON."""
    done = run_curl(quire, method, data, caller)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def num_cached(client: Client, prompt: list[int]) -> int:
    """Tokens of a prompt that hit when it is asked for now."""
    answer = client.complete(prompt, max_tokens=1)
    return answer.completions[0].finished.usage.num_cached_tokens


def flood(quire: Quire, tenant: str, num_prompts: int = 40, first: int = 0) -> None:
    """Prompts of six blocks that share nothing: more than the pool holds."""
    with client_of(quire, tenant) as client, ThreadPoolExecutor(4) as pool:
        prompts = [
            [400 + each % 90, 401 + each // 90] * 48 for each in range(first, first + num_prompts)
        ]
        list(pool.map(lambda prompt: client.complete(prompt, max_tokens=1), prompts))


def test_every_call_is_a_line_of_curl(shared: Quire) -> None:
    """A sequence, its blocks, tenant, hits and retention, as a person with nothing but the protos sees them."""
    with client_of(shared, "red") as red:
        stream = red.generate(SYSTEM_PROMPT, max_tokens=400, ignore_eos=True, request_id="seen")
        next(stream)
        with suspended_compute(shared):  # the sequence lives until all was asked
            (listed,) = curl(shared, "ListSequences", requestId="seen")["sequences"]
            assert (listed["tenant"], listed["ageSeconds"] >= 0) == ("red", True)
            sequence = curl(shared, "GetSequence", sequenceId=listed["sequenceId"])
            table = sequence["blockTable"]
            assert len(table[0]["blockHash"]) == 32
            assert table[0]["sealed"]
            first = curl(shared, "GetBlock", blockId=table[0]["blockId"])
            assert first["block"]["state"] == "BLOCK_STATE_USED"
            assert [found["sequenceId"] for found in first["holders"]] == [listed["sequenceId"]]
            used = curl(
                shared, "ListBlocks", state="BLOCK_STATE_USED", sequenceId=listed["sequenceId"]
            )
            assert used["numMatches"] >= len(table)
            retained = curl(
                shared,
                "Retain",
                "red",
                sequenceId=listed["sequenceId"],
                priority=4,
                timeToLive="60s",
            )
            assert retained["verdict"] == "VERDICT_ACCEPTED"
            pool = curl(shared, "GetPool")
            assert pool["numRetainedBlocks"] >= 4
            assert pool["writerAlive"]
            assert pool["epoch"]
            slots = [
                int(pool.get(f"num{kind}Slots", 0)) for kind in ("Token", "Reserved", "Unused")
            ]
            assert sum(slots) % pool["blockSize"] == 0
            assert min(slots) >= 0
        red.abort("seen")
        list(stream)
    probe = curl(shared, "ProbePrefix", "red", tokenIds=[*SYSTEM_PROMPT, 7])
    assert (probe["numCachedTokens"], probe["numSharedTokens"]) == (64, 64)
    assert "numCachedTokens" not in curl(shared, "ProbePrefix", tokenIds=[*SYSTEM_PROMPT, 7])
    (retention,) = curl(shared, "ListRetentions")["retentions"]
    assert (retention["retentionId"], retention["tenant"]) == (retained["retentionId"], "red")
    released = curl(shared, "Release", "red", retentionId=retention["retentionId"])
    assert released["verdict"] == "VERDICT_ACCEPTED"
    quota = curl(shared, "SetQuota", tenant="blue", softQuotaBlocks=0, hardQuotaBlocks=9)["tenant"]
    assert quota == {"tenant": "blue", "softQuotaBlocks": 0, "hardQuotaBlocks": 9}
    assert [found["tenant"] for found in curl(shared, "ListTenants")["tenants"]] == ["blue", "red"]
    published = curl(shared, "PublishPrefix", tokenIds=SYSTEM_PROMPT)
    assert published == {
        "verdict": "VERDICT_ACCEPTED",
        "prefixId": "p-1",
        "numTokens": 64,
        "revision": published["revision"],
    }
    assert curl(shared, "WithdrawPrefix", prefixId="p-1")["verdict"] == "VERDICT_ACCEPTED"
    assert curl(shared, "Flush", "red")["numFreedBlocks"] >= 4
    assert curl(shared, "Flush", "red")["verdict"] == "VERDICT_REJECTED"
    assert "findings" not in curl(shared, "CheckIntegrity")
    assert_pool_is_idle(shared)


def test_what_is_wrong_is_said_in_a_line(shared: Quire) -> None:
    """A code, the field and what to do; a block that is not there is told apart from a field that is wrong."""
    with client_of(shared, "red") as red:
        num_cached(red, SYSTEM_PROMPT)
    wrong = run_curl(shared, "Retain", {"priority": 9}, "red").stderr
    assert json.loads(wrong)["code"] == "invalid_argument"
    assert "priority: is not from 1 to 7" in wrong
    missing = run_curl(shared, "GetBlock", {"blockId": 100_000}, None).stderr
    assert json.loads(missing)["code"] == "not_found"


def test_a_retained_prefix_survives_a_flood(shared: Quire) -> None:
    """Prompts of another tenant that fill the pool several times evict what is not retained, and leave what is."""
    other = [token + 1000 for token in SYSTEM_PROMPT]
    with (
        client_of(shared, "red") as red,
        PoolController(shared.addresses["memory"]) as controller,
        PoolInspector(shared.addresses["memory"]) as inspector,
    ):
        for prompt in (SYSTEM_PROMPT, other):
            num_cached(red, prompt)
        wish = controller.retain(token_ids=SYSTEM_PROMPT, priority=2, tenant="red")
        assert (wish.verdict, wish.num_blocks) == (1, 4)
        flood(shared, "blue")
        assert int(inspector.get_pool().num_evictions) > 20
        assert inspector.probe_prefix([*SYSTEM_PROMPT, 1], tenant="red").num_cached_tokens == 64
        assert inspector.probe_prefix([*other, 1], tenant="red").num_cached_tokens == 0
        assert num_cached(red, [*SYSTEM_PROMPT, 1]) == 64
        assert controller.release(wish.retention_id, tenant="red").verdict == 1
        flood(shared, "blue", first=40)
        assert inspector.probe_prefix([*SYSTEM_PROMPT, 1], tenant="red").num_cached_tokens == 0
        assert inspector.check_integrity() == []


def test_a_soft_quota_makes_a_flood_evict_its_own(shared: Quire) -> None:
    """Set while the system runs: whoever is above its share gives its own blocks, and the others' prefixes stay."""
    with (
        client_of(shared, "red") as red,
        PoolController(shared.addresses["memory"]) as controller,
        PoolInspector(shared.addresses["memory"]) as inspector,
    ):
        num_cached(red, SYSTEM_PROMPT)
        controller.set_quota("blue", soft_blocks=8, hard_blocks=None)
        flood(shared, "blue")
        assert inspector.probe_prefix([*SYSTEM_PROMPT, 1], tenant="red").num_cached_tokens == 64
        (blue,) = inspector.list_tenants(tenant="blue").tenants
        assert blue.num_blocks > 8
        controller.set_quota("blue", soft_blocks=None, hard_blocks=None)
        flood(shared, "blue", first=40)
        assert inspector.probe_prefix([*SYSTEM_PROMPT, 1], tenant="red").num_cached_tokens == 0


def test_a_hard_quota_is_never_exceeded(shared: Quire) -> None:
    """However many prompts a bounded tenant sends at once, it never holds more; all of them are answered."""
    with PoolController(shared.addresses["memory"]) as controller:
        controller.set_quota("blue", soft_blocks=None, hard_blocks=16)
        with (
            ThreadPoolExecutor(1) as beside,
            PoolInspector(shared.addresses["memory"]) as inspector,
        ):
            flooding = beside.submit(flood, shared, "blue", 20)
            most = 0
            while not flooding.done():
                found = inspector.list_tenants(tenant="blue").tenants
                most = max([most, *(each.num_blocks for each in found)])
            flooding.result()
            assert 6 <= most <= 16
            assert inspector.check_integrity() == []
