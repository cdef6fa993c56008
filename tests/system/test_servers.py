"""What all three servers have in common, and what their processes hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from processes import children_of

if TYPE_CHECKING:
    from processes import Quire

SERVICES = {
    "router": {"quire.router.v1.RouterService"},
    "compute": {"quire.compute.v1.ComputeService"},
    "memory": {
        "quire.memory.v1.MemoryService",
        "quire.memory.v1.PoolService",
        "quire.memory.v1.InspectionService",
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
