"""`quire inspect` and `quire control` against a server whose answers are known."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from concurrent import futures
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from naive_pool import NaivePool, NaiveSequence
from processes import QUIRE
from scripted_memory import ScriptedMemory, serving

from protos.memory.v1 import control_pb2
from protos.memory.v1 import inspection_pb2 as pb
from protos.router.v1 import router_pb2, router_pb2_grpc
from quire.cli.control import control
from quire.cli.inspect import inspect
from quire.errors import BlockNotFound

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from google.protobuf.message import Message

POOL = pb.GetPoolResponse(
    revision="42",
    pool_id="p1",
    epoch="7",
    block_size=16,
    num_blocks=100,
    num_free_blocks=60,
    num_cached_blocks=19,
    num_used_blocks=20,
    num_shared_blocks=5,
    size_mib=4,
    block_mib=0.04,
    num_sequences=3,
    num_sessions=1,
    num_prefix_query_tokens="1000",
    num_prefix_hit_tokens="640",
    hit_rate=0.64,
    num_token_slots="300",  # noqa: S106 -- of the cache
    num_reserved_slots="6",
    num_unused_slots="14",
    num_retained_blocks=8,
    num_partial_hit_tokens="11",
    num_deduplicated_blocks="2",
    durable=True,
    log_mib=1.5,
    placement="shared_memory",
    writer_generation="3",
    writer_alive=True,
    known_costs=["One table serves all layers."],
)
LONG_ID = "r" * 250 + "/0"
SEQUENCE = pb.Sequence(
    sequence_id=LONG_ID, request_id="[/red]\x1b[2J", tenant="red", num_blocks=2, age_seconds=1.25
)
BLOCK = pb.Block(block_id=5, state=pb.BLOCK_STATE_CACHED, sealed=True, block_hash="ab" * 16)


@pytest.fixture
def memory(address: str) -> Iterator[ScriptedMemory]:
    found = ScriptedMemory()
    with serving(found, address):
        yield found


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/memory.sock"


def ask(address: str, *arguments: str) -> int:
    return inspect([*arguments, "--memory-address", address])


def wish(address: str, *arguments: str) -> int:
    return control([*arguments, "--memory-address", address])


@pytest.mark.parametrize(
    ("arguments", "method", "answer", "expected"),
    [
        (("pool",), "GetPool", POOL, ["64.0 %", "14 unused (4.4 % waste)", "8 blocks", "epoch 7"]),
        (("pool",), "GetPool", POOL, ["survives a restart", "known cost: One table serves"]),
        (
            ("sequences",),
            "ListSequences",
            pb.ListSequencesResponse(sequences=[SEQUENCE]),
            [LONG_ID, "red", "1.2", "age_seconds"],
        ),
        (
            ("sequence", "a/0"),
            "GetSequence",
            pb.GetSequenceResponse(sequence=SEQUENCE, block_table=[pb.TableEntry(block_id=77)]),
            [LONG_ID, "ref_count", "77", "no"],
        ),
        (
            ("blocks", "--state", "cached"),
            "ListBlocks",
            pb.ListBlocksResponse(blocks=[BLOCK]),
            ["cached", "ab" * 16, "yes", "idle_seconds"],
        ),
        (
            ("block", "5"),
            "GetBlock",
            pb.GetBlockResponse(block=BLOCK, holders=[pb.BlockHolder(sequence_id="b/1", index=4)]),
            ["cached", "b/1", "4"],
        ),
        (("block", "5"), "GetBlock", pb.GetBlockResponse(block=BLOCK), ["no sequence holds it"]),
        (
            ("tenants",),
            "ListTenants",
            pb.ListTenantsResponse(tenants=[pb.Tenant(tenant="red", hard_quota_blocks=9)]),
            ["red", "soft_quota_blocks", "9"],
        ),
        (
            ("retentions",),
            "ListRetentions",
            pb.ListRetentionsResponse(
                retentions=[
                    pb.Retention(retention_id="r1", priority=3, expire_time={"seconds": 60})
                ],
                published_prefixes=[pb.PublishedPrefix(prefix_id="x1", num_tokens=64)],
            ),
            ["r1", "1970-01-01 00:01:00Z", "x1", "64"],
        ),
        (
            ("retentions",),
            "ListRetentions",
            pb.ListRetentionsResponse(),
            ["nothing is retained", "no prefix is published"],
        ),
        (
            ("probe", "--tokens", "1,2,3"),
            "ProbePrefix",
            pb.ProbePrefixResponse(
                num_cached_tokens=2, num_shared_tokens=1, num_in_progress_tokens=9
            ),
            ["2 of 3 tokens would hit: 1 in shared blocks, 1 by a copy", "9 tokens behind them"],
        ),
        (
            ("explain", "--block", "5"),
            "Explain",
            pb.ExplainResponse(
                explanations=[
                    pb.Explanation(
                        kind=pb.DECISION_KIND_EVICTED, reason="it was the oldest", num_times="12"
                    )
                ]
            ),
            ["evicted", "it was the oldest", "12"],
        ),
        (
            ("explain", "--sequence", "a/0"),
            "Explain",
            pb.ExplainResponse(),
            ["no decision about it is remembered"],
        ),
        (
            ("integrity",),
            "CheckIntegrity",
            pb.CheckIntegrityResponse(),
            ["the pool's books agree"],
        ),
    ],
)
def test_answers_are_told_to_people(
    arguments: tuple[str, ...],
    method: str,
    answer: Message,
    expected: list[str],
    memory: ScriptedMemory,
    address: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is cut to a width in a pipe, and a name that somebody chose is neither markup nor a control sequence."""
    memory.answers[method] = [answer]
    assert ask(address, *arguments) == 0
    told = capsys.readouterr().out
    for words in expected:
        assert words in told
    assert "\x1b" not in told
    if method == "ListSequences":
        assert "[/red]\N{REPLACEMENT CHARACTER}[2J" in told


@pytest.mark.parametrize(
    ("arguments", "method", "answer", "expected"),
    [
        (("pool",), "GetPool", POOL, [{"revision": "42", "durable": True, "logMib": 1.5}]),
        (
            ("blocks",),
            "ListBlocks",
            pb.ListBlocksResponse(blocks=[BLOCK, pb.Block(block_id=6)]),
            [{"blockId": 5, "state": "BLOCK_STATE_CACHED"}, {"blockId": 6}],
        ),
        (
            ("tenants",),
            "ListTenants",
            pb.ListTenantsResponse(revision="3", tenants=[pb.Tenant(tenant="red")]),
            [{"revision": "3", "tenants": [{"tenant": "red"}]}],
        ),
        (
            ("integrity",),
            "CheckIntegrity",
            pb.CheckIntegrityResponse(),
            [{"findings": []}],
        ),
    ],
)
def test_answers_are_told_to_machines(
    arguments: tuple[str, ...],
    method: str,
    answer: Message,
    expected: list[dict[str, object]],
    memory: ScriptedMemory,
    address: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One JSON document a line with grpcurl's names; a list that comes in pages is a line for each of its entries."""
    memory.answers[method] = [answer]
    assert ask(address, *arguments, "--output", "json") == 0
    documents = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [found | wanted for found, wanted in zip(documents, expected, strict=True)] == documents


def test_filters_and_tenant_are_sent(memory: ScriptedMemory, address: str) -> None:
    """Each flag of `blocks` is a field of the request."""
    memory.answers["ListBlocks"] = [pb.ListBlocksResponse()]
    flags = (
        "--state used --min-ref-count 2 --hash-prefix ab --sequence a/0 --retained --min-idle-s 3"
    )
    assert ask(address, "blocks", *flags.split(), "--tenant", "red") == 0
    request = pb.ListBlocksRequest(
        page_size=1000,
        state=pb.BLOCK_STATE_USED,
        min_ref_count=2,
        block_hash_prefix="ab",
        sequence_id="a/0",
        retained=True,
        min_idle_seconds=3,
    )
    assert memory.asked("ListBlocks") == [(request, {"quire-tenant": "red"})]


def test_findings_are_a_failure(
    memory: ScriptedMemory, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`integrity` prints each finding and ends with status 1."""
    memory.answers["CheckIntegrity"] = [pb.CheckIntegrityResponse(findings=["one", "two"])]
    assert ask(address, "integrity") == 1
    assert capsys.readouterr().out == "one\ntwo\n"


def test_a_refusal_is_one_line(
    memory: ScriptedMemory, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the service says, on stderr, status 1."""
    memory.answers["GetBlock"] = [BlockNotFound("no block has the id 9")]
    assert ask(address, "block", "9") == 1
    assert capsys.readouterr() == ("", "error: no block has the id 9\n")


def test_a_router_that_is_away_is_named(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--text` needs the router: the line names its address and its flag."""
    with pytest.raises(SystemExit, match="1"):
        ask(address, "probe", "--text", "x", "--router-address", "127.0.0.1:1")
    error = capsys.readouterr().err
    assert "nothing answers on 127.0.0.1:1" in error
    assert "--router-address names another" in error


class Router(router_pb2_grpc.RouterServiceServicer):
    """Turns any text into three tokens, and notes who asked."""

    def __init__(self) -> None:
        self.authorizations: list[str] = []

    def Tokenize(self, request: Any, context: grpc.ServicerContext) -> router_pb2.TokenizeResponse:
        metadata = dict(context.invocation_metadata())
        self.authorizations.append(str(metadata.get("authorization")))
        return router_pb2.TokenizeResponse(token_ids=[4, 5, 6])


def test_text_becomes_tokens_at_the_router(
    memory: ScriptedMemory, address: str, tmp_path: Path
) -> None:
    """`--text` is asked about with `--token`; what the router makes of it is probed."""
    memory.answers["ProbePrefix"] = [pb.ProbePrefixResponse()]
    router, server = Router(), grpc.server(futures.ThreadPoolExecutor(2))
    router_pb2_grpc.add_RouterServiceServicer_to_server(router, server)
    server.add_insecure_port(f"unix:{tmp_path}/router.sock")
    server.start()
    try:
        flags = (
            "--text",
            "x",
            "--token",
            "mine",
            "--router-address",
            f"unix:{tmp_path}/router.sock",
        )
        assert ask(address, "probe", *flags) == 0
    finally:
        server.stop(None).wait()
    assert router.authorizations == ["Bearer mine"]
    assert memory.asked("ProbePrefix")[0][0] == pb.ProbePrefixRequest(token_ids=[4, 5, 6])


def test_a_reader_that_has_enough_is_no_failure(memory: ScriptedMemory, address: str) -> None:
    """`quire inspect blocks | head` ends without a word."""
    blocks = [BLOCK] * 20_000
    memory.answers["ListBlocks"] = [pb.ListBlocksResponse(blocks=blocks)]
    command = f"{QUIRE} inspect blocks --output json --memory-address {address} | head -n 1"
    ended = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(ended.stdout)["blockId"] == 5


@pytest.mark.parametrize("output", ["table", "json"])
def test_a_watch_prints_changes_until_ctrl_c(
    output: str, memory: ScriptedMemory, address: str
) -> None:
    """A line for each change and each whole snapshot; Ctrl-C ends it well."""
    pool = NaivePool(9)
    for answer in pool.snapshot(1 if output == "json" else 3):
        memory.changes.put(answer)
    before = pool.copy()
    pool.revision = 1
    pool.sequences["s", 0] = NaiveSequence("a/0", "", [1, 2], 0)
    memory.changes.put(pool.change_since(before, "s", 5))
    command = [QUIRE, "inspect", "watch", "--output", output, "--memory-address", address]
    process = subprocess.Popen(
        [*command, "--resume-token", "t"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    first, second = process.stdout.readline(), process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, error = process.communicate(timeout=30)
    assert (process.returncode, rest, error) == (0, "", "")
    if output == "json":
        assert json.loads(first)["snapshot"]["last"] is True
        assert json.loads(second)["delta"]["step"] == "5"
    else:
        assert first == "0  snapshot of 9 blocks and 0 sequences; 8 free, 0 cached, 0 used\n"
        assert second == (
            "1  step 5; a/0 started with 2 blocks; 2 blocks changed; 6 free, 0 cached, 2 used\n"
        )
    assert memory.asked("Watch") == [(pb.WatchRequest(resume_token="t"), {})]  # noqa: S106 -- of a stream


def test_a_watch_whose_service_ends_is_a_failure(
    memory: ScriptedMemory, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody waits for changes that cannot come."""
    memory.changes.put(BlockNotFound("stands for any error"))
    assert ask(address, "watch") == 1
    assert capsys.readouterr().err == "error: stands for any error\n"


@pytest.mark.parametrize(
    ("arguments", "method", "request_", "answer", "told", "status"),
    [
        (
            ("quota", "red", "--hard", "100"),
            "SetQuota",
            control_pb2.SetQuotaRequest(tenant="red", hard_quota_blocks=100),
            control_pb2.SetQuotaResponse(
                tenant=pb.Tenant(tenant="red", num_blocks=12, hard_quota_blocks=100)
            ),
            "red: soft quota none, hard quota 100, holds 12 blocks",
            0,
        ),
        (
            ("quota", "--none"),
            "SetQuota",
            control_pb2.SetQuotaRequest(),
            control_pb2.SetQuotaResponse(tenant=pb.Tenant()),
            "the tenant of all who have none: soft quota none, hard quota none, holds 0 blocks",
            0,
        ),
        (
            ("retain", "--sequence", "a/0", "--priority", "5", "--ttl-s", "60"),
            "Retain",
            control_pb2.RetainRequest(sequence_id="a/0", priority=5, time_to_live={"seconds": 60}),
            control_pb2.RetainResponse(
                verdict=control_pb2.VERDICT_ACCEPTED,
                retention_id="r1",
                num_blocks=4,
                expire_time={"seconds": 60},
            ),
            "accepted; retention r1 of 4 blocks, ends 1970-01-01 00:01:00Z",
            0,
        ),
        (
            ("retain", "--tokens", "1,2"),
            "Retain",
            control_pb2.RetainRequest(prefix={"token_ids": [1, 2]}, priority=1),
            control_pb2.RetainResponse(
                verdict=control_pb2.VERDICT_CLIPPED, reason="half", retention_id="r1", num_blocks=4
            ),
            "clipped; retention r1 of 4 blocks, ends with its release; half",
            0,
        ),
        (
            ("release", "r1"),
            "Release",
            control_pb2.ReleaseRequest(retention_id="r1"),
            control_pb2.ReleaseResponse(
                verdict=control_pb2.VERDICT_REJECTED, reason="there is no retention r1"
            ),
            "rejected; there is no retention r1",
            1,
        ),
        (
            ("flush", "--all"),
            "Flush",
            control_pb2.FlushRequest(),
            control_pb2.FlushResponse(
                verdict=control_pb2.VERDICT_ACCEPTED, num_freed_blocks=3, num_used_blocks=1
            ),
            "accepted; 3 blocks are free now, 1 in use are forgotten",
            0,
        ),
        (
            ("publish", "--tokens", "7,8"),
            "PublishPrefix",
            control_pb2.PublishPrefixRequest(token_ids=[7, 8]),
            control_pb2.PublishPrefixResponse(
                verdict=control_pb2.VERDICT_ACCEPTED, prefix_id="x1", num_tokens=2
            ),
            "accepted; prefix x1 of 2 tokens is shared",
            0,
        ),
        (
            ("withdraw", "x1"),
            "WithdrawPrefix",
            control_pb2.WithdrawPrefixRequest(prefix_id="x1"),
            control_pb2.WithdrawPrefixResponse(verdict=control_pb2.VERDICT_ACCEPTED),
            "accepted",
            0,
        ),
    ],
)
def test_a_wish_is_answered_in_a_line(
    arguments: tuple[str, ...],
    method: str,
    request_: Message,
    answer: Message,
    told: str,
    status: int,
    memory: ScriptedMemory,
    address: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The verdict, what holds now, and why not more; status 1 when nothing was done."""
    memory.answers[method] = [answer]
    assert wish(address, *arguments) == status
    assert capsys.readouterr() == (f"{told}\n", "")
    assert memory.asked(method)[0][0] == request_
    assert wish(address, *arguments, "--output", "json") == status
    assert json.loads(capsys.readouterr().out) is not None


def test_a_wish_is_for_a_tenant(memory: ScriptedMemory, address: str) -> None:
    """`--tenant` goes with the call."""
    memory.answers["Flush"] = [control_pb2.FlushResponse(verdict=control_pb2.VERDICT_ACCEPTED)]
    assert wish(address, "flush", "--all", "--tenant", "red") == 0
    assert memory.asked("Flush")[0][1] == {"quire-tenant": "red"}


def test_an_empty_prompt_flushes_nothing(
    memory: ScriptedMemory, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only `--all` forgets everything: a variable that is empty is no prompt."""
    assert wish(address, "flush", "--tokens", os.environ.get("NOT_SET", "")) == 2
    assert "--all" in capsys.readouterr().err
    assert memory.calls == []
