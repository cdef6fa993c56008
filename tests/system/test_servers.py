"""What all three servers have in common, and what their processes hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from processes import children_of, running_service

from quire.client import Client
from quire.errors import NotReady

if TYPE_CHECKING:
    from pathlib import Path

    from processes import Quire

SERVICES = {
    "router": {"quire.router.v1.RouterService"},
    "compute": {"quire.compute.v1.ComputeService"},
    "memory": {
        "quire.memory.v1.MemoryService",
        "quire.memory.v1.PoolService",
        "quire.memory.v1.InspectionService",
        "quire.memory.v1.ControlService",
    },
}
COMMON = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_reflection_lists_the_services(name: str, quire: Quire) -> None:
    """Each server names what it serves, so that no proto file is needed to call it."""
    with grpc.insecure_channel(quire.addresses[name]) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = stub.ServerReflectionInfo(iter([request]))
        found = {service.name for service in answer.list_services_response.service}
    assert found == SERVICES[name] | COMMON


@pytest.mark.parametrize("name", sorted(SERVICES))
@pytest.mark.parametrize("probe", ["", "startup", "liveness", "readiness"])
def test_health_answers_every_probe(name: str, probe: str, quire: Quire) -> None:
    """The services that Kubernetes asks for are SERVING once all is ready."""
    with grpc.insecure_channel(quire.addresses[name]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service=probe))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_only_compute_holds_torch(quire: Quire) -> None:
    """No library of torch is mapped by a running router or memory service; the compute service has it."""
    mapped = {
        name: any("libtorch" in region.path for region in process.memory_maps())
        for name, process in children_of(quire).items()
    }
    assert mapped == {"memory_service": False, "router": False, "compute_service": True}


def test_grpc_s_core_keeps_its_remarks_to_itself(quire: Quire) -> None:
    """Its lines about connections that end well would stand among the records on stderr."""
    told = [process.environ()["GRPC_VERBOSITY"] for process in children_of(quire).values()]
    assert told == ["ERROR"] * 3


def probes(channel: grpc.Channel) -> dict[str, str]:
    """What each probe of Kubernetes is answered."""
    stub = health_pb2_grpc.HealthStub(channel)
    found = {}
    for name in ("startup", "liveness", "readiness"):
        request = health_pb2.HealthCheckRequest(service=name)
        answer = stub.Check(request, timeout=120, wait_for_ready=True)
        found[name] = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return found


def test_a_router_without_an_engine_is_alive_but_not_ready(tmp_path: Path) -> None:
    """It answers probes and reflection, and tells callers in words; a restart would not bring the engine nearer."""
    router = f"unix:{tmp_path}/r"
    nowhere = ("--memory-address", f"unix:{tmp_path}/m", "--compute-address", f"unix:{tmp_path}/c")
    with running_service("router", "--listen", router, *nowhere):
        with grpc.insecure_channel(router) as channel:
            assert probes(channel) == {
                "startup": "SERVING",
                "liveness": "SERVING",
                "readiness": "NOT_SERVING",
            }
        with Client(router) as client, pytest.raises(NotReady, match="waits for the memory"):
            client.complete([5], max_tokens=1)


def test_compute_has_started_once_its_model_serves(tmp_path: Path) -> None:
    """While it loads, or waits for a memory service, it is alive and has not started: a load that hangs shows."""
    compute = f"unix:{tmp_path}/c"
    nowhere = ("--memory-address", f"unix:{tmp_path}/m")
    with (
        running_service("compute", "--listen", compute, *nowhere),
        grpc.insecure_channel(compute) as channel,
    ):
        assert probes(channel) == {
            "startup": "NOT_SERVING",
            "liveness": "SERVING",
            "readiness": "NOT_SERVING",
        }
