"""Generate the stubs beside their protos, or check that they are fresh (`--check`)."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUTS = ("python", "grpc_python", "mypy", "mypy_grpc")


def main() -> int:
    """0 when all is well; 1 when a stub is stale."""
    if "--check" not in sys.argv[1:]:
        _generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        _generate(Path(folder))
        stale = [str(name) for name in _made(Path(folder)) if not _is_same(Path(folder), name)]
    if stale:
        print(f"stale stubs, run `make stubs`: {', '.join(stale)}", file=sys.stderr)
        return 1
    return 0


def _generate(out: Path) -> None:
    protos = sorted(str(found.relative_to(ROOT)) for found in ROOT.glob("protos/*/v1/*.proto"))
    plugins = [
        f"--plugin=protoc-gen-{name}={Path(sys.executable).parent / f'protoc-gen-{name}'}"
        for name in ("mypy", "mypy_grpc")
    ]
    outputs = [f"--{name}_out={out}" for name in OUTPUTS]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *plugins, *outputs, *protos]
    subprocess.run(command, cwd=ROOT, check=True)


def _made(folder: Path) -> list[Path]:
    return sorted(found.relative_to(folder) for found in folder.rglob("*.py*"))


def _is_same(folder: Path, name: Path) -> bool:
    committed = ROOT / name
    return committed.is_file() and committed.read_bytes() == (folder / name).read_bytes()


if __name__ == "__main__":
    sys.exit(main())
