"""What can be said of the Dockerfile without building: `make dockerfile` performs its steps and starts the result."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from chart import ROOT, render

import quire
from tools.dockerfile_steps import ImageBuilder, Stage, read_dockerfile

STAGES = read_dockerfile(ROOT / "Dockerfile")
TARGETS = ("memory", "router", "compute", "compute-cuda")


def lineage(name: str) -> list[Stage]:
    """A stage and those it is based on."""
    stage = STAGES[name]
    return [stage, *(lineage(stage.base) if stage.base in STAGES else [])]


def last(name: str, instruction: str) -> str:
    """The instruction that holds for a target: the last one of the nearest stage."""
    for stage in lineage(name):
        found = [value for step, value in stage.steps if step == instruction]
        if found:
            return found[-1]
    raise AssertionError(f"{name} has no {instruction}")


@pytest.mark.parametrize("target", TARGETS)
def test_a_target(target: str) -> None:
    """A user by number that is not root, the entry point in exec form, no health check, the version in a label."""
    assert last(target, "USER") == "10001:10001"
    assert last(target, "ENTRYPOINT") == '["quire"]'
    assert last(target, "HEALTHCHECK") == "NONE"
    assert f'org.opencontainers.image.version="{quire.__version__}"' in last(target, "LABEL")


def test_light_targets_have_no_compute_libraries() -> None:
    """No stage that they come from, or copy from, installs the extra."""
    sources = {
        value.split()[0].removeprefix("--from=")
        for target in ("memory", "router")
        for step, value in STAGES[target].steps
        if step == "COPY"
    }
    steps = [step for name in sources for stage in lineage(name) for step in stage.steps]
    installs = [value for step, value in steps if step == "RUN" and "pip install" in value]
    assert installs
    assert not [value for value in installs if "compute" in value]


def test_everything_is_pinned() -> None:
    """Every installation of libraries goes by constraints.txt; what is installed without it brings no libraries."""
    runs = [value for stage in STAGES.values() for step, value in stage.steps if step == "RUN"]
    installs = [value for value in runs if "pip install" in value]
    assert len(installs) == 4
    assert all("--constraint constraints.txt" in v or "--no-deps" in v for v in installs)


def test_the_chart_names_targets() -> None:
    """Each image of the manifests is a target, and exposes the ports that its containers open."""
    for profile in ("cpu", "dra", "single-container"):
        for container in render({"profile": profile}).containers():
            target = container.spec["image"].rpartition(":")[0].removeprefix("quire-")
            assert target in TARGETS
            if profile != "single-container":
                opened = {str(port["containerPort"]) for port in container.spec.get("ports", [])}
                assert opened <= set(last(target, "EXPOSE").split())


def test_the_context_is_what_is_installed(tmp_path: Path) -> None:
    """.dockerignore lets through our packages and what setuptools reads, and nothing that was compiled or tried."""
    context = ImageBuilder(STAGES, context=ROOT, work=tmp_path).files_of_context()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name.removesuffix("*") for name in project["packages"]["find"]["include"]}
    others = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert {path.parts[0] for path in context} == packages | others
    assert not [path for path in context if "__pycache__" in path.parts or path.suffix == ".pyc"]
    assert Path("quire/demo_model/quire-demo/model.safetensors") in context
