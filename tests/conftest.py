"""What several test modules share."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING

# Before torch is there, for this process and those it starts: an OpenMP thread that waits burns its core otherwise, and
# cores are few; a service would compile its own sources anew at each start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Before Triton is there, which any module that imports models may bring: it decides then whether it interprets.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
from processes import Quire, running_quire

from quire import demo_model

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from mixed_load import Evidence

STARTING = {"system", "k8s", "quire", "bench"}  # folders of tests that start services
FLAGS = ("--memory-budget", "4MiB", "--max-model-len", "1024", "--log-level", "warning")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Without garbage collection: it imports torch and transformers, whose objects would be searched again and again."""
    gc.disable()
    result = yield
    gc.enable()
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share processes run on one worker, which starts them once; what starts none fills up the end."""
    for item in items:
        if shared := _shared_with(item):
            item.add_marker(pytest.mark.xdist_group(shared))
    items.sort(key=lambda item: item.path.parent.name not in STARTING)


def _shared_with(item: pytest.Item) -> str | None:
    """Whom a test shares a fixture of more than a test with: the session, by the fixture's name, or its module.

    One of two such fixtures decides; a worker that has not got the other starts it once more.
    """
    found: dict[str, str] = {}
    for name, definitions in item._fixtureinfo.name2fixturedefs.items():  # type: ignore[attr-defined]
        if definitions[-1].baseid:  # not one of pytest's own
            found.setdefault(definitions[-1].scope, name)
    return found.get("session") or (item.path.name if "module" in found else None)


@pytest.fixture(scope="session")
def quire() -> Iterator[Quire]:
    """The three services with the demo model, for tests that leave them as they were."""
    with running_quire(demo_model.path(), *FLAGS) as found:
        yield found


@pytest.fixture(scope="session")
def tiny_quire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quire]:
    """The three services with a tiny Llama in float32 that has no tokenizer, in a pool with room for all."""
    from tiny_checkpoints import make_checkpoint  # noqa: PLC0415 -- torch, for seconds

    folder = make_checkpoint(tmp_path_factory.mktemp("tiny") / "model", "llama")
    (folder / "tokenizer.json").unlink()
    flags = ("--dtype", "float32", "--memory-budget", "8MiB", "--log-level", "error")
    with running_quire(folder, *flags) as found:
        yield found


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    """What a system that served requests of every kind told, until its end."""
    from mixed_load import run_mixed_load  # noqa: PLC0415 -- as above

    return run_mixed_load(tmp_path_factory.mktemp("loaded"))
