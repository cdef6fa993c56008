"""`quire replay`: the pool of then, as its answers told it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from processes import QUIRE
from state_folders import drive, open_store, three_logs

from memory_service import replay
from memory_service.compaction import write_snapshot

if TYPE_CHECKING:
    from pathlib import Path

Told = list[tuple[int, int, dict[tuple[int, int], tuple[int, ...]]]]


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Told]:
    """A folder with one log, and what the answers told at each revision."""
    path = tmp_path_factory.mktemp("state")
    return path, drive(path, 3, 60)


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Any:
    """Calls the command; its lines of JSON."""

    def ask(*arguments: object) -> list[dict[str, Any]]:
        assert replay.main([*map(str, arguments), "--output", "json"]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return ask


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 1) -> str:
    """The one line of an error."""
    assert replay.main(list(map(str, arguments))) == status
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    return output.err


def test_tables_are_those_that_were_told(driven: tuple[Path, Told], ask: Any) -> None:
    """At every revision each sequence has the block table that the answers told until then."""
    path, told = driven
    at = {revision: tables for _, revision, tables in told}
    for revision in sorted(at)[::7]:
        found = {}
        for sequence in ask(path, "sequences", "--revision", revision):
            name = sequence["sequenceId"]
            (answer,) = ask(path, "sequence", name, "--revision", revision)
            assert answer["revision"] == str(revision)
            key = int(sequence["sessionId"].removeprefix("router-"))
            table = tuple(entry["blockId"] for entry in answer["blockTable"])
            found[key, sequence.get("row", 0)] = table
        assert found == at[revision]


def test_pool_counts_its_blocks(driven: tuple[Path, Told], ask: Any) -> None:
    """The counts of the pool are those of its blocks, at any revision."""
    path, told = driven
    for revision in (1, 20, told[-1][1]):
        (pool,) = ask(path, "pool", "--revision", revision)
        blocks = ask(path, "blocks", "--revision", revision)
        assert pool["revision"] == str(revision)
        assert pool["durable"]
        for state in ("FREE", "CACHED", "USED"):
            counted = sum(block["state"] == f"BLOCK_STATE_{state}" for block in blocks)
            assert pool.get(f"num{state.capitalize()}Blocks", 0) == counted
        assert int(pool.get("numReservedSlots", 0)) >= 0


def test_last_revision_is_shown_without_asking(driven: tuple[Path, Told], ask: Any) -> None:
    """Without `--revision` it is the last one; the folder may belong to a service that runs."""
    path, told = driven
    with closing(open_store(path)):
        (pool,) = ask(path)
    assert pool["revision"] == str(told[-1][1])


def test_records_are_listed(driven: tuple[Path, Told], ask: Any) -> None:
    """Each change has a line with its revision and kind, up to the revision that was asked for."""
    path, told = driven
    records = ask(path, "records")
    assert [record["revision"] for record in records] == [str(1 + n) for n in range(told[-1][1])]
    assert records[0]["kind"] == "session_opened"
    assert records[0]["summary"] == "session 1, router-1: generation 1, 6 rows"
    assert {"step_applied", "quota_set", "prefix_published"} <= {found["kind"] for found in records}
    assert ask(path / "log-0.quire", "records", "--revision", 5) == records[:5]


def test_records_read_well(driven: tuple[Path, Told], capsys: pytest.CaptureFixture[str]) -> None:
    """For people a line has revision, time, kind and what changed."""
    path, _ = driven
    assert replay.main([str(path), "records", "--revision", "3"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r" {7}3  \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}Z  step_applied      session 1, step 2: "
        r"acknowledges 1, 1 committed, .*, 2 admitted \(s4 s5\)",
        line,
    )


def test_log_that_was_taken_elsewhere(driven: tuple[Path, Told], tmp_path: Path, ask: Any) -> None:
    """The first log of a pool needs nothing beside it, not even its name."""
    path, told = driven
    shutil.copy(path / "log-0.quire", tmp_path / "evidence")
    assert ask(tmp_path / "evidence", "sequences") == ask(path, "sequences")
    (pool,) = ask(tmp_path / "evidence")
    assert pool["revision"] == str(told[-1][1])


def test_one_log_of_several(tmp_path: Path, ask: Any) -> None:
    """A later log is shown from what is before it in its folder, up to its own end."""
    folder = three_logs(tmp_path)
    _, middle, last = folder.logs()
    assert ask(folder.log(middle))[0]["revision"] == str(last)
    assert ask(folder.log(middle), "blocks") == ask(tmp_path, "blocks", "--revision", last)


def test_past_before_the_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is older than the oldest snapshot that is kept is refused in one line."""
    folder = three_logs(tmp_path)
    last = folder.logs()[-1]
    write_snapshot(folder, last, folder.snapshot(last))
    folder.forget(0)
    line = refusal(capsys, tmp_path, "--revision", last - 1)
    assert line == f"error: {tmp_path} does not know revision {last - 1}; it begins at {last}\n"


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        (["--revision", "999"], 1, "ends at revision"),
        (["sequence", "nobody"], 1, "no sequence had the id 'nobody' at revision"),
        (["sequence"], 2, "`sequence` and only it takes a sequence id"),
        (["pool", "s1"], 2, "`sequence` and only it takes a sequence id"),
    ],
)
def test_what_is_not_there(
    driven: tuple[Path, Told],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    why: str,
) -> None:
    """A revision, a sequence or a word that is missing is told of in one line."""
    assert why in refusal(capsys, driven[0], *arguments, status=status)


def test_what_is_no_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An absent path, an empty folder and a file of something else are one line each."""
    (tmp_path / "file").write_text("this is no log, and longer than the header of a frame")
    (tmp_path / "empty").mkdir()
    assert "there is no log at" in refusal(capsys, tmp_path / "absent")
    assert "there is no log at" in refusal(capsys, tmp_path / "empty")
    assert "file is corrupt at byte 0: " in refusal(capsys, tmp_path / "file", "records")


def test_corrupt_log(driven: tuple[Path, Told], tmp_path: Path) -> None:
    """The process ends with status 1 and one line that names file and offset."""
    whole = bytearray((driven[0] / "log-0.quire").read_bytes())
    whole[-1] ^= 1
    (tmp_path / "log-0.quire").write_bytes(whole)
    done = subprocess.run(
        [QUIRE, "replay", str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"error: .*log-0\.quire is corrupt at byte \d+: .*\n", done.stderr)


def test_reader_who_has_enough(driven: tuple[Path, Told]) -> None:
    """`quire replay ... | head -1` prints one line and nothing on stderr."""
    done = subprocess.run(
        ["/bin/sh", "-c", '"$0" replay "$1" records | head -1', QUIRE, str(driven[0])],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.stdout.count("\n"), done.stderr) == (1, "")
