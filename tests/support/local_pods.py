"""Runs the containers of a rendering as processes of this machine, as exactly as that goes without containers.

What is replaced: paths below a mount by folders (one for each volume, so that containers which share a volume share the
folder), ports by free ones at a fixed distance, names of Services by the Pods that they select, a GPU by the CPU.
"""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ports import claim_ports
from soundness import ports_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chart import Container, Object, Rendering

BIN = Path(sys.executable).parent
_ANYWHERE = "0.0.0.0:"
_PATIENCE_S = 120


class LocalPods:
    """The Pods of one rendering.

    Args:
        rendering: where containers, Services and volumes come from.
        folder: gets a folder for each volume; short, since sockets lie in it.
        shared: folders of volumes that outlive these Pods, by the volume's name.
    """

    def __init__(self, rendering: Rendering, folder: Path, shared: dict[str, Path]) -> None:
        self._rendering = rendering
        self._folder = folder
        self._shared = shared
        numbers = {port["containerPort"] for pod in rendering.pods for port in ports_of(pod)}
        self._distance = claim_ports(range(8_000, 16_000, 97), numbers)

    @contextmanager
    def running(self, *names: str) -> Iterator[None]:
        """These containers, started in this order, a sidecar before all else, and stopped in reverse."""
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(self._running(self._rendering.container(name)))
            yield

    @contextmanager
    def _running(self, container: Container) -> Iterator[None]:
        command, env = self.command(container)
        process = subprocess.Popen(command, env=env)
        try:
            if container.spec.get("restartPolicy") == "Always":
                # Kubernetes starts the next container once a sidecar has started.
                self.wait_for_probe(container, "startup")
            yield
            assert process.poll() is None, f"{container.name} ended by itself"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                status = process.wait(_seconds_to_stop(container))
            finally:
                process.kill()
                process.wait()
        assert status == 0, container.name

    def run(self, container: Container) -> subprocess.CompletedProcess[str]:
        """Run a container that ends by itself."""
        command, env = self.command(container)
        return subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=120, check=False
        )

    def execute(self, name: str, words: list[str]) -> subprocess.CompletedProcess[str]:
        """`kubectl exec` of a program in a running container."""
        _, env = self.command(self._rendering.container(name))
        return subprocess.run(
            words, env=env, capture_output=True, text=True, timeout=60, check=False
        )

    def command(self, container: Container) -> tuple[list[str], dict[str, str]]:
        """Command line and environment of a container, with what this machine has in place of what a Pod has."""
        words = [*container.spec["command"], *container.arguments]
        env = {name: self._local(value, container) for name, value in container.env.items()}
        return [self._local(word, container) for word in words], {"PATH": str(BIN), **env}

    def _local(self, word: str, container: Container) -> str:
        if word == "--device=cuda":
            return "--device=cpu"
        flag, separator, value = word.rpartition("=")
        for mount in container.spec["volumeMounts"]:
            path = mount["mountPath"]
            if re.match(rf"(unix:)?{path}(/|$)", value):
                where = self._volume(mount["name"])
                return f"{flag}{separator}{value.replace(path, str(where), 1)}"
        if re.fullmatch(r"[-\w.]+:\d+", value):
            return f"{flag}{separator}{self.address(value)}"
        return word

    def _volume(self, name: str) -> Path:
        folder = self._shared.get(name, self._folder / name)
        folder.mkdir(exist_ok=True, parents=True)
        return folder

    def address(self, named: str) -> str:
        """Where "host:port" of the cluster is on this machine."""
        host, _, port = named.rpartition(":")
        number = int(port) if f"{host}:" == _ANYWHERE else self._behind_service(host, int(port))
        return self.local_port(number)

    def local_port(self, number: int) -> str:
        """Where a Pod's port is on this machine."""
        return f"127.0.0.1:{number + self._distance}"

    def _behind_service(self, host: str, port: int) -> int:
        """The port of the Pod that a name of the cluster's DNS leads to: a Service, or one Pod of a headless one."""
        pod_name, _, service_name = host.rpartition(".")
        (service,) = [
            found
            for found in self._rendering.of_kind("Service")
            if found["metadata"]["name"] == service_name
        ]
        if pod_name:
            assert service["spec"]["clusterIP"] == "None"
            assert pod_name in self._pod_names(service_name)
        (target,) = [
            found["targetPort"] for found in service["spec"]["ports"] if found["port"] == port
        ]
        selector = service["spec"]["selector"].items()
        (number,) = [
            found["containerPort"]
            for pod in self._rendering.pods
            if selector <= pod["metadata"]["labels"].items()
            for found in ports_of(pod)
            if found["name"] == target
        ]
        return int(number)

    def _pod_names(self, service_name: str) -> list[str]:
        return [
            f"{found['metadata']['name']}-{index}"
            for found in self._rendering.of_kind("StatefulSet")
            if found["spec"]["serviceName"] == service_name
            for index in range(found["spec"]["replicas"])
        ]

    def wait_for_probe(self, container: Container, kind: str) -> None:
        """Ask what the kubelet would ask, until it is content."""
        probe = container.spec[f"{kind}Probe"]
        deadline = time.monotonic() + _PATIENCE_S
        with grpc.insecure_channel(self.local_port(probe["grpc"]["port"])) as channel:
            while not _is_serving(channel, probe):
                assert time.monotonic() < deadline, f"{container.name}: {kind} does not pass"
                time.sleep(0.1)

    def forwarded(self, line: str) -> tuple[str, str]:
        """What `kubectl port-forward` in the notes opens: the address there, and that on this machine."""
        words = shlex.split(line.removesuffix("&"))
        target, ports = words[-2], words[-1]
        kind, _, name = target.partition("/")
        here, _, there = ports.partition(":")
        if kind == "service":
            return f"127.0.0.1:{here}", self.address(f"{name}:{there}")
        assert kind == "pod"
        service = name.rpartition("-")[0]
        return f"127.0.0.1:{here}", self.address(f"{name}.{service}:{there}")


def _is_serving(channel: grpc.Channel, probe: Object) -> bool:
    request = health_pb2.HealthCheckRequest(service=probe["grpc"]["service"])
    with suppress(grpc.RpcError):
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=probe["timeoutSeconds"])
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
    return False


def _seconds_to_stop(container: Container) -> int:
    """What is left of the Pod's grace period after the sleep of preStop."""
    sleep = container.spec.get("lifecycle", {}).get("preStop", {"sleep": {"seconds": 0}})["sleep"]
    return int(container.pod["spec"]["terminationGracePeriodSeconds"] - sleep["seconds"])
