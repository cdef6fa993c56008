"""What people see of real processes: the mirrored pool, `quire top`, `quire inspect` and `quire control`."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeAlias

import pytest
from pools import folder_on_tmpfs
from processes import (
    QUIRE,
    assert_pool_is_idle,
    children_of,
    running_quire,
    suspended_compute,
)
from terminals import on_a_terminal

from quire import demo_model
from quire.cli.control import control
from quire.cli.inspect import inspect
from quire.client import Client, PoolInspector, Watching

if TYPE_CHECKING:
    from collections.abc import Callable

    from processes import Quire

    from quire.client import MirrorView

    Run: TypeAlias = Callable[..., tuple[int, str]]

FLAGS = ("--memory-budget", "4MiB", "--max-model-len", "1024", "--log-level", "error")
PROMPT = "def f(x):\n    return x\n" * 8


def until(holds: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def run(quire: Quire, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command, within this process so that a request lives longer than ten questions take."""

    def call(command: Callable[[list[str]], int], *arguments: str) -> tuple[int, str]:
        status = command([*arguments, "--router-address", quire.addresses["router"]])
        return status, capsys.readouterr().out

    return call


def complete_several(address: str) -> None:
    """Prompts with a common beginning, samples that fork, more than the pool holds without evictions."""
    with Client(address) as client, ThreadPoolExecutor(8) as threads:
        list(
            threads.map(
                lambda number: client.complete(
                    f"{PROMPT}{number}" * (1 + number % 3),
                    max_tokens=40,
                    num_samples=1 + number % 2,
                    ignore_eos=True,
                    timeout_s=240,
                ),
                range(24),
            )
        )


def latest(watching: Watching, inspector: PoolInspector) -> MirrorView:
    """The picture, once it has come to the revision that the service is at."""

    def is_there() -> bool:
        view = watching.look()
        return view is not None and view.revision == inspector.get_pool().revision

    until(is_there)
    view = watching.look()
    assert view is not None
    return view


def assert_shows_the_pool(view: MirrorView, inspector: PoolInspector) -> None:
    """State and reference count of every block, and the counts, are those that the service lists."""
    blocks, pool = list(inspector.list_blocks()), inspector.get_pool()
    assert view.states.tolist() == [block.state for block in blocks]
    assert view.ref_counts.tolist() == [block.ref_count for block in blocks]
    assert view.counts.num_free_blocks == pool.num_free_blocks
    assert view.counts.num_evictions == int(pool.num_evictions)
    assert (view.epoch, view.block_size) == (pool.epoch, pool.block_size)


def test_the_mirror_follows_a_loaded_pool(quire: Quire) -> None:
    """After forks, shared prefixes and evictions it shows every block as the service does, without a new snapshot."""
    with PoolInspector(quire.addresses["memory"]) as inspector, Watching(inspector) as watching:
        until(lambda: watching.look() is not None)
        complete_several(quire.addresses["router"])
        assert_pool_is_idle(quire)
        view = latest(watching, inspector)
        assert watching.num_missed == 0
        assert view.sequences == {}
        assert_shows_the_pool(view, inspector)


def test_a_resumed_watch_is_taken_on_at_once(quire: Quire) -> None:
    """On an idle pool nothing is sent, and still the caller learns that somebody is there."""
    with PoolInspector(quire.addresses["memory"]) as inspector, ThreadPoolExecutor(1) as thread:
        with inspector.watch() as answers:
            token = next(answer.resume_token for answer in answers if answer.resume_token)
        with inspector.watch(resume_token=token) as answers:
            assert thread.submit(answers.wait_until_accepted).result(timeout=20)


def test_top_lives_through_a_killed_memory_service() -> None:
    """`quire top` says that it is away, then shows the recovered pool; so does the mirror, block by block."""
    with (
        folder_on_tmpfs() as state_dir,
        running_quire(demo_model.path(), *FLAGS, "--state-dir", str(state_dir)) as quire,
        PoolInspector(quire.addresses["memory"]) as inspector,
        Watching(inspector) as watching,
    ):
        memory = ("--memory-address", quire.addresses["memory"])
        command = [QUIRE, "top", "--interval-s", "0.05", *memory]
        with on_a_terminal(command, width=100) as terminal:
            terminal.wait_for("\x1b[32mup")
            with Client(quire.addresses["router"]) as client:
                client.complete(PROMPT, max_tokens=20, timeout_s=120)
            until(lambda: watching.look() is not None)
            children_of(quire)["memory_service"].kill()
            terminal.wait_for("memory service away for")
            terminal.wait_for("\x1b[32mup")
            terminal.type("q")
            assert terminal.end() == 0
        until(lambda: watching.link.is_up)
        view = latest(watching, inspector)
        assert view.counts.num_cached_blocks > 0
        assert_shows_the_pool(view, inspector)


@pytest.mark.parametrize("output", ["table", "json"])
def test_every_question_has_an_answer(output: str, quire: Quire, run: Run) -> None:
    """Each subcommand of `quire inspect` while a request runs; the router turns `--text` into tokens."""
    is_json, sequence = output == "json", f"{output}/0"
    with (
        Client(quire.addresses["router"]) as client,
        client.generate(PROMPT, max_tokens=800, ignore_eos=True, request_id=output) as live,
        PoolInspector(quire.addresses["memory"]) as inspector,
    ):
        next(live)
        with suspended_compute(quire):
            block_id = str(inspector.get_sequence(sequence).block_table[0].block_id)
            for arguments, expected in (
                (("pool",), "blockSize" if is_json else "hit rate"),
                (("sequences", "--request", output), sequence),
                (("sequence", sequence), sequence),
                (("blocks", "--sequence", sequence), "sealed"),
                (("block", block_id), sequence),
                (("tenants",), "numSequences" if is_json else "sequences"),
                (("retentions",), "revision" if is_json else "nothing is retained"),
                (("probe", "--text", PROMPT), "numCachedTokens" if is_json else "would hit"),
                (("explain", "--sequence", sequence), "ADMITTED" if is_json else "admitted"),
                (("integrity",), '{"findings": []}' if is_json else "agree"),
            ):
                status, told = run(inspect, *arguments, "--output", output)
                assert (status, expected in told) == (0, True), (arguments, told)


def test_what_was_probed_hits(quire: Quire, run: Run) -> None:
    """After a completion nearly all of its prompt would hit; after a flush nothing would."""
    prompt = PROMPT + "# what was probed"
    with Client(quire.addresses["router"]) as client:
        client.complete(prompt, max_tokens=2, timeout_s=120)
        num_tokens = len(client.tokenize(prompt))
    assert_pool_is_idle(quire)

    def probe() -> dict[str, int]:
        found = json.loads(run(inspect, "probe", "--text", prompt, "--output", "json")[1])
        assert isinstance(found, dict)
        return found

    assert probe()["numSharedTokens"] >= num_tokens - 32
    status, told = run(control, "flush", "--all")
    assert (status, told[:10]) == (0, "accepted; ")
    assert "numCachedTokens" not in probe()
    status, told = run(control, "flush", "--all")
    assert (status, told[:10]) == (1, "rejected; ")


def test_wishes_change_what_is_seen(quire: Quire, run: Run) -> None:
    """A quota, a retention and a published prefix show up in `quire inspect`, and go again."""
    status, told = run(control, "quota", "seen", "--soft", "3", "--hard", "9")
    assert (status, told) == (0, "seen: soft quota 3, hard quota 9, holds 0 blocks\n")
    assert "seen" in run(inspect, "tenants")[1]
    assert run(control, "quota", "seen", "--none")[0] == 0
    assert "seen" not in run(inspect, "tenants")[1]
    with Client(quire.addresses["router"]) as client:
        client.complete(PROMPT, max_tokens=2, timeout_s=120)
    flags = ("--text", PROMPT, "--output", "json")
    retention = json.loads(run(control, "retain", "--priority", "4", *flags)[1])["retentionId"]
    prefix = json.loads(run(control, "publish", *flags)[1])["prefixId"]
    seen = run(inspect, "retentions")[1]
    assert retention in seen
    assert prefix in seen
    assert run(control, "release", retention) == (0, "accepted\n")
    assert run(control, "withdraw", prefix) == (0, "accepted\n")
    assert run(inspect, "retentions")[1] == "nothing is retained\nno prefix is published\n"
    assert run(control, "release", retention)[0] == 1
