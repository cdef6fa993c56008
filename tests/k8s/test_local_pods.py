"""What the manifests say is what the services accept: each container's command line runs here, and answers its probes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from chart import ROOT, Rendering, render
from grpcurl import as_buf_curl, run_buf
from local_pods import LocalPods

from quire.client import Client

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTAINERS = {
    "cpu": ("memory", "compute", "router"),
    "single-container": ("quire",),
}
PROBES = ("startup", "liveness", "readiness")


@pytest.fixture(scope="module", params=CONTAINERS)
def pods(request: pytest.FixtureRequest) -> Iterator[tuple[Rendering, LocalPods]]:
    """The Pods of a profile with default values, up and ready; they must end well within their grace periods."""
    rendering = render({"profile": request.param})
    # Compiled kernels are shared with all other tests; a Pod would compile its own.
    numba = Path(os.environ.get("NUMBA_CACHE_DIR", ROOT / ".cache" / "numba"))
    folder = Path(tempfile.mkdtemp(prefix="pods"))
    pods = LocalPods(rendering, folder, {"cache": numba.parent})
    try:
        with pods.running(*CONTAINERS[request.param]):
            for name in CONTAINERS[request.param]:
                pods.wait_for_probe(rendering.container(name), "readiness")
            yield rendering, pods
    finally:
        shutil.rmtree(folder)


def test_dra_differs_from_cpu_by_its_device_alone() -> None:
    """So what is started here of profile cpu holds for dra: command lines, environment, ports and probes are the same."""
    cpu, dra = render({"profile": "cpu"}), render({"profile": "dra"})
    for name in CONTAINERS["cpu"]:
        without, found = cpu.container(name), dra.container(name)
        expected = [word.replace("--device=cpu", "--device=cuda") for word in without.arguments]
        assert found.arguments == expected
        for key in ("command", "env", "ports", "startupProbe", "livenessProbe", "readinessProbe"):
            assert found.spec[key] == without.spec[key]
    assert "--device=cuda" in dra.container("compute").arguments


def started(rendering: Rendering) -> list[str]:
    """Containers that serve, as opposed to the steps of `helm test`."""
    return [found.name for found in rendering.containers() if "startupProbe" in found.spec]


def test_every_container_is_started(pods: tuple[Rendering, LocalPods]) -> None:
    """None of the rendering is left out here, and all answer all three probes by now."""
    rendering, local = pods
    assert tuple(started(rendering)) in CONTAINERS.values()
    for name in started(rendering):
        for kind in PROBES:
            local.wait_for_probe(rendering.container(name), kind)


def test_every_metrics_port_answers(pods: tuple[Rendering, LocalPods]) -> None:
    """Each port named metrics-... serves metrics of ours."""
    rendering, local = pods
    ports = [
        port["containerPort"]
        for name in started(rendering)
        for port in rendering.container(name).spec["ports"]
        if port["name"].startswith("metrics-")
    ]
    assert len(ports) == 3
    for port in ports:
        with urllib.request.urlopen(f"http://{local.local_port(port)}/metrics", timeout=10) as page:
            assert b"\nquire_" in page.read()


def test_helm_test_passes(pods: tuple[Rendering, LocalPods]) -> None:
    """Both steps of the Pod of `helm test`, by the names of the Services."""
    rendering, local = pods
    health = local.run(rendering.container("health"))
    assert (health.returncode, health.stderr) == (0, "")
    generate = local.run(rendering.container("generate"))
    assert (generate.returncode, generate.stderr) == (0, "")
    assert generate.stdout.strip()


def test_the_notes_are_right(pods: tuple[Rendering, LocalPods]) -> None:
    """Every grpcurl line through the port-forward above it, and every `quire inspect` in its container."""
    rendering, local = pods
    forwards: dict[str, str] = {}
    calls = 0
    for line in map(str.strip, rendering.notes.splitlines()):
        if line.startswith("kubectl") and " port-forward " in line:
            here, there = local.forwarded(line)
            forwards[here] = there
        if line.startswith("grpcurl"):
            words = [forwards.get(word, word) for word in shlex.split(line)]
            assert run_buf(as_buf_curl(words)).strip()
            calls += 1
        if line.startswith("kubectl") and " exec " in line:
            calls += 1
            assert_inspects(local, line)
    assert calls == 5


def assert_inspects(local: LocalPods, line: str) -> None:
    words = shlex.split(re.split(r" -- ", line)[1])
    router = ["--router-address", local.local_port(7071)]
    done = local.execute("quire", [*words, *router])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


def test_a_request_is_answered(pods: tuple[Rendering, LocalPods]) -> None:
    """Through the Service that clients use."""
    _, local = pods
    with Client(local.address("quire-router:7071")) as client:
        answer = client.complete("import os", max_tokens=16, ignore_eos=True, temperature=0)
    assert answer.completions[0].finished.usage.num_output_tokens == 16
