"""What several test modules share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
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
