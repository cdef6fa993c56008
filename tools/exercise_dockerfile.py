"""Perform the steps of Dockerfile targets without a container engine, then start what they hold.

    python -m tools.exercise_dockerfile memory router

A parser reads the Dockerfile. Each stage gets a folder as its root; COPY, ENV, WORKDIR and RUN act on it, with the
image's own paths (/opt, /src) below that folder and pip of a clean virtual environment. What only root in a container can
do is simulated by the same program (`apt-get --simulate`). A target passes when its entry point answers --help, serves,
leaves its root as it was, and a request is answered.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tools.dockerfile_steps import ImageBuilder, read_dockerfile
from tools.image_trial import try_compute, try_light

ROOT = Path(__file__).resolve().parent.parent
LIGHT = ("memory", "router")


def main() -> int:
    """0 when every target that was named (memory and router by default) was built and serves."""
    targets = sys.argv[1:] or list(LIGHT)
    stages = read_dockerfile(ROOT / "Dockerfile")
    unknown = [name for name in targets if name not in stages]
    if unknown:
        print(f"no target {', '.join(unknown)}; there are {', '.join(stages)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="image") as folder:
        builder = ImageBuilder(stages, context=ROOT, work=Path(folder))
        images = {name: builder.build(name) for name in targets}
        if set(LIGHT) <= set(images):
            try_light(builder, images["memory"], images["router"])
        for name in set(targets) - set(LIGHT):
            try_compute(builder, images[name])
    print(f"{', '.join(targets)}: built and tried")
    return 0


if __name__ == "__main__":
    sys.exit(main())
