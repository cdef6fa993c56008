"""`quire top` as a process, on a terminal and in a pipe."""

from __future__ import annotations

import signal
import subprocess
from typing import TYPE_CHECKING

import pytest
from naive_pool import NaivePool, NaiveSequence
from processes import QUIRE
from scripted_memory import ScriptedMemory, serving
from terminals import (
    ENTER_SCREEN,
    HIDE_CURSOR,
    LEAVE_SCREEN,
    SHOW_CURSOR,
    Terminal,
    on_a_terminal,
)

from protos.memory.v1 import inspection_pb2 as pb
from quire.errors import NoPool

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/memory.sock"


@pytest.fixture
def memory() -> ScriptedMemory:
    """With a pool of 40 blocks in which one sequence runs."""
    found, pool = ScriptedMemory(), pool_with("first")
    found.answers["GetPool"] = [pb.GetPoolResponse(pool_id="p1", epoch="1", size_mib=2.5)]
    found.changes.put(pool.snapshot()[0])
    return found


def pool_with(name: str) -> NaivePool:
    pool = NaivePool(40)
    pool.sequences["s", 0] = NaiveSequence(f"{name}/0", "", [1, 2], 20)
    return pool


def top(address: str, *flags: str) -> list[str]:
    return [QUIRE, "top", "--memory-address", address, "--interval-s", "0.1", *flags]


def assert_left_well(terminal: Terminal, modes: list[object]) -> None:
    """Status 0, the screen as before, the cursor shown, keys echoed."""
    assert terminal.end() == 0
    assert LEAVE_SCREEN in terminal.seen
    assert SHOW_CURSOR in terminal.seen
    assert terminal.seen.rindex(SHOW_CURSOR) > terminal.seen.rfind(HIDE_CURSOR)
    assert "Traceback" not in terminal.seen
    assert terminal.modes == modes


@pytest.mark.parametrize("how", ["q", "\x03", signal.SIGINT, signal.SIGTERM])
def test_it_ends_well(how: str | signal.Signals, memory: ScriptedMemory, address: str) -> None:
    """The key q, Ctrl-C and both signals: status 0 and a terminal as it was."""
    with serving(memory, address), on_a_terminal(top(address)) as terminal:
        modes = terminal.modes
        terminal.wait_for(ENTER_SCREEN)
        terminal.wait_for("first/0")
        assert terminal.modes != modes
        if isinstance(how, str):
            terminal.type(how)
        else:
            terminal.process.send_signal(how)
        assert_left_well(terminal, modes)


def test_it_follows_changes(memory: ScriptedMemory, address: str) -> None:
    """A new sequence shows up with the next picture, and a new size with the one after it."""
    pool = pool_with("first")
    with serving(memory, address), on_a_terminal(top(address)) as terminal:
        terminal.wait_for("first/0")
        before = pool.copy()
        pool.revision = 1
        pool.sequences["s", 1] = NaiveSequence("second/0", "", [3], 0)
        memory.changes.put(pool.change_since(before, "s", 1))
        terminal.wait_for("revision 1")
        terminal.wait_for("second/0")
        terminal.resize(40, 20)
        terminal.wait_for("first/0        20        2 ")


def test_it_lives_through_a_restart_of_the_service(memory: ScriptedMemory, address: str) -> None:
    """The service dies below it: it says since when; the service comes back empty: it shows that."""
    with on_a_terminal(top(address)) as terminal:
        modes = terminal.modes
        with serving(memory, address):
            terminal.wait_for("first/0")
        terminal.wait_for("memory service away for 1 s")
        terminal.wait_for("first/0")
        pool = pool_with("afterwards")
        pool.epoch = "2"
        memory.changes.put(pool.missed())
        memory.changes.put(pool.snapshot()[0])
        memory.answers["GetPool"] = [pb.GetPoolResponse(pool_id="p2", epoch="2")]
        with serving(memory, address):
            terminal.wait_for("pool p2")
            terminal.wait_for("epoch 2")
            terminal.wait_for("afterwards/0")
            terminal.type("q")
            assert_left_well(terminal, modes)


def test_it_waits_for_a_pool(memory: ScriptedMemory, address: str) -> None:
    """Started before the compute service, it shows the pool once there is one."""
    answers = [memory.changes.get(), NoPool("no compute service attached yet")]
    memory.changes.put(answers[1])
    with serving(memory, address), on_a_terminal(top(address)) as terminal:
        terminal.wait_for("no pool yet")
        memory.changes.put(answers[0])
        terminal.wait_for("first/0")


def test_nobody_at_the_address_is_one_line(address: str) -> None:
    """An address where nothing ever answered ends it with status 1, before the screen is touched."""
    with on_a_terminal(top(address)) as terminal:
        assert terminal.end() == 1
        assert ENTER_SCREEN not in terminal.seen
        assert terminal.seen.startswith(f"error: nothing answers on {address}")
        assert "--memory-address" in terminal.seen


@pytest.mark.parametrize("flags", [(), ("--once",)])
def test_in_a_pipe_it_is_one_picture(
    flags: tuple[str, ...], memory: ScriptedMemory, address: str
) -> None:
    """Plain text: no colours, no cursor moves; status 0."""
    with serving(memory, address):
        ended = subprocess.run(
            top(address, *flags),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "first/0" in ended.stdout
    assert "pool p1   2.5 MiB   40 blocks of 16 tokens" in ended.stdout
    assert "\x1b" not in ended.stdout


def test_one_tenants_sequences_can_be_shown(memory: ScriptedMemory, address: str) -> None:
    """The service shows a watch all of the pool; `--tenant` leaves the sequences of others out of the picture."""
    pool = pool_with("first")
    pool.sequences["s", 1] = NaiveSequence("reds/0", "red", [3], 0)
    memory.changes.get()
    memory.changes.put(pool.snapshot()[0])
    with serving(memory, address):
        ended = subprocess.run(
            top(address, "--tenant", "red"), capture_output=True, text=True, timeout=60, check=False
        )
    assert "reds/0" in ended.stdout
    assert "first/0" not in ended.stdout
    assert "used " in ended.stdout
    assert memory.asked("Watch")[0][1] == {}


def test_once_on_a_terminal_leaves_it_alone(memory: ScriptedMemory, address: str) -> None:
    """The picture stays above the next prompt."""
    with serving(memory, address), on_a_terminal(top(address, "--once")) as terminal:
        assert terminal.end() == 0
        assert "first/0" in terminal.seen
        assert ENTER_SCREEN not in terminal.seen


def test_a_picture_that_does_not_come_is_an_error(address: str) -> None:
    """A service that takes the call and never answers: one line, as long as was asked for."""
    silent = ScriptedMemory()
    with serving(silent, address):
        ended = subprocess.run(
            top(address, "--once", "--timeout-s", "0.3"),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == f"error: {address} did not answer in time; --timeout-s gives it more\n"
