"""Which engines there are: their environments, what they need the checkpoint to be turned into, their drivers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.peer_engines.engine_process import ROOT, EngineProcess
from bench.peer_engines.environments import LLAMA_CPP, OPENVINO, Environment, run_logged

if TYPE_CHECKING:
    from rich.console import Console

# Sixteen bits a weight, as all others have. Prompts are token ids: no tokenizer is needed.
EXPORT_OPTIONS = (
    *("--task", "text-generation-with-past", "--weight-format", "fp16"),
    "--disable-convert-tokenizer",
)


@dataclass(frozen=True, slots=True)
class EngineKind:
    """One column of the table."""

    driver: str  # module in this package
    environment: Environment | None = None  # None: the one that this runs in
    is_transformers: bool = False
    cap_share: float = 1.0  # of the longest run: slow ones would leave no time for the others

    def prepare(self, checkpoint: Path, cache: Path, console: Console) -> EngineProcess:
        """A process to enter; environment and converted checkpoint are made when they are not there.

        Raises:
            subprocess.CalledProcessError: pip or a conversion failed; its output is in a log in `cache`.
        """
        python = Path(sys.executable)
        if self.environment is not None:
            python = self.environment.ensure(cache, console)
        with console.status(f"converting {checkpoint} for {self.driver}"):
            model = self._convert(python, checkpoint)
        command = [str(python), "-m", f"bench.peer_engines.{self.driver}", str(model)]
        return EngineProcess(command, cache / f"{self.driver}.log")

    def _convert(self, python: Path, checkpoint: Path) -> Path:
        if self.environment is LLAMA_CPP:
            return to_gguf(python, checkpoint)
        if self.environment is OPENVINO:
            return to_openvino(python, checkpoint)
        return checkpoint


def to_gguf(python: Path, checkpoint: Path) -> Path:
    """For llama.cpp."""
    target = checkpoint.with_suffix(checkpoint.suffix + ".gguf")
    if not target.exists():
        command = [str(python), "-m", "bench.peer_engines.gguf_writer"]
        subprocess.run([*command, str(checkpoint), str(target)], check=True, cwd=ROOT)  # noqa: S603 -- ours
    return target


def to_openvino(python: Path, checkpoint: Path) -> Path:
    """For OpenVINO; a folder that is there is whole, since it gets its name at the end."""
    target = checkpoint.with_name(f"{checkpoint.name}-openvino")
    if not target.exists():
        part = checkpoint.with_name(f"{checkpoint.name}-openvino-part")
        command = [str(python.with_name("optimum-cli")), "export", "openvino", *EXPORT_OPTIONS]
        with Path(f"{target}.log").open("w") as log:
            run_logged([*command, "--model", str(checkpoint), str(part)], log)
        part.rename(target)
    return target


ENGINES = {
    "quire": EngineKind("quire_driver"),
    "openvino": EngineKind("openvino_driver", OPENVINO),
    "llama.cpp": EngineKind("llama_cpp_driver", LLAMA_CPP),
    "generate": EngineKind("transformers_driver", is_transformers=True, cap_share=0.5),
    "generate_batch": EngineKind("generate_batch_driver", is_transformers=True, cap_share=0.5),
}
