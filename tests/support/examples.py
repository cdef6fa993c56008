"""How many examples a property test tries."""

from __future__ import annotations

import os

_AT_NIGHT = 10


def examples(by_day: int) -> int:
    """So many, or ten times as many in `make test-long`."""
    return by_day * (_AT_NIGHT if "QUIRE_TEST_EXAMPLES" in os.environ else 1)
