"""The chart renders, with any values of its schema, to objects that Kubernetes takes; wrong values are refused."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from chart import CHART, PROFILES, ROOT, Object, Rendering, render
from helm_python.chart import lint
from helm_python.errors import HelmRenderError, HelmValuesError
from hypothesis import HealthCheck, example, given, settings
from schema_values import SchemaValues, partial
from soundness import assert_sound, custom_resources, settings_of

import quire

if TYPE_CHECKING:
    from collections.abc import Iterator

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
EXAMPLES = int(os.environ.get("QUIRE_TEST_EXAMPLES", "15"))
ERROR = 3
PVC = {"source": "pvc", "claimName": "models"}
INFO_ALLOWED = {"icon is recommended"}


@pytest.mark.parametrize("profile", PROFILES)
def test_each_profile_renders(profile: str) -> None:
    """With default values: valid objects that fit together, restricted Pods, no custom resource."""
    rendering = render({"profile": profile})
    assert_sound(rendering)
    assert custom_resources(rendering) == []


def test_the_objects_of_a_profile() -> None:
    """What is made, and what a profile leaves out."""

    def kinds(values: Object) -> list[str]:
        return sorted(found["kind"] for found in render(values).objects)

    common = ["NetworkPolicy", "Pod", "PodDisruptionBudget", "Service", "Service", "ServiceAccount"]
    with_router = [*common, "Deployment", "NetworkPolicy", "PodDisruptionBudget", "StatefulSet"]
    assert kinds({}) == sorted(with_router)
    assert kinds({"profile": "dra"}) == sorted([*with_router, "ResourceClaimTemplate"])
    assert kinds({"profile": "single-container"}) == sorted([*common, "StatefulSet"])


@pytest.mark.parametrize("profile", PROFILES)
def test_lint_is_silent(profile: str) -> None:
    """Helm's strict lint has nothing to say but that an icon would be nice."""
    report = lint(CHART, {"profile": profile}, strict=True, kube_version="v1.34.0")
    assert report["errors"] == []
    assert {found["error"] for found in report["messages"]} <= INFO_ALLOWED


def test_the_renderings_are_fresh() -> None:
    """`k8s/rendered` is what the chart renders to now."""
    check = [sys.executable, "tools/render_chart.py", "--check"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("profile", PROFILES)
def test_a_rendering_without_helm(profile: str) -> None:
    """The short name, and the folder that kustomize reads, hold the same objects; none is a hook or says Helm."""
    folder = ROOT / "k8s" / "rendered" / profile
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    (resource,) = kustomization["resources"]
    text = (folder / resource).read_text()
    assert (folder.parent / f"{profile}.yaml").read_text() == text
    assert "helm.sh" not in text
    assert "Helm" not in text
    objects = [found for found in yaml.safe_load_all(text) if found]
    rendered = [o for o in render({"profile": profile}).objects if o["kind"] != "Pod"]
    assert {(o["kind"], o["metadata"]["name"]) for o in objects} == {
        (o["kind"], o["metadata"]["name"]) for o in rendered
    }


def coherent(values: Object) -> Object:
    """`values`, with what the chart would refuse for being together made to fit."""
    values.setdefault("engine", {})["replicas"] = 1
    values.setdefault("router", {})["replicas"] = 1
    profile = values.get("profile", "cpu")
    values.setdefault("gpu", {})["count"] = 1
    if profile != "dra":
        values["gpu"]["selectors"] = []
    if profile == "single-container":
        values["router"] = {}
        values["memory"] = {}
        policy = values.setdefault("networkPolicy", {})
        policy["allowInspectionFrom"] = []
        policy.pop("allowDnsTo", None)
        policy.pop("dnsPorts", None)
    model = values.setdefault("model", {})
    if model.get("source", "demo") == "demo":
        model |= {"claimName": "", "path": ""}
        model["maxModelLen"] = min(model.get("maxModelLen", 0), 1024)
    else:
        model["claimName"] = model.get("claimName") or "models"
    rows = values.setdefault("memory", {}).get("maxNumRows", 4096)
    scheduling = values.setdefault("scheduling", {})
    scheduling["maxNumSeqs"] = min(scheduling.get("maxNumSeqs", 64), rows)
    if profile != "single-container":
        values["memory"]["maxNumRows"] = max(rows, scheduling["maxNumSeqs"])
    if values.get("tenants", {}).get("secretName"):
        values["tenants"]["metadataKey"] = ""
    metrics = values.setdefault("metrics", {})
    metrics.setdefault("podMonitor", {})
    if not metrics.get("enabled", True):
        metrics["podMonitor"]["enabled"] = False
    values.pop("global", None)
    return values


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.filter_too_much,
    ],
)
@given(SchemaValues(partial(SCHEMA)).values().map(coherent))
@example(coherent({"profile": "dra", "gpu": {"selectors": ['device.attributes["a"].b == "c\'d"']}}))
@example(coherent({"router": {"podAnnotations": {"0": "="}}}))
@example(coherent({"pool": {"sizeMiB": 16777216}, "compute": {"memoryMiB": 16777216}}))
@example(coherent({"metrics": {"podMonitor": {"enabled": True}, "dashboard": {"enabled": True}}}))
def test_random_values(monkeypatch: pytest.MonkeyPatch, values: Object) -> None:
    """Any values of the schema that fit together: sound objects, whose flags and environment the services accept."""
    rendering = render(values)
    assert_sound(rendering)
    for container in rendering.containers():
        with monkeypatch.context() as patch:
            settings_of(container, patch)
    assert_sizes(rendering, values)


def assert_sizes(rendering: Rendering, values: Object) -> None:
    """What follows from the pool's size and its log's, follows from them."""
    given = values.get("pool", {})
    pool = given.get("sizeMiB", 1024)
    logs = 2 * given.get("logCompactMiB", 2) + given.get("logHistoryMiB", 64)
    engine = rendering.named("StatefulSet", "-engine")["spec"]["template"]["spec"]
    (state,) = [found for found in engine["volumes"] if found["name"] == "state"]
    tmpfs = pool + logs + 188
    assert state["emptyDir"] == {"medium": "Memory", "sizeLimit": f"{tmpfs}Mi"}
    if values.get("profile") == "single-container":
        compute = values.get("compute", {}).get("memoryMiB", 8192)
        owner, expected = rendering.container("quire"), tmpfs + 256 + compute + 512
    else:
        owner, expected = rendering.container("memory"), tmpfs + 256
    assert f"--memory-budget={pool}MiB" in owner.arguments
    assert owner.spec["resources"]["limits"]["memory"] == f"{expected}Mi"


REFUSED: list[tuple[Object, str]] = [
    ({"serviceAccount": {"name": "default"}}, "serviceAccount.name default is there in every"),
    ({"engine": {"replicas": 2}}, "engine.replicas must be 1: in this version one router drives"),
    ({"engine": {"replicas": 0}}, "engine.replicas must be 1: in this version one router drives"),
    ({"router": {"replicas": 2}}, "would fence the first one's"),
    ({"profile": "dra", "gpu": {"count": 0}}, "profile dra with gpu.count 0 claims no device"),
    ({"profile": "dra", "gpu": {"count": 2}}, "gpu.count must be 0 or 1, not 2"),
    ({"gpu": {"selectors": ["true"]}}, "gpu.selectors belong to the claim of profile dra"),
    (
        {"profile": "single-container", "router": {"memoryMiB": 1024}},
        "the values under router have no effect",
    ),
    (
        {
            "profile": "single-container",
            "networkPolicy": {"allowInspectionFrom": [{"podSelector": {}}]},
        },
        "allowInspectionFrom has no effect with profile single-container",
    ),
    (
        {"profile": "single-container", "memory": {"maxNumRows": 8192}},
        "the values under memory have no effect",
    ),
    (
        {"profile": "single-container", "scheduling": {"maxNumSeqs": 4097}},
        "scheduling.maxNumSeqs 4097 is above 4096",
    ),
    (
        {"profile": "single-container", "networkPolicy": {"allowDnsTo": []}},
        "allowDnsTo and networkPolicy.dnsPorts have no effect",
    ),
    (
        {"profile": "single-container", "networkPolicy": {"dnsPorts": [5353]}},
        "allowDnsTo and networkPolicy.dnsPorts have no effect",
    ),
    ({"model": {"source": "pvc"}}, "model.source pvc needs model.claimName"),
    ({"model": {"path": "llama"}}, "belong to model.source pvc"),
    ({"model": {"maxModelLen": 2048}}, "above the demo model's own limit of 1024"),
    (
        {"scheduling": {"maxNumSeqs": 65}, "memory": {"maxNumRows": 64}},
        "scheduling.maxNumSeqs 65 is above memory.maxNumRows 64",
    ),
    (
        {"tenants": {"secretName": "tenants", "metadataKey": "x-tenant"}},
        "tenants.secretName and tenants.metadataKey are two answers",
    ),
    (
        {"metrics": {"enabled": False, "podMonitor": {"enabled": True}}},
        "scrapes what metrics.enabled false turns off",
    ),
]


@pytest.mark.parametrize(("values", "sentence"), REFUSED, ids=lambda found: str(found)[:60])
def test_what_cannot_work_is_refused(values: Object, sentence: str) -> None:
    """The render ends with a sentence that says why."""
    with pytest.raises(HelmRenderError, match=sentence.replace("(", r"\(")):
        render(values)


def test_every_refusal_is_tested() -> None:
    """Each `fail` of the chart has its case above, but for the dashboard's file, which the chart brings, and names."""
    text = (CHART / "templates" / "_checks.tpl").read_text()
    assert text.count("{{- fail ") == len({sentence for _, sentence in REFUSED}) + 2


@pytest.mark.parametrize("name", ["1st", "team.quire"])
def test_a_release_name_that_no_service_can_have(name: str) -> None:
    """Helm takes it, a Service does not: the render says what to set, and with that it is well."""
    with pytest.raises(HelmRenderError, match="set fullnameOverride"):
        render(name=name)
    assert_sound(render({"fullnameOverride": "first"}, name=name))


def from_pods(expression: Object) -> Object:
    """Values with a client that is chosen by an expression."""
    return {
        "networkPolicy": {"allowClientsFrom": [{"podSelector": {"matchExpressions": [expression]}}]}
    }


WRONG: list[tuple[Object, str]] = [
    ({"pool": {"sizeMib": 1024}}, "sizeMib"),
    ({"pool": {"sizeMiB": "1Gi"}}, "sizeMiB"),
    ({"pool": {"sizeMiB": 0}}, "sizeMiB"),
    ({"profile": "gpu"}, "profile"),
    ({"router": {"cpu": 1}}, "cpu"),
    ({"model": {"dtype": "fp8"}}, "dtype"),
    ({"model": {"blockSize": 24}}, "blockSize"),
    ({"model": {"path": "../etc"}}, "path"),
    ({"model": {"path": "/abs"}}, "path"),
    ({"image": {"digests": {"memory": "sha256:123"}}}, "digests"),
    ({"scheduling": {"watermark": 1}}, "watermark"),
    ({"drain": {"graceSeconds": 0}}, "graceSeconds"),
    ({"networkPolicy": {"allowInspectionFrom": [{"podSelektor": {}}]}}, "allowInspectionFrom"),
    ({"networkPolicy": {"allowInspectionFrom": [{}]}}, "allowInspectionFrom"),
    ({"engine": {"tolerations": [{"effect": "Nope"}]}}, "tolerations"),
    ({"extraArgs": ["--model=x"]}, "extraArgs"),
    ({"listenHost": "10.0.0.1"}, "listenHost"),
    ({"networkPolicy": {"dnsPorts": []}}, "dnsPorts"),
    ({"fullnameOverride": "1st"}, "fullnameOverride"),
    ({"gpu": {"count": 65}}, "count"),
    ({"gpu": {"selectors": ["true"] * 33}}, "selectors"),
    ({"scheduling": None}, "scheduling"),
    ({"scheduling": {"maxNumSeqs": None}}, "maxNumSeqs"),
    ({"metrics": {"podMonitor": {"enabled": None}}}, "enabled"),
    ({"image": {"repository": "registry:5000"}}, "repository"),
    ({"image": {"repository": "quire._.x"}}, "repository"),
    ({"engine": {"podLabels": {"app.kubernetes.io/name": "x"}}}, "app.kubernetes.io/name"),
    ({"router": {"podLabels": {"pod-template-hash": "x"}}}, "pod-template-hash"),
    (
        {"router": {"podAnnotations": {"kubectl.kubernetes.io/default-container": "x"}}},
        "default-container",
    ),
    ({"metrics": {"dashboard": {"labels": {"grafana_dashboard": "2"}}}}, "grafana_dashboard"),
    ({"metrics": {"podMonitor": {"labels": {"helm.sh/chart": "x"}}}}, "helm.sh/chart"),
    ({"engine": {"podLabels": {"a" * 254 + "/b": "x"}}}, "a" * 254),
    ({"engine": {"tolerations": [{}]}}, "tolerations"),
    ({"engine": {"tolerations": [{"operator": "Exists", "value": "x"}]}}, "tolerations"),
    ({"engine": {"tolerations": [{"key": "x", "tolerationSeconds": 1}]}}, "tolerations"),
    (from_pods({"key": "a", "operator": "In"}), "allowClientsFrom"),
    (from_pods({"key": "a", "operator": "Exists", "values": ["b"]}), "allowClientsFrom"),
]


RIGHT: list[Object] = [
    {"enabled": True, "global": {"anything": 1}},
    {"image": {"repository": "registry.example.com:5000/team/quire"}},
    {"image": {"repository": "ghcr.io/a__b/c--d.e"}},
    {"engine": {"tolerations": [{"operator": "Exists"}, {"key": "a", "value": "b"}]}},
    {
        "engine": {
            "tolerations": [
                {"key": "a", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5}
            ]
        }
    },
    from_pods({"key": "a", "operator": "NotIn", "values": ["b"]}),
    from_pods({"key": "a", "operator": "DoesNotExist"}),
]


@pytest.mark.parametrize("values", RIGHT, ids=lambda found: str(found)[:60])
def test_what_is_near_to_wrong_is_taken(values: Object) -> None:
    """The schema refuses no more than Kubernetes and container engines do."""
    assert_sound(render(values))


@settings(max_examples=200, deadline=None)
@given(SchemaValues(SCHEMA).values({"$ref": "#/definitions/cidr"}))
def test_the_schema_knows_networks(text: str) -> None:
    """What it takes for a CIDR is one."""
    ipaddress.ip_network(text, strict=False)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("0.0.0.0/0", True),
        ("169.254.20.10/32", True),
        ("::/0", True),
        ("fd00:10::/64", True),
        ("2001:db8::1:2/128", True),
        ("1:2:3:4:5:6:7:8/128", True),
        ("256.0.0.0/8", False),
        ("10.0.0/8", False),
        ("10.0.0.0/33", False),
        ("010.0.0.0/8", False),
        ("10.0.0.0", False),
        ("fd00::1::/64", False),
        (":::/0", False),
        ("fd00::/129", False),
    ],
)
def test_a_network(text: str, *, right: bool) -> None:
    """Usual networks are taken, and slips are not."""
    assert (re.fullmatch(SCHEMA["definitions"]["cidr"]["pattern"], text) is not None) is right


def test_nothing_can_be_taken_away() -> None:
    """A null removes a default; each key with a default is required, so that this is named and nothing half is made."""

    def assert_requires(schema: Object, optional: set[str]) -> None:
        properties = schema.get("properties", {})
        assert set(schema.get("required", [])) == set(properties) - optional
        for found in properties.values():
            assert_requires(found, set())

    assert_requires(SCHEMA, {"global", "enabled"})


@pytest.mark.parametrize(("values", "named"), WRONG, ids=lambda found: str(found)[:60])
def test_a_wrong_value_is_named(values: Object, named: str) -> None:
    """An unknown key, a wrong type or a value out of range ends the render, and the message names it."""
    with pytest.raises(HelmValuesError, match=named):
        render(values)


def objects_in(schema: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield path, schema
        for key, found in schema.items():
            yield from objects_in(found, f"{path}/{key}")
    if isinstance(schema, list):
        for index, found in enumerate(schema):
            yield from objects_in(found, f"{path}/{index}")


def test_the_schema_is_closed() -> None:
    """Every object of the schema names its keys or restricts them; only Helm's own `global` is left open."""
    open_ones = [
        path
        for path, found in objects_in(SCHEMA)
        if found.get("additionalProperties") is not False and "propertyNames" not in found
    ]
    assert open_ones == ["/properties/global"]


def keys_of(values: Any, path: str = "") -> Iterator[str]:
    for key, found in values.items() if isinstance(values, dict) else ():
        yield f"{path}.{key}"
        yield from keys_of(found, f"{path}.{key}")


def test_values_and_schema_name_the_same_keys() -> None:
    """Every key of the schema has a default in values.yaml with a comment above it or above its group, and vice versa."""

    def properties(schema: Object, path: str = "") -> Iterator[str]:
        for key, found in schema.get("properties", {}).items():
            yield f"{path}.{key}"
            yield from properties(found, f"{path}.{key}")

    values = yaml.safe_load((CHART / "values.yaml").read_text())
    values["networkPolicy"] |= {"allowMetricsFrom": [], "allowDnsTo": []}
    assert set(keys_of(values)) == set(properties(SCHEMA)) - {".global", ".enabled"}


def test_the_versions_agree() -> None:
    """The chart's appVersion, which is the default tag of the images, is the program's version."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == quire.__version__


def test_a_long_release_name() -> None:
    """Names and labels keep within their 63 characters."""
    assert_sound(render({"profile": "dra"}, name="a" * 53))


def test_long_names_that_begin_alike() -> None:
    """They stay two, and both keep within their length."""

    def prefix(name: str) -> str:
        found = render(name=name).named("StatefulSet", "-engine")["metadata"]["name"]
        return str(found.removesuffix("-engine"))

    first, second = prefix("a" * 50 + "-b"), prefix("a" * 50 + "-c")
    assert first != second
    assert max(len(first), len(second)) <= 44
    assert prefix("quire-of-the-team") == "quire-of-the-team"
