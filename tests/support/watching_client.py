"""`python watching_client.py ADDRESS` folds a Watch; after each answer: its revision, and how often it missed some."""

from __future__ import annotations

import sys

from quire.client.inspector import PoolInspector
from quire.client.pool_mirror import PoolMirror


def main() -> None:
    mirror = PoolMirror()
    with PoolInspector(sys.argv[1]) as inspector, inspector.watch() as watch:
        for answer in watch:
            mirror.take(answer)
            if view := mirror.look():
                sys.stdout.write(f"{view.revision} {mirror.num_missed}\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
