"""The chart's values and the services' settings say the same: names, defaults, what is allowed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import pytest
from chart import CHART, Object, render
from soundness import SETTINGS, settings_of

from quire.settings import ComputeSettings, MemorySettings, RouterSettings, UpSettings

if TYPE_CHECKING:
    from quire.settings import CommonSettings

SCHEMA = json.loads((CHART / "values.schema.json").read_text())["properties"]
SINGLE = {"profile": "single-container", "gpu": {"count": 0}}
# What differs between a Pod and a shell: addresses, folders, logs for machines, a longer drain, threads by request.
OF_A_POD = {
    "listen",
    "memory_address",
    "compute_address",
    "descriptor_socket",
    "state_dir",
    "metrics_listen",
    "log_format",
    "shutdown_grace_s",
    "num_threads",
}
# Left to the service: the parent is the container's own business; the others have a value of their own when it is set.
UNSET = {"parent_pid", "max_model_len", "served_model_name", "tenants", "tenant_metadata"}
# Two sets of values, since the two ways to tell tenants apart exclude each other.
EVERYTHING: tuple[Object, ...] = (
    {"model": {"maxModelLen": 512, "servedName": "mine"}, "tenants": {"secretName": "tenants"}},
    {"tenants": {"metadataKey": "x-tenant"}},
)


def defaults_of(service: str) -> CommonSettings:
    return SETTINGS[service]()


@pytest.mark.parametrize(
    ("name", "service", "values"),
    [
        ("memory", "memory", {}),
        ("compute", "compute", {}),
        ("router", "router", {}),
        ("quire", "up", SINGLE),
    ],
)
def test_defaults_agree(
    name: str, service: str, values: Object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With default values a service gets its own defaults, but for what belongs to a Pod."""
    found = settings_of(render(values).container(name), monkeypatch)
    assert found is not None
    expected = defaults_of(service)
    differing = {key for key, value in expected if getattr(found, key) != value}
    assert differing <= OF_A_POD


def named_by(values: Object, container: str) -> set[str]:
    """The settings that a container's command line names."""
    return {
        word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        for word in render(values).container(container).arguments
    }


@pytest.mark.parametrize(
    ("name", "settings", "values"),
    [
        ("memory", MemorySettings, {}),
        ("compute", ComputeSettings, {}),
        ("router", RouterSettings, {}),
        ("quire", UpSettings, SINGLE),
    ],
)
def test_every_setting_is_a_value(
    name: str, settings: type[CommonSettings], values: Object
) -> None:
    """The command line names every setting of the service, so that each has its place in the values."""
    named = set().union(*(named_by({**values, **more}, name) for more in EVERYTHING))
    assert set(settings.model_fields) - named <= {"parent_pid"}
    assert set(settings.model_fields) - named_by(values, name) <= UNSET


def choices(settings: type[CommonSettings], field: str) -> list[Any]:
    annotation = settings.model_fields[field].annotation
    assert get_origin(annotation) is Literal
    return list(get_args(annotation))


def test_the_schema_allows_what_the_services_allow() -> None:
    """Choices are the same words on both sides."""
    assert SCHEMA["model"]["properties"]["dtype"]["enum"] == choices(ComputeSettings, "dtype")
    attention = SCHEMA["compute"]["properties"]["attentionKernel"]["enum"]
    assert attention == choices(ComputeSettings, "attention_kernel")
    logs = SCHEMA["logs"]["properties"]
    assert logs["level"]["enum"] == choices(RouterSettings, "log_level")
    assert sorted(logs["format"]["enum"]) == choices(RouterSettings, "log_format")
    compat = SCHEMA["metrics"]["properties"]["compat"]["enum"]
    assert compat == choices(RouterSettings, "metrics_compat")


def test_values_reach_the_services(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value of scheduling, model, pool, memory and drain arrives in the settings that it is meant for."""
    values = {
        "model": {"dtype": "float32", "maxModelLen": 512, "blockSize": 32, "servedName": "mine"},
        "pool": {
            "sizeMiB": 128,
            "prefixCache": False,
            "minPartialTokens": 0,
            "logCompactMiB": 3,
            "logHistoryMiB": 9,
        },
        "scheduling": {
            "maxNumSeqs": 8,
            "maxNumBatchedTokens": 256,
            "watermark": 0.25,
            "queueLimit": 9,
            "stepsInFlight": 1,
            "streamIntervalMs": 12.5,
        },
        "memory": {"leaseTtlSeconds": 2.5, "maxNumRows": 16},
        "compute": {
            "cpu": 3,
            "memoryPatienceSeconds": 7.5,
            "packedWeights": False,
            "fusedOps": False,
            "fusedLayers": False,
            "attentionKernel": "reference",
        },
        "drain": {"preStopSeconds": 7, "graceSeconds": 11},
        "logs": {"level": "warning", "format": "console"},
        "metrics": {"enabled": False, "compat": "vllm"},
        "tenants": {"metadataKey": "x-tenant"},
    }
    rendering = render(values)
    memory, compute, router = (
        settings_of(rendering.container(name), monkeypatch)
        for name in ("memory", "compute", "router")
    )
    assert isinstance(memory, MemorySettings)
    assert isinstance(compute, ComputeSettings)
    assert isinstance(router, RouterSettings)
    assert (memory.memory_budget, memory.prefix_cache) == (128 << 20, False)
    assert (memory.lease_ttl_s, memory.max_num_rows) == (2.5, 16)
    assert memory.min_partial_tokens == 0
    assert (memory.log_compact_size, memory.log_history) == (3 << 20, 9 << 20)
    assert (compute.dtype, compute.max_model_len, compute.block_size) == ("float32", 512, 32)
    assert (compute.num_threads, compute.metrics_listen) == (3, "off")
    assert compute.memory_patience_s == 7.5
    switches = (compute.packed_weights, compute.fused_ops, compute.fused_layers)
    assert switches == (False, False, False)
    assert compute.attention_kernel == "reference"
    assert (router.max_num_seqs, router.max_num_batched_tokens) == (8, 256)
    assert (router.watermark, router.queue_limit) == (0.25, 9)
    assert (router.stream_interval_ms, router.steps_in_flight) == (12.5, 1)
    assert (router.served_model_name, router.metrics_compat) == ("mine", "vllm")
    assert (router.tenants, router.tenant_metadata) == (None, "x-tenant")
    assert (router.shutdown_grace_s, router.log_level, router.log_format) == (
        11,
        "warning",
        "console",
    )
