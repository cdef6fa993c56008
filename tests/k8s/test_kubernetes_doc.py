"""What docs/kubernetes.md shows is what the chart makes."""

from __future__ import annotations

import re
import shlex

import yaml
from chart import PROFILES, ROOT, render
from soundness import assert_sound

TEXT = (ROOT / "docs" / "kubernetes.md").read_text()


def commands(program: str) -> list[list[str]]:
    text = "\n".join(re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith(program)]


def test_the_values_shown_render() -> None:
    """The example of a model on a claim is a set of values that the chart takes."""
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    rendering = render(yaml.safe_load(block))
    assert_sound(rendering)
    limits = rendering.container("memory").spec["resources"]["limits"]
    assert limits == {"memory": "4608Mi"}


def test_the_grpcurl_calls_are_those_of_the_notes() -> None:
    """Which are made against running services."""
    notes = render().notes
    shown = [shlex.join(words) for words in commands("grpcurl")]
    told = [shlex.join(shlex.split(line)) for line in notes.splitlines() if "  grpcurl" in line]
    assert len(shown) == 4
    assert set(shown) <= set(told)


def test_the_targets_named_are_there() -> None:
    """Targets of the Dockerfile, profiles of the chart, folders of the renderings."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    for target in ("memory", "router", "compute", "compute-cuda"):
        assert f" AS {target}\n" in dockerfile
    for profile in PROFILES:
        assert f"| `{profile}` |" in TEXT
        assert (ROOT / "k8s" / "rendered" / profile / "kustomization.yaml").is_file()
