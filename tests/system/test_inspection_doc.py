"""What docs/inspection.md shows is what the commands print."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from processes import suspended_compute

from quire.cli.control import control
from quire.cli.inspect import inspect
from quire.cli.top import top
from quire.client import Client

if TYPE_CHECKING:
    import pytest
    from processes import Quire

DOC = (Path(__file__).parents[2] / "docs" / "inspection.md").read_text()
COMMANDS = {"inspect": inspect, "control": control, "top": top}
EXAMPLES = re.findall(r"```console\n\$ quire (.*?)\n(.*?)```", DOC, re.DOTALL)
ENDLESS = "inspect watch"
GIVEN_IDS = re.compile(r"\b([rp])-\d+\b")


def shape_of(line: str) -> str:
    """A line without numbers, ids, the lengths of runs and whether there were more decimals."""
    line = re.sub(r"\b[0-9a-f]{16,}\b|\d+", "N", line)
    line = re.sub(r"[∅·▒█▓]+", "#", line).replace("# N", "N")
    return " ".join(line.split())


def with_ids(words: str, given: dict[str, str]) -> str:
    """The example with the ids of this run, by their first letter."""
    return GIVEN_IDS.sub(lambda found: given[found[1]], words)


def run(words: str, router: str, capsys: pytest.CaptureFixture[str]) -> str:
    name, *arguments = shlex.split(words)
    status = COMMANDS[name]([*arguments, "--router-address", router])
    told = capsys.readouterr()
    assert (status, told.err) == (0, ""), words
    return told.out


def test_the_examples_are_what_is_printed(quire: Quire, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command ends well and its first line looks as the document says; ids are those that were given on the way."""
    router = quire.addresses["router"]
    given: dict[str, str] = {}
    with Client(router) as client:
        live = client.generate(
            "def f():\n" * 20,
            request_id="my-request",
            num_samples=2,
            max_tokens=800,
            ignore_eos=True,
        )
        next(live)
        with suspended_compute(quire):
            for words, expected in EXAMPLES:
                if words == ENDLESS:
                    continue
                told = run(with_ids(words, given), router, capsys)
                given |= {found[1]: found[0] for found in GIVEN_IDS.finditer(told)}
                assert shape_of(told.splitlines()[0]) == shape_of(expected.splitlines()[0]), words
        live.cancel()
    run("control quota alice --none", router, capsys)


def test_the_document_has_examples() -> None:
    """The test above found what it is about, and each command is among them."""
    assert len(EXAMPLES) >= 15
    assert {words.split()[0] for words, _ in EXAMPLES} == COMMANDS.keys()


def test_the_python_runs(quire: Quire) -> None:
    """The program of the document prints counts."""
    (source,) = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
    source = source.replace("unix:/tmp/quire-0/7071/memory.sock", quire.addresses["memory"])
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "MirrorCounts(num_blocks=" in done.stdout
