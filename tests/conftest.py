"""What several test modules share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from mixed_load import Evidence, run_mixed_load
from processes import Quire, running_quire

from quire import demo_model

if TYPE_CHECKING:
    from collections.abc import Iterator

FLAGS = ("--memory-budget", "4MiB", "--max-model-len", "1024", "--log-level", "warning")


@pytest.fixture(scope="session")
def quire() -> Iterator[Quire]:
    """The three services with the demo model, for tests that leave them as they were."""
    with running_quire(demo_model.path(), *FLAGS) as found:
        yield found


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    """What a system that served requests of every kind told, until its end."""
    return run_mixed_load(tmp_path_factory.mktemp("loaded"))
