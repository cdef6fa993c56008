"""What has to hold for every rendering, whatever the values: beyond what the schemas of Kubernetes say."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from chart import CUSTOM, Container, Object, Rendering, validate

from quire.settings import (
    ComputeSettings,
    GenerateSettings,
    MemorySettings,
    RouterSettings,
    UpSettings,
)
from quire.settings_loader import load

if TYPE_CHECKING:
    import pytest

    from quire.settings import CommonSettings

SETTINGS: dict[str, type[CommonSettings]] = {
    "memory": MemorySettings,
    "compute": ComputeSettings,
    "router": RouterSettings,
    "up": UpSettings,
    "generate": GenerateSettings,
}
_SERVICE_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def assert_sound(rendering: Rendering) -> None:
    """Valid objects that fit together, restricted Pods."""
    validate(rendering.objects)
    for found in rendering.objects:
        name, kind = found["metadata"]["name"], found["kind"]
        assert _DNS_LABEL.fullmatch(name) or kind == "ServiceAccount"
        assert _SERVICE_NAME.fullmatch(name) or kind != "Service"
    for pod in rendering.pods:
        _assert_restricted(pod)
        _assert_mounts(pod)
    _assert_selectors(rendering)
    for container in rendering.containers():
        _assert_probes(container)
        assert not [name for name in container.env if name.startswith("QUIRE_")]


def settings_of(container: Container, monkeypatch: pytest.MonkeyPatch) -> CommonSettings | None:
    """What the service reads from the container's command line and environment; None where it runs none of ours."""
    program, command = container.spec["command"]
    if program != "quire":
        return None
    monkeypatch.setattr(os, "environ", dict(container.env))
    return load(SETTINGS[command], container.arguments, prog=f"quire {command}")


def _assert_restricted(pod: Object) -> None:
    """Pod Security "restricted", no token, and no variables of Services, which strict settings would refuse."""
    spec = pod["spec"]
    assert spec["enableServiceLinks"] is False
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostPID", "hostIPC", "hostNetwork"} & set(spec)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    allowed = {"emptyDir", "persistentVolumeClaim", "secret"}
    assert all(allowed & set(found) for found in spec["volumes"])
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert (
            container["resources"]["limits"]["memory"]
            == container["resources"]["requests"]["memory"]
        )


def _assert_mounts(pod: Object) -> None:
    """Every mount is of a volume, every volume is mounted, and every path that is named lies in a mount."""
    spec = pod["spec"]
    containers = [*spec.get("initContainers", []), *spec["containers"]]
    mounted = {found["name"] for container in containers for found in container["volumeMounts"]}
    assert mounted == {found["name"] for found in spec["volumes"]}
    for container in containers:
        paths = [found["mountPath"] for found in container["volumeMounts"]]
        for named in named_paths(Container(pod, container)):
            assert any(named == path or named.startswith(path + "/") for path in paths), named


def named_paths(container: Container) -> list[str]:
    """Absolute paths in the command line and the environment of a container that runs `quire`."""
    if container.spec["command"][0] != "quire":
        return []
    values = [word.partition("=")[2] for word in container.arguments] + list(container.env.values())
    paths = [value.removeprefix("unix:") for value in values]
    return [path for path in paths if path.startswith("/")]


def _assert_selectors(rendering: Rendering) -> None:
    """Whatever selects Pods selects some, and a Service's ports are ports of theirs."""
    for found in rendering.objects:
        selector = _selector(found)
        if selector is None:
            continue
        selected = [pod for pod in rendering.pods if _matches(selector, pod)]
        assert selected, found["metadata"]["name"]
        if found["kind"] == "Service":
            named = {port["name"] for pod in selected for port in ports_of(pod)}
            assert {port["targetPort"] for port in found["spec"]["ports"]} <= named


def _selector(found: Object) -> Object | None:
    if found["kind"] == "Service":
        return found["spec"]["selector"]
    if found["kind"] == "NetworkPolicy":
        return found["spec"]["podSelector"]["matchLabels"]
    if "selector" in found.get("spec", {}):
        return found["spec"]["selector"]["matchLabels"]
    return None


def _matches(selector: Object, pod: Object) -> bool:
    return selector.items() <= pod["metadata"]["labels"].items()


def ports_of(pod: Object) -> list[Object]:
    """All ports of a Pod, sidecars included; names and numbers are given once."""
    spec = pod["spec"]
    containers = [*spec.get("initContainers", []), *spec["containers"]]
    ports = [port for container in containers for port in container.get("ports", [])]
    assert len({port["name"] for port in ports}) == len(ports)
    assert len({port["containerPort"] for port in ports}) == len(ports)
    assert all(len(port["name"]) <= 15 for port in ports)
    return ports


def _assert_probes(container: Container) -> None:
    """Three probes of a port that the container opens, and a sleep that leaves time to stop."""
    if container.pod["metadata"].get("annotations", {}).get("helm.sh/hook"):
        return
    own = {port["containerPort"] for port in container.spec["ports"]}
    for kind in ("startup", "liveness", "readiness"):
        probe = container.spec[f"{kind}Probe"]["grpc"]
        # `quire up` has started when its compute service has, and its router alone cannot say that but by being ready.
        of_up = (container.name, kind) == ("quire", "startup")
        assert probe["service"] == ("readiness" if of_up else kind)
        assert probe["port"] in own
    sleep = container.spec.get("lifecycle", {}).get("preStop", {}).get("sleep", {"seconds": 0})
    assert sleep["seconds"] < container.pod["spec"]["terminationGracePeriodSeconds"]


def custom_resources(rendering: Rendering) -> list[str]:
    """Kinds of the custom resources in a rendering."""
    return [o["kind"] for o in rendering.objects if (o["apiVersion"], o["kind"]) in CUSTOM]
