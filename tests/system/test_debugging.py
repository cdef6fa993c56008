"""The ten questions of docs/debugging.md, asked as written while the system is loaded and its services are killed."""

from __future__ import annotations

import json
import random
import re
import shlex
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
from grpcurl import as_buf_curl, run_buf
from pools import folder_on_tmpfs
from processes import assert_pool_is_idle, children_of, running_quire
from tiny_checkpoints import make_checkpoint

from protos.memory.v1 import inspection_pb2
from quire.client import Client

if TYPE_CHECKING:
    from collections.abc import Iterator

    from processes import Quire

DOC = (Path(__file__).parents[2] / "docs" / "debugging.md").read_text()
PREFIX = list(range(10, 58))  # three blocks that all requests share
FLAGS = (
    *("--memory-budget", "210KiB", "--max-model-len", "300", "--max-num-seqs", "8"),
    *("--dtype", "float32", "--tenant-metadata", "x-tenant"),
)
TENANTS = ("blue", "red")
SERVICES = ("memory_service", "compute_service")
NUM_CLIENTS = 10


class Load:
    """Clients that ask again and again, whatever happens; which sequences they had is known."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._stop = threading.Event()
        self.num_finished = 0
        self.sequence_ids: list[str] = []
        self._threads = [
            threading.Thread(target=self._run, args=(index,)) for index in range(NUM_CLIENTS)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self, index: int) -> None:
        chance = random.Random(index)  # noqa: S311 -- lengths of requests
        tenant = TENANTS[index % len(TENANTS)]
        with Client(self._address, metadata=(("x-tenant", tenant),)) as client:
            while not self._stop.is_set():
                request_id = f"load-{index}-{chance.randrange(1 << 30)}"
                self.sequence_ids.append(f"{request_id}/0@{tenant}")
                prompt = PREFIX + [chance.randrange(60, 250) for _ in range(chance.randrange(40))]
                client.complete(
                    prompt,
                    request_id=request_id,
                    max_tokens=chance.randrange(20, 120),
                    ignore_eos=True,
                )
                self.num_finished += 1


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Quire, Load]]:
    model = make_checkpoint(tmp_path_factory.mktemp("model"), "llama")
    with (
        folder_on_tmpfs() as state,
        running_quire(model, *FLAGS, "--state-dir", str(state)) as quire,
    ):
        with Load(quire.addresses["router"]) as load:
            yield quire, load
        assert_pool_is_idle(quire)


def question(number: int, line: int = 0) -> list[str]:
    """The words of a command of the document."""
    section = re.split(r"^## ", DOC, flags=re.MULTILINE)[number]
    command = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)[line]
    return shlex.split(command)


def ask(quire: Quire, words: list[str], **changes: Any) -> dict[str, Any]:
    """The answer to a line of the document, with these fields in place of its examples."""
    words = [word.replace("$MEMORY", quire.addresses["memory"][len("unix:") :]) for word in words]
    if changes:
        words[words.index("-d") + 1] = json.dumps(changes)
    return dict(json.loads(run_buf(as_buf_curl(words))))


def until(found: Any, seconds: float = 60.0) -> Any:
    """What `found` returns once that is something."""
    deadline = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return answer


def pool_of(quire: Quire) -> dict[str, Any] | None:
    """GetPool, unless the service is away just now."""
    try:
        return ask(quire, question(9))
    except AssertionError:
        return None


def decisions(quire: Quire, load: Load, kind: str) -> dict[str, Any] | None:
    """A decision of this kind about some sequence of the load."""
    for sequence_id in reversed(load.sequence_ids[-40:]):
        answer = ask(quire, question(2), sequence_id=sequence_id)
        for found in answer.get("explanations", []):
            if found["kind"] == f"DECISION_KIND_{kind}":
                return dict(found)
    return None


def test_who_holds_the_pool(loaded: tuple[Quire, Load]) -> None:
    """Sequences of the load, with their requests, tenants and blocks."""
    quire, load = loaded
    sequences = until(lambda: ask(quire, question(1)).get("sequences"))
    assert {found["sequenceId"] for found in sequences} <= set(load.sequence_ids)
    assert {found["tenant"] for found in sequences} <= set(TENANTS)
    assert all(found["numBlocks"] > 0 for found in sequences)


def test_why_a_request_waits(loaded: tuple[Quire, Load]) -> None:
    """The pool is too small for all: somebody was refused, and is told the numbers."""
    quire, load = loaded
    found = until(lambda: decisions(quire, load, "REFUSED"))
    assert found["reason"]


def test_why_a_stream_paused(loaded: tuple[Quire, Load]) -> None:
    """Somebody was preempted, and the reason says for what."""
    quire, load = loaded
    found = until(lambda: decisions(quire, load, "PREEMPTED"))
    assert re.search(r"\d", found["reason"])


def test_that_nothing_leaks(loaded: tuple[Quire, Load]) -> None:
    """No findings under load."""
    quire, _ = loaded
    assert ask(quire, question(4)).get("findings", []) == []


def test_who_shares_a_block(loaded: tuple[Quire, Load]) -> None:
    """A block that a sequence's table names has that sequence among its holders; the prefix has many."""
    quire, _ = loaded

    def shared() -> int:
        # Sequences are gone by the time that a command has started: these are asked within milliseconds.
        for sequence in quire.inspection.ListSequences(
            inspection_pb2.ListSequencesRequest()
        ).sequences:
            request = inspection_pb2.ListBlocksRequest(sequence_id=sequence.sequence_id)
            for block in quire.inspection.ListBlocks(request).blocks:
                found = quire.inspection.GetBlock(
                    inspection_pb2.GetBlockRequest(block_id=block.block_id)
                )
                holders = [holder.sequence_id for holder in found.holders]
                if sequence.sequence_id in holders and len(holders) > 1:
                    return int(block.block_id)
        return 0

    block_id = until(shared)

    def told() -> dict[str, Any] | None:
        answer = ask(quire, question(5), block_id=block_id)
        return answer if answer.get("holders") else None

    assert until(told)["block"]["state"] == "BLOCK_STATE_USED"


def test_what_would_hit(loaded: tuple[Quire, Load]) -> None:
    """The prefix that all requests of a tenant share, and nothing for a tenant that nobody knows."""
    quire, _ = loaded
    words = question(6)
    blue = [*words[:1], "-H", "quire-tenant: blue", *words[1:]]
    answer = until(lambda: ask(quire, blue, token_ids=[*PREFIX, 1]).get("numCachedTokens"))
    assert answer >= 16
    nobody = [*words[:1], "-H", "quire-tenant: nobody", *words[1:]]
    assert ask(quire, nobody, token_ids=[*PREFIX, 1]).get("numCachedTokens", 0) == 0


def test_who_took_a_block(loaded: tuple[Quire, Load]) -> None:
    """In so small a pool some block was evicted, and the reason is told."""
    quire, _ = loaded

    def evicted() -> dict[str, Any] | None:
        for block_id in range(1, 20):
            for found in ask(quire, question(7), block_id=block_id).get("explanations", []):
                if found["kind"] == "DECISION_KIND_EVICTED":
                    return dict(found)
        return None

    assert until(evicted)["reason"]


def test_what_a_tenant_holds(loaded: tuple[Quire, Load]) -> None:
    """Both tenants with what they hold; a quota shows from then on."""
    quire, _ = loaded
    until(
        lambda: (
            {found.get("tenant") for found in ask(quire, question(8)).get("tenants", [])}
            >= set(TENANTS)
        )
    )
    ask(quire, question(8, line=1))
    tenants = ask(quire, question(8))["tenants"]
    (blue,) = [found for found in tenants if found.get("tenant") == "blue"]
    assert blue["softQuotaBlocks"] == 40


@pytest.mark.parametrize("seed", range(1))
def test_what_is_left_after_a_kill(loaded: tuple[Quire, Load], seed: int) -> None:
    """Each of the two services, killed at a random moment: the same pool goes on, and so do the requests."""
    quire, load = loaded
    chance = random.Random(seed)  # noqa: S311 -- a moment
    for service in SERVICES:
        time.sleep(chance.random())
        kill_and_look(quire, load, service)


def kill_and_look(quire: Quire, load: Load, service: str) -> None:
    before = until(lambda: pool_of(quire))
    killed = until(lambda: children_of(quire).get(service))
    killed.kill()
    after = until(lambda: is_back(quire, service, killed.pid))
    assert (after["poolId"], after["epoch"]) == (before["poolId"], before["epoch"])
    assert int(after["revision"]) >= int(before["revision"])
    is_new = int(after["writerGeneration"]) > int(before["writerGeneration"])
    assert is_new == (service == "compute_service")
    num_finished = load.num_finished
    until(lambda: load.num_finished > num_finished + NUM_CLIENTS)
    assert ask(quire, question(4)).get("findings", []) == []


def is_back(quire: Quire, service: str, killed: int) -> dict[str, Any] | None:
    """The pool, once another process does the killed one's work."""
    process = children_of(quire).get(service)
    if process is None or process.pid == killed:
        return None
    pool = pool_of(quire)
    return pool if pool and pool.get("writerAlive") else None


def test_the_document_asks_ten_questions() -> None:
    """The tests above found what they are about."""
    assert len(re.findall(r"^## \d+\. ", DOC, re.MULTILINE)) == 10
