"""Where settings come from, and what is said of wrong ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from quire.settings import ComputeSettings, RouterSettings, UpSettings
from quire.settings_loader import load

if TYPE_CHECKING:
    from pathlib import Path


def test_flags_beat_variables_beat_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each source overrules the ones after it."""
    file = tmp_path / "quire.yaml"
    file.write_text("max_num_seqs: 1\nqueue_limit: 2\nwatermark: 0.5\n")
    monkeypatch.setenv("QUIRE_MAX_NUM_SEQS", "10")
    monkeypatch.setenv("QUIRE_QUEUE_LIMIT", "20")
    arguments = ["--config", str(file), "--max-num-seqs", "100"]
    found = load(RouterSettings, arguments, prog="quire router")
    assert (found.max_num_seqs, found.queue_limit, found.watermark) == (100, 20, 0.5)
    assert found.max_num_batched_tokens == 512


def test_sizes_have_units() -> None:
    """A budget is read with its unit."""
    assert load(UpSettings, ["--memory-budget", "2MiB"], prog="quire up").memory_budget == 2 << 20


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        load(ComputeSettings, arguments, prog="quire compute")
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_an_unknown_name_is_answered_with_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flags, keys of the file and variables alike."""
    assert "unknown flag --blocksize; did you mean --block-size?" in refusal(
        capsys, ["--blocksize", "3"]
    )
    file = tmp_path / "quire.yaml"
    file.write_text("modle: x\n")
    assert "modle; did you mean model?" in refusal(capsys, ["--config", str(file)])
    monkeypatch.setenv("QUIRE_DTPE", "float32")
    assert "unknown variable QUIRE_DTPE; did you mean QUIRE_DTYPE?" in refusal(capsys, [])


def test_variables_that_kubernetes_makes_are_no_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Pod beside a Service quire-router gets variables about it; one that only looks alike is still refused."""
    for name, value in {
        "QUIRE_ROUTER_SERVICE_HOST": "10.0.0.1",
        "QUIRE_ROUTER_SERVICE_PORT": "7071",
        "QUIRE_ROUTER_SERVICE_PORT_GRPC": "7071",
        "QUIRE_ROUTER_PORT": "tcp://10.0.0.1:7071",
        "QUIRE_ROUTER_PORT_7071_TCP": "tcp://10.0.0.1:7071",
        "QUIRE_ROUTER_PORT_7071_TCP_ADDR": "10.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    assert load(ComputeSettings, [], prog="quire compute").model == "demo"
    monkeypatch.setenv("QUIRE_ROUTER_PORT", "7071")
    assert "unknown variable QUIRE_ROUTER_PORT;" in refusal(capsys, [])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--block-size", "12"], "--block-size: "),
        (["--block-size"], "argument --block-size: expected one argument"),
        (["--dtype", "int3"], "--dtype: "),
        (["--max-model-len", "0"], "--max-model-len: "),
        (["--config", "/nowhere.yaml"], "the configuration file /nowhere.yaml does not exist"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_a_wrong_value_is_named(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says which setting is wrong."""
    assert expected in refusal(capsys, arguments)


def test_a_file_that_is_not_yaml_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A broken file is one line, not a trace."""
    file = tmp_path / "quire.yaml"
    file.write_text("a: [\n")
    assert f"{file} is not YAML: " in refusal(capsys, ["--config", str(file)])
    file.write_text("- 1\n")
    assert f"{file} must hold a mapping" in refusal(capsys, ["--config", str(file)])
