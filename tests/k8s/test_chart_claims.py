"""What the chart promises, one promise a test."""

from __future__ import annotations

import json
import re
import socket

import pytest
from chart import CHART, PROFILES, Object, render
from soundness import settings_of

from quire.serving import resolve


def test_a_model_on_a_claim() -> None:
    """Compute and router mount it at the same path, read-only; compute serves the folder of it."""
    rendering = render({"model": {"source": "pvc", "claimName": "models", "path": "llama/8b"}})
    assert "--model=/model/llama/8b" in rendering.container("compute").arguments
    for name in ("compute", "router"):
        container = rendering.container(name)
        assert {"name": "model", "mountPath": "/model", "readOnly": True} in container.spec[
            "volumeMounts"
        ]
        (volume,) = [v for v in container.pod["spec"]["volumes"] if v["name"] == "model"]
        assert volume["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}


@pytest.mark.parametrize(("profile", "name"), [("cpu", "router"), ("single-container", "quire")])
def test_tenants_come_from_a_secret(profile: str, name: str) -> None:
    """The router reads the key tenants.yaml of the Secret, read-only; nobody else mounts it, and none by default."""
    rendering = render({"profile": profile, "tenants": {"secretName": "who-calls"}})
    container = rendering.container(name)
    assert "--tenants=/etc/quire/tenants/tenants.yaml" in container.arguments
    mount = {"name": "tenants", "mountPath": "/etc/quire/tenants", "readOnly": True}
    holders = [c for c in rendering.containers() if mount in c.spec["volumeMounts"]]
    assert [found.spec["name"] for found in holders] == [name]
    (volume,) = [v for v in container.pod["spec"]["volumes"] if v["name"] == "tenants"]
    assert volume["secret"] == {"secretName": "who-calls", "defaultMode": 0o440}
    plain = render({"profile": profile}).container(name).pod["spec"]["volumes"]
    assert "tenants" not in [found["name"] for found in plain]


def test_grace_periods_follow_from_the_drain() -> None:
    """The engine outlives the router's drain, and each Pod has time for its own."""
    rendering = render({"drain": {"preStopSeconds": 7, "graceSeconds": 100}})
    router, compute = rendering.container("router"), rendering.container("compute")
    assert router.spec["lifecycle"]["preStop"] == {"sleep": {"seconds": 7}}
    assert router.pod["spec"]["terminationGracePeriodSeconds"] == 7 + 100 + 10
    assert compute.spec["lifecycle"]["preStop"]["sleep"]["seconds"] >= 7 + 100
    left = compute.pod["spec"]["terminationGracePeriodSeconds"] - 112
    assert left >= 20 + 5
    single = render(
        {"profile": "single-container", "drain": {"preStopSeconds": 7, "graceSeconds": 100}}
    )
    grace = single.container("quire").pod["spec"]["terminationGracePeriodSeconds"]
    assert grace >= 7 + 3 * (100 + 5)


def test_loading_a_model_has_its_time() -> None:
    """It bounds the start of compute and of `quire up`; the router's own start is short, its roll-out is not."""
    long = {"startupSeconds": 3001}

    def start_of(name: str, values: Object) -> tuple[str, int]:
        probe = render(values).container(name).spec["startupProbe"]
        return probe["grpc"]["service"], probe["periodSeconds"] * probe["failureThreshold"]

    assert start_of("compute", long) == ("startup", 3002)
    assert start_of("quire", {"profile": "single-container", **long}) == ("readiness", 3002)
    assert start_of("router", long) == ("startup", 60)
    assert render(long).named("Deployment", "-router")["spec"]["progressDeadlineSeconds"] == 3601


def test_the_memory_port_is_closed_to_others() -> None:
    """Only the release's router reaches memory and compute, a listed peer memory; nothing leaves the engine."""
    policy = render().named("NetworkPolicy", "-engine")["spec"]
    peer = policy["podSelector"]["matchLabels"] | {"app.kubernetes.io/component": "router"}
    first, metrics = policy["ingress"]
    assert first["from"] == [{"podSelector": {"matchLabels": peer}}]
    assert [port["port"] for port in first["ports"]] == [7072, 7073]
    assert [port["port"] for port in metrics["ports"]] == [7082, 7083]
    assert policy["egress"] == []
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    listed = [{"podSelector": {"matchLabels": {"team": "sre"}}}]
    opened = render({"networkPolicy": {"allowInspectionFrom": listed}})
    rules = opened.named("NetworkPolicy", "-engine")["spec"]["ingress"]
    assert {"from": listed, "ports": [{"protocol": "TCP", "port": 7072}]} in rules


def test_the_router_may_ask_dns() -> None:
    """In kube-system and at the node's own cache, on port 53; on other ports and anywhere when told so."""

    def rule(values: Object) -> Object:
        found = render(values).named("NetworkPolicy", "-router")["spec"]["egress"][1]
        assert {port["protocol"] for port in found["ports"]} == {"TCP", "UDP"}
        return {"to": found.get("to"), "ports": sorted({port["port"] for port in found["ports"]})}

    system = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}
    cache = {"ipBlock": {"cidr": "169.254.20.10/32"}}
    assert rule({}) == {"to": [system, cache], "ports": [53]}
    elsewhere = {"allowDnsTo": [], "dnsPorts": [53, 5353]}
    assert rule({"networkPolicy": elsewhere}) == {"to": None, "ports": [53, 5353]}


@pytest.mark.parametrize("profile", PROFILES)
def test_listening_with_ipv6(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With listenHost every TCP address that a service listens on changes, and is one that it can resolve."""
    for container in render({"profile": profile, "listenHost": "[::]"}).containers():
        found = settings_of(container, monkeypatch)
        if found is None or container.name == "generate":
            continue
        told = found.model_dump()
        listen = [told["listen"]] if isinstance(told["listen"], str) else told["listen"]
        metrics = [told["metrics_listen"]] if "metrics_listen" in told else []
        tcp = [address for address in [*listen, *metrics] if not address.startswith("unix:")]
        assert {address.rpartition(":")[0] for address in tcp} == {"[::]"}
        assert {resolve(address)[0] for address in tcp} == {socket.AF_INET6}


def test_helm_test_is_always_a_client() -> None:
    """Where clients are listed, the Pod of `helm test` is one of them; where none is, everyone is."""
    assert "from" not in render().named("NetworkPolicy", "-router")["spec"]["ingress"][0]
    listed = {"networkPolicy": {"allowClientsFrom": [{"podSelector": {"matchLabels": {"a": "b"}}}]}}
    rule = render(listed).named("NetworkPolicy", "-router")["spec"]["ingress"][0]
    labels = [found["podSelector"]["matchLabels"] for found in rule["from"]]
    test_pod = render().container("generate").pod
    assert any(found.items() <= test_pod["metadata"]["labels"].items() for found in labels)


def test_helm_test_runs_where_the_router_may() -> None:
    """Its Pod has the node selector and the tolerations of the Pod that holds the router."""
    placement: Object = {
        "nodeSelector": {"pool": "llm"},
        "tolerations": [{"key": "llm", "operator": "Exists"}],
    }
    for values in ({"router": placement}, {"profile": "single-container", "engine": placement}):
        spec = render(values).container("generate").pod["spec"]
        assert {key: spec[key] for key in placement} == placement


def test_dra_gives_one_claim_to_both_containers() -> None:
    """Memory and compute name the claim that the template makes."""
    rendering = render({"profile": "dra"})
    (template,) = rendering.of_kind("ResourceClaimTemplate")
    pod = rendering.container("compute").pod["spec"]
    (claim,) = pod["resourceClaims"]
    assert claim["resourceClaimTemplateName"] == template["metadata"]["name"]
    for name in ("memory", "compute"):
        assert rendering.container(name).spec["resources"]["claims"] == [{"name": claim["name"]}]


def test_another_claim_is_another_object() -> None:
    """The spec of a claim template is immutable, so its name follows from it; what is not in it leaves the name alone."""

    def name_with(values: Object) -> str:
        rendering = render({"profile": "dra", **values})
        (claim,) = rendering.container("compute").pod["spec"]["resourceClaims"]
        (template,) = rendering.of_kind("ResourceClaimTemplate")
        assert claim["resourceClaimTemplateName"] == template["metadata"]["name"]
        return str(template["metadata"]["name"])

    first = name_with({})
    assert re.fullmatch("quire-gpu-[0-9a-f]{8}", first)
    assert name_with({"pool": {"sizeMiB": 64}}) == first
    others = {
        name_with({"gpu": {"deviceClassName": "mig.nvidia.com"}}),
        name_with({"gpu": {"selectors": ["true"]}}),
    }
    assert len(others - {first}) == 2


def test_memory_is_a_native_sidecar() -> None:
    """It starts before compute and stops after it."""
    spec = render().container("memory").pod["spec"]
    (memory,) = spec["initContainers"]
    assert (memory["name"], memory["restartPolicy"]) == ("memory", "Always")
    assert [found["name"] for found in spec["containers"]] == ["compute"]


def test_the_dashboard_is_the_file() -> None:
    """Behind its value: a ConfigMap with Grafana's label and the file as it is."""
    assert render().of_kind("ConfigMap") == []
    (found,) = render({"metrics": {"dashboard": {"enabled": True}}}).of_kind("ConfigMap")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    dashboard = json.loads((CHART / "dashboards" / "quire.json").read_text())
    assert json.loads(found["data"]["quire.json"]) == dashboard


def test_the_dashboard_chooses_what_it_shows() -> None:
    """Every query is narrowed by every variable, so that two releases in one Prometheus stay apart."""
    dashboard = json.loads((CHART / "dashboards" / "quire.json").read_text())
    names = [found["name"] for found in dashboard["templating"]["list"]]
    assert names == ["datasource", "namespace", "job", "instance"]
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", [])]
    for expression in expressions:
        selectors = re.findall(r"\bquire_\w+(\{[^}]*\})?", expression)
        assert selectors
        for selector in selectors:
            assert all(f'{name}=~"${name}"' in selector for name in names[1:])


def test_the_monitor_scrapes_every_metrics_port() -> None:
    """Behind its value: the ports that it names are those of the containers."""
    rendering = render({"metrics": {"podMonitor": {"enabled": True}}})
    (monitor,) = rendering.of_kind("PodMonitor")
    named = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    ports = {p["name"] for c in rendering.containers() for p in c.spec.get("ports", [])}
    assert named == {name for name in ports if name.startswith("metrics-")}


def test_the_notes_warn_of_what_is_open() -> None:
    """A load balancer for everyone and a missing network policy are named; the defaults give no warning."""
    balanced: Object = {"service": {"type": "LoadBalancer"}}
    listed = {"networkPolicy": {"allowClientsFrom": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}}
    assert "WARNING" not in render().notes
    assert "WARNING: service.type LoadBalancer" in render(balanced).notes
    assert "WARNING" not in render({**balanced, **listed}).notes
    assert "WARNING: networkPolicy" in render({"networkPolicy": {"enabled": False}}).notes
    named: Object = {"tenants": {"metadataKey": "x-tenant"}}
    assert "WARNING: tenants.metadataKey" in render(named).notes
    assert "WARNING" not in render({**named, **listed}).notes


def test_the_notes_name_the_model() -> None:
    """The folder on the claim, or its root."""
    root = {"source": "pvc", "claimName": "models"}
    assert "serves /model of the claim models" in render({"model": root}).notes
    assert "serves /model/a of the claim models" in render({"model": {**root, "path": "a"}}).notes
