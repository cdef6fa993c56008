"""An environment for each peer, made once: their requirements exclude each other's and Quire's."""

from __future__ import annotations

import os
import subprocess
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment in `folder / name`, of the packages that `requirements-NAME.txt` pins."""

    name: str
    takes: str  # how long making it takes
    unwanted: tuple[str, ...] = ()  # packages that come along and must go

    def ensure(self, folder: Path, console: Console) -> Path:
        """The interpreter; made if the requirements are not those it was made of. pip's output is in a log beside it.

        Raises:
            subprocess.CalledProcessError: pip failed.
        """
        target = folder / self.name
        requirements = HERE / f"requirements-{self.name}.txt"
        stamp = target / requirements.name
        if not stamp.exists() or stamp.read_text() != requirements.read_text():
            with console.status(f"making {target}: {self.takes}; see {target}.log"):
                self._make(target, requirements)
            stamp.write_text(requirements.read_text())
        return target / "bin" / "python"

    def _make(self, target: Path, requirements: Path) -> None:
        venv.create(target, clear=True, with_pip=True)
        pip = [str(target / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        with target.with_suffix(".log").open("w") as log:
            run_logged([*pip, "install", "--verbose", "--requirement", str(requirements)], log)
            if self.unwanted:
                run_logged([*pip, "uninstall", "--yes", *self.unwanted], log)


def run_logged(command: list[str], log: object) -> None:
    """Wait for a command; compilers that it starts use all cores."""
    environment = os.environ | {
        "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count()),
        "HF_HUB_OFFLINE": "1",
    }
    subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)  # type: ignore[call-overload]  # noqa: S603 -- of this file


LLAMA_CPP = Environment("llama-cpp", "compiles llama.cpp, ten minutes on two cores")
# Its wheel fails beside the CPU build of torch, and with it every import of transformers; only image models need it.
OPENVINO = Environment("openvino", "two minutes", unwanted=("torchvision",))
