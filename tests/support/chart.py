"""The chart, rendered by a real Helm engine, as the objects that a cluster would get."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kubernetes_validate
import yaml
from helm_python import Chart

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
CHART = ROOT / "k8s" / "chart"
PROFILES = ("cpu", "dra", "single-container")
VERSIONS = ("1.34", kubernetes_validate.latest_version())
# Custom resources: their schemas are not part of Kubernetes.
CUSTOM = {("monitoring.coreos.com/v1", "PodMonitor")}

# The library reads half a megabyte of JSON for every object that it looks at.
kubernetes_validate.utils.schema_contents = functools.cache(
    kubernetes_validate.utils.schema_contents
)

Object = dict[str, Any]


class StrictLoader(yaml.CSafeLoader):
    """Refuses a key that stands twice, as the API server does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT002 -- as the base class
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key stands twice: {keys}"
        return super().construct_mapping(node, deep)


# YAML 1.1 has a type of its own for a bare `=`; Kubernetes reads it as the text that it is.
StrictLoader.add_constructor("tag:yaml.org,2002:value", StrictLoader.construct_yaml_str)


def parse(text: str) -> list[Object]:
    """The objects of a YAML stream."""
    return [found for found in yaml.load_all(text, StrictLoader) if found]


@dataclass(frozen=True)
class Container:
    """A container and the Pod that it is in."""

    pod: Object
    spec: Object

    @property
    def name(self) -> str:
        return str(self.spec["name"])

    @property
    def arguments(self) -> list[str]:
        return [str(word) for word in self.spec["args"]]

    @property
    def env(self) -> dict[str, str]:
        return {found["name"]: found["value"] for found in self.spec["env"]}


@dataclass
class Rendering:
    """All that one set of values renders to."""

    objects: list[Object]
    notes: str = ""
    pods: list[Object] = field(init=False)

    def __post_init__(self) -> None:
        self.pods = [_pod_of(found) for found in self.objects if _is_workload(found)]

    def of_kind(self, kind: str) -> list[Object]:
        return [found for found in self.objects if found["kind"] == kind]

    def named(self, kind: str, suffix: str) -> Object:
        (found,) = [o for o in self.of_kind(kind) if o["metadata"]["name"].endswith(suffix)]
        return found

    def containers(self) -> Iterator[Container]:
        """Every container, those that start first first."""
        for pod in self.pods:
            for spec in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
                yield Container(pod, spec)

    def container(self, name: str) -> Container:
        (found,) = [found for found in self.containers() if found.name == name]
        return found


def _is_workload(found: Object) -> bool:
    return found["kind"] in {"StatefulSet", "Deployment", "Pod"}


def _pod_of(found: Object) -> Object:
    return found if found["kind"] == "Pod" else found["spec"]["template"]


def render(values: Object | None = None, *, name: str = "quire") -> Rendering:
    """Render the chart; raises what Helm raises."""
    with Chart.load(CHART) as chart:
        out = chart.render(values or {}, name=name, namespace="serving")
    texts = [text for path, text in out.items() if path.endswith(".yaml")]
    (notes,) = [text for path, text in out.items() if path.endswith("NOTES.txt")]
    return Rendering([found for text in texts for found in parse(text)], notes)


def validate(objects: list[Object]) -> None:
    """Every object is one that Kubernetes knows, no field more; custom resources only when listed."""
    for found in objects:
        if (found["apiVersion"], found["kind"]) not in CUSTOM:
            for version in VERSIONS:
                kubernetes_validate.validate(found, version, strict=True)
