"""The commands that talk to running services."""

from __future__ import annotations

import json
import re
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from processes import QUIRE, suspended_compute

from protos.memory.v1 import inspection_pb2
from quire import __version__
from quire.client import Client

if TYPE_CHECKING:
    from processes import Quire


def run(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    command = [QUIRE, *arguments]
    return subprocess.run(
        command, input=given, capture_output=True, text=True, timeout=60, check=False
    )


def test_generate_prints_the_continuation(quire: Quire) -> None:
    """`quire generate` prints what the client gets, from an argument or from standard input."""
    router = quire.addresses["router"]
    flags = ("--router-address", router, "--temperature", "0", "--max-tokens", "12")
    with Client(router) as client:
        expected = client.complete("import os", temperature=0, max_tokens=12).completions[0].text
    assert run("generate", "import os", *flags).stdout == expected + "\n"
    assert run("generate", "-", *flags, given="import os").stdout == expected + "\n"


def test_generate_stops_before_a_stop_string(quire: Quire) -> None:
    """`--stop` may be repeated."""
    router = quire.addresses["router"]
    flags = ("--router-address", router, "--temperature", "0", "--max-tokens", "40")
    text = run("generate", "def f", *flags).stdout
    stopped = run("generate", "def f", *flags, "--stop", text[6:9], "--stop", "never there").stdout
    assert stopped == text[: text.index(text[6:9])] + "\n"


def test_chat_answers_until_an_empty_line(quire: Quire) -> None:
    """Two questions get two answers."""
    router = quire.addresses["router"]
    ended = run("chat", "--router-address", router, "--max-tokens", "3", given="hi\nwho\n\n")
    assert ended.returncode == 0
    assert ended.stdout.startswith("quire-demo; ")
    assert ended.stdout.count("> ") == 3


def test_inspect_shows_what_was_asked_for(quire: Quire) -> None:
    """Pool, sequences, a sequence with its table, integrity; as tables and as JSON; found by the router's address."""
    router = ("--router-address", quire.addresses["router"])
    with (
        Client(quire.addresses["router"]) as client,
        client.generate("x = 1\n" * 50, max_tokens=700, ignore_eos=True, request_id="me") as live,
    ):
        next(live)
        # The request must not end while slow commands look at it.
        with suspended_compute(quire):
            assert "free" in run("inspect", "pool", *router).stdout
            assert "me/0" in run("inspect", "sequences", *router).stdout
            shown = run("inspect", "sequence", "me/0", "--output", "json", *router).stdout
            table = json.loads(shown)
            assert table["sequence"]["requestId"] == "me"
            assert table["blockTable"][0]["sealed"] is True
            assert "ref_count" in run("inspect", "sequence", "me/0", *router).stdout
    assert run("inspect", "integrity", *router).stdout == "the pool's books agree\n"
    memory = ("--memory-address", quire.addresses["memory"])
    assert json.loads(run("inspect", "pool", "--output", "json", *memory).stdout)["blockSize"] == 16


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (("generate",), 2, "error: quire generate: the following arguments are required: PROMPT"),
        (("generate", "x", "--top-k", "a"), 2, "--top-k: Input should be a valid integer"),
        (("generate", "x", "--router-address", "127.0.0.1:1"), 1, "nothing answers on 127.0.0.1:1"),
        (("inspect", "sequence"), 2, "required: SEQUENCE-ID"),
        (("inspect", "pol"), 2, "there is no 'pol'; did you mean 'pool'?"),
        (("inspect",), 2, "the first word is one of pool, sequences, "),
        (("inspect", "pool", "--state", "free"), 2, "unknown flag --state"),
        (("inspect", "explain"), 2, "--sequence or --block"),
        (("inspect", "probe", "--text", "x", "--tokens", "1"), 2, "use one"),
        (("inspect", "probe", "--tokens", "1,x"), 2, "--tokens: "),
        (
            ("inspect", "pool", "--memory-address", "127.0.0.1:1"),
            1,
            "--memory-address names another",
        ),
        (("top", "--memory-address", "127.0.0.1:1"), 1, "nothing answers on 127.0.0.1:1"),
        (("control", "quota", "red"), 2, "give --soft, --hard or both"),
        (("control", "quota", "red", "--soft", "1", "--none"), 2, "give --soft, --hard or both"),
        (("control", "flush"), 2, "--all"),
        (("control", "retain", "--priority", "8", "--tokens", "1"), 2, "--priority: "),
        (("control", "release"), 2, "required: RETENTION-ID"),
        (("frobnicate",), 2, "unknown command 'frobnicate'"),
    ],
)
def test_a_wrong_command_is_one_clear_line(
    arguments: tuple[str, ...], status: int, expected: str
) -> None:
    """Status and one line on stderr."""
    ended = run(*arguments)
    assert (ended.returncode, ended.stdout) == (status, "")
    assert expected in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_refusal_of_the_service_is_one_clear_line(quire: Quire) -> None:
    """What the router refuses is told in its words."""
    router = ("--router-address", quire.addresses["router"])
    ended = run("generate", "x", "--top-p", "3", *router)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "error: sampling.top_p: is 3; must be above 0 to 1\n"


def test_an_answer_that_was_cut_off_is_no_success(quire: Quire) -> None:
    """When somebody aborts the request its text is printed, and then that it is not all."""
    router = quire.addresses["router"]
    command = [QUIRE, "generate", "def f", "--max-tokens", "900", "--ignore-eos"]
    process = subprocess.Popen(
        [*command, "--router-address", router],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not (live := [found for found in sequences(quire) if found.num_computed_tokens > 20]):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with Client(router) as client:
        client.abort(live[0].request_id)
    text, error = process.communicate(timeout=30)
    assert process.returncode == 1
    assert text.strip()
    assert error == "error: the router ended the request before its time\n"


def sequences(quire: Quire) -> list[inspection_pb2.Sequence]:
    request = inspection_pb2.ListSequencesRequest()
    return list(quire.inspection.ListSequences(request, timeout=5).sequences)


@pytest.mark.parametrize(
    "command",
    [
        "up",
        "demo",
        "memory",
        "compute",
        "router",
        "generate",
        "inspect blocks",
        "inspect watch",
        "top",
        "control retain",
    ],
)
def test_help_explains_every_flag(command: str) -> None:
    """`--help` ends well, names the configuration file and says what a flag takes in words, not in Python's types."""
    ended = run(*command.split(), "--help")
    assert ended.returncode == 0
    assert not re.search(r"\b(str|int|float|tuple|None)\b", ended.stdout)
    assert "--config FILE" in ended.stdout
    assert "--log-level" in ended.stdout


@pytest.mark.parametrize(("group", "word"), [("inspect", "explain"), ("control", "quota")])
def test_help_of_a_group_lists_its_subcommands(group: str, word: str) -> None:
    """One line each, within a terminal's width."""
    ended = run(group, "--help")
    assert ended.returncode == 0
    assert f"\n  {word} " in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 100


def test_the_version_is_told() -> None:
    """`quire version` prints it."""
    assert run("version").stdout == f"{__version__}\n"
