"""Without the extra `compute` the memory service, the router and clients work, and the rest says what to install."""

from __future__ import annotations

import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from quire import cli

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> ModuleSpec | None:
        return None if name == "torch" else find_spec(name)

    monkeypatch.setattr(cli, "find_spec", find)


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize("command", ["up", "demo", "compute"])
def test_what_needs_compute_says_so(
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line on stderr names what is missing and what installs it; status 1."""
    monkeypatch.setattr(sys, "argv", ["quire", command])
    assert cli.main() == 1
    assert capsys.readouterr().err == (
        f"error: quire {command}: the compute service's libraries are not installed (torch); "
        "pip install 'quire[compute]' brings them\n"
    )


@pytest.mark.usefixtures("without_torch")
def test_what_needs_none_of_it_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A client's command reads its flags."""
    monkeypatch.setattr(sys, "argv", ["quire", "generate", "--help"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert "--router-address" in capsys.readouterr().out


def test_the_heavy_libraries_are_an_extra() -> None:
    """None of them is installed with `quire` alone; all of them with `quire[compute]` and for development."""
    light = {name.partition(">")[0] for name in PROJECT["dependencies"]}
    extras = PROJECT["optional-dependencies"]
    heavy = {name.partition(">")[0] for name in extras["compute"]}
    assert {"torch", "transformers", "numba", "safetensors"} <= heavy
    assert light.isdisjoint(heavy)
    assert "quire[compute]" in extras["dev"]
