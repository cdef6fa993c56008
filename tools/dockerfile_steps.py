"""The instructions of a Dockerfile, performed on folders. `exercise_dockerfile.py` says what that is for."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from dockerfile_parse import DockerfileParser

# Where the files of an image are; below them nothing of this machine is meant.
_OWN_PATHS = re.compile(r"(?<![\w./])/(opt|src)(?=[/\s'\"]|$)")
_APT_LISTS = "rm -rf /var/lib/apt/lists/*"


@dataclass(frozen=True)
class Stage:
    """One FROM and what follows it."""

    base: str
    steps: tuple[tuple[str, str], ...]  # instruction, the rest of its line


@dataclass
class Image:
    """A stage that was built: its files, and what its processes get."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)

    def child(self, root: Path) -> Image:
        """An image whose files and settings begin as these."""
        _copy_tree(self.root, root)
        return Image(
            root,
            dict(self.env),
            self.workdir,
            self.user,
            list(self.entrypoint),
            list(self.command),
            dict(self.labels),
        )


def read_dockerfile(path: Path) -> dict[str, Stage]:
    """Stages by name; each must have one."""
    with path.open("rb") as file:
        structure = DockerfileParser(fileobj=file, env_replace=False).structure
    stages: dict[str, Stage] = {}
    steps: list[tuple[str, str]] = []
    for found in structure:
        instruction, value = found["instruction"], found["value"]
        if instruction == "FROM":
            base, _, name = value.partition(" AS ")
            steps = []
            stages[name] = Stage(base, ())
        elif instruction != "COMMENT" and stages:
            steps.append((instruction, value))
            name = list(stages)[-1]
            stages[name] = Stage(stages[name].base, tuple(steps))
    return stages


class ImageBuilder:
    """Builds stages, each once.

    Scripts of a virtual environment name its folder, so all images have one root path while they are used: a link that
    leads to the image in use.
    """

    def __init__(self, stages: dict[str, Stage], *, context: Path, work: Path) -> None:
        self._stages = stages
        self._context = context
        self._work = work
        self._images: dict[str, Image] = {}
        self.root = work / "root"

    def build(self, name: str) -> Image:
        """The image of a stage, and first those it needs."""
        if name not in self._images:
            stage = self._stages[name]
            image = self._begin(name, stage.base)
            for instruction, value in stage.steps:
                print(f"{name}: {instruction} {value[:100]}", flush=True)
                self._step(image, instruction, value)
            self._images[name] = image
        return self._images[name]

    def use(self, image: Image) -> None:
        """Let the root path lead to `image`."""
        self.root.unlink(missing_ok=True)
        self.root.symlink_to(image.root)

    def environment(self, image: Image) -> dict[str, str]:
        """Variables of the image's processes; PATH has this machine's programs behind the image's."""
        return {name: self.local(value) for name, value in image.env.items()}

    def local(self, text: str) -> str:
        """`text` with the image's own paths below the root path."""
        return _OWN_PATHS.sub(lambda found: f"{self.root}{found.group()}", text)

    def _begin(self, name: str, base: str) -> Image:
        root = self._work / name
        if base in self._stages:
            return self.build(base).child(root)
        (root / "etc").mkdir(parents=True)
        for file in ("passwd", "group", "shadow", "gshadow"):
            (root / "etc" / file).touch()
        return Image(root, env={"PATH": _system_path()})

    def _step(self, image: Image, instruction: str, value: str) -> None:
        self.use(image)
        step = getattr(self, f"_{instruction.lower()}", None)
        if step is None:
            message = f"{instruction} is not known here; teach tools/dockerfile_steps.py"
            raise ValueError(message)
        step(image, value)

    def _env(self, image: Image, value: str) -> None:
        for name, text in _pairs(value).items():
            image.env[name] = text.replace("$PATH", image.env["PATH"])

    def _label(self, image: Image, value: str) -> None:
        image.labels |= _pairs(value)

    def _workdir(self, image: Image, value: str) -> None:
        image.workdir = value
        Path(self.local(value)).mkdir(parents=True, exist_ok=True)

    def _user(self, image: Image, value: str) -> None:
        image.user = value

    def _entrypoint(self, image: Image, value: str) -> None:
        image.entrypoint, image.command = _exec_form(value), []

    def _cmd(self, image: Image, value: str) -> None:
        image.command = _exec_form(value)

    def _arg(self, _image: Image, _value: str) -> None:
        """Build arguments without a default are this machine's own variables already."""

    def _expose(self, _image: Image, value: str) -> None:
        assert all(word.isdigit() for word in value.split())

    def _healthcheck(self, _image: Image, value: str) -> None:
        assert value == "NONE"

    def _copy(self, image: Image, value: str) -> None:
        words = value.split()
        if words[0].startswith("--from="):
            other = self.build(words[0].removeprefix("--from=")).root
            source, destination = (word.lstrip("/") for word in words[1:])
            _copy_tree(other / source, image.root / destination)
            return
        target = Path(self.local(image.workdir)) / words[-1]
        for source in words[:-1]:
            self._copy_from_context(source, target)

    def _copy_from_context(self, source: str, target: Path) -> None:
        wanted = [
            found
            for found in self.files_of_context()
            if source == "." or found.is_relative_to(source)
        ]
        assert wanted, f"COPY {source}: nothing of that name is in the context"
        for found in wanted:
            # A file goes into the folder by its own name, a folder's content keeps its paths.
            place = target / (found if source == "." else found.name)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self._context / found, place)

    def files_of_context(self) -> list[Path]:
        """Files that .dockerignore leaves."""
        patterns = (self._context / ".dockerignore").read_text(encoding="utf-8").splitlines()
        ignored = [line for line in patterns if line and not line.startswith("#")]
        kept = [line[1:] for line in ignored if line.startswith("!")]
        files = [path for name in kept for path in _files(self._context / name)]
        relative = [path.relative_to(self._context) for path in files]
        return [path for path in relative if not _is_ignored(path, ignored)]

    def _run(self, image: Image, value: str) -> None:
        for command in value.split(" && "):
            performed = self._performable(command.strip())
            if performed:
                self._shell(image, performed)

    def _performable(self, command: str) -> str:
        """What stands here for a command that needs root in a container; empty for one that has no counterpart."""
        words = shlex.split(command)
        if words[0] in {"groupadd", "useradd"}:
            return shlex.join([words[0], "--prefix", str(self.root.resolve()), *words[1:]])
        if words[:2] == ["apt-get", "update"]:
            return "" if any(Path("/var/lib/apt/lists").glob("*_Packages*")) else command
        if words[:2] == ["apt-get", "install"]:
            return shlex.join([*words[:2], "--simulate", *words[2:]])
        return "" if command == _APT_LISTS else self.local(command)

    def _shell(self, image: Image, command: str) -> None:
        env = _pip_variables() | self.environment(image)
        done = subprocess.run(
            ["/bin/sh", "-ec", command],
            cwd=self.local(image.workdir),
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            message = f"RUN {command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            raise RuntimeError(message)


def _copy_tree(source: Path, target: Path) -> None:
    """A tree of links to the same files: whatever changes one here replaces it, as pip does."""
    shutil.copytree(source, target, symlinks=True, copy_function=os.link)


def _pairs(value: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in shlex.split(value))


def _exec_form(value: str) -> list[str]:
    words = json.loads(value)
    assert isinstance(words, list), "the exec form is wanted"
    return [str(word) for word in words]


def _files(path: Path) -> list[Path]:
    return (
        [path] if path.is_file() else sorted(found for found in path.rglob("*") if found.is_file())
    )


def _is_ignored(path: Path, patterns: list[str]) -> bool:
    """The last pattern that fits a path or a folder above it decides, as in Docker."""
    names = [path, *path.parents[:-1]]
    is_ignored = False
    for pattern in patterns:
        wanted = pattern.removeprefix("!").removeprefix("**/")
        is_anywhere = "**/" in pattern
        if any(fnmatch(name.name if is_anywhere else str(name), wanted) for name in names):
            is_ignored = not pattern.startswith("!")
    return is_ignored


def _system_path() -> str:
    """This machine's programs; `python` is the interpreter that virtual environments here are made with."""
    return f"{Path(sys.base_prefix) / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _pip_variables() -> dict[str, str]:
    """How this machine reaches its package registry."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith("PIP_") or name.lower().endswith("_proxy")
    }
