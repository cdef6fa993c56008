"""A live system under mixed load, scraped while it runs: the numbers add up, and are those that clients saw."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from processes import QUIRE, free_port
from scraping import scrape_all

from protos.router.v1 import router_pb2 as pb

if TYPE_CHECKING:
    from mixed_load import Evidence
    from processes import Quire
    from scraping import Scrape

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "k8s" / "chart" / "dashboards" / "quire.json"
DOCUMENTATION = ROOT / "docs" / "metrics.md"
REASONS = {
    pb.FINISH_REASON_STOP: "STOP",
    pb.FINISH_REASON_LENGTH: "LENGTH",
    pb.FINISH_REASON_CANCELLED: "CANCELLED",
}
VLLM_NAMES = {
    "vllm:num_requests_running": "quire_num_requests_running",
    "vllm:num_requests_waiting": "quire_num_requests_waiting",
    "vllm:prefix_cache_queries_total": "quire_prompt_tokens_total",
    "vllm:prefix_cache_hits_total": "quire_prompt_tokens_cached_total",
    "vllm:num_preemptions_total": "quire_num_preemptions_total",
    "vllm:prompt_tokens_total": "quire_prompt_tokens_total",
    "vllm:generation_tokens_total": "quire_output_tokens_total",
    "vllm:time_to_first_token_seconds_count": "quire_time_to_first_token_seconds_count",
    "vllm:inter_token_latency_seconds_sum": "quire_inter_token_latency_seconds_sum",
    "vllm:e2e_request_latency_seconds_count": "quire_e2e_seconds_count",
    "vllm:request_success_total/length": "quire_requests_finished_total/LENGTH",
    "vllm:request_success_total/abort": "quire_requests_finished_total/CANCELLED",
}


def routers(evidence: Evidence) -> list[Scrape]:
    return [found["router"] for found in evidence.scrapes]


def test_every_accepted_request_is_live_or_finished(loaded: Evidence) -> None:
    """In every scrape, under load: accepted = finished for one reason + running + waiting."""
    were_live = 0
    for found in routers(loaded):
        num_live = found["quire_num_requests_running"] + found["quire_num_requests_waiting"]
        num_finished = sum(found.family("quire_requests_finished_total").values())
        assert found["quire_requests_accepted_total"] == num_finished + num_live
        were_live += num_live > 1
    assert were_live > 3


def test_no_counter_ever_falls(loaded: Evidence) -> None:
    """Counters and histograms of all services only rise from scrape to scrape; none vanishes."""
    for earlier, later in zip(loaded.scrapes, loaded.scrapes[1:], strict=False):
        for service, found in earlier.items():
            fallen = [
                key for key in found.rising if not found[key] <= later[service].values.get(key, -1)
            ]
            assert fallen == []


def test_finish_reasons_are_those_that_clients_saw(loaded: Evidence) -> None:
    """Each request in one reason, the gravest of its samples; rejected ones apart, by reason."""
    expected = Counter(
        REASONS[max(sample.finish_reason for sample in samples)]
        for samples in loaded.finished.values()
    )
    expected["CANCELLED"] += len(loaded.cancelled)
    expected["ERROR"] += len(loaded.failed)
    assert set(expected) == {"STOP", "LENGTH", "CANCELLED", "ERROR"}
    router = loaded.last["router"]
    assert router.family("quire_requests_finished_total") == expected
    rejected = router.family("quire_requests_rejected_total")
    assert {reason: count for reason, count in rejected.items() if count} == loaded.rejected
    assert len(loaded.rejected) == 4


def test_tokens_are_those_that_clients_saw(loaded: Evidence) -> None:
    """Prompt, cached and output tokens; a first token for each request, a gap for each later token of a sample."""
    usages = [sample.usage for samples in loaded.finished.values() for sample in samples]
    alone = {record["request_id"]: record for record in loaded.records("finished")}
    unseen = [alone[name] for name in loaded.cancelled | loaded.failed]
    firsts = [samples[0].usage for samples in loaded.finished.values()]
    num_output = sum(usage.num_output_tokens for usage in usages)
    num_output += sum(record["num_output_tokens"] for record in unseen)
    num_first = len(usages) + len(loaded.cancelled)
    router = loaded.last["router"]
    assert router["quire_output_tokens_total"] == num_output
    assert router["quire_inter_token_latency_seconds_count"] == num_output - num_first
    num_with_output = len(firsts) + len(loaded.cancelled)
    assert router["quire_time_to_first_token_seconds_count"] == num_with_output
    for name, key in (
        ("quire_prompt_tokens_total", "num_prompt_tokens"),
        ("quire_prompt_tokens_cached_total", "num_cached_tokens"),
    ):
        seen = sum(getattr(usage, key) for usage in firsts)
        assert router[name] == seen + sum(record[key] for record in unseen) > 0
    num_accepted = router["quire_requests_accepted_total"]
    assert router["quire_e2e_seconds_count"] == num_accepted
    assert router["quire_queue_seconds_count"] == num_accepted


def test_preemptions_are_counted_and_logged(loaded: Evidence) -> None:
    """The pool was too small for all: each preempted sequence is counted once, and named in the log."""
    records = loaded.records("preempted")
    assert loaded.last["router"]["quire_num_preemptions_total"] == len(records) > 0
    assert all(record["sequence_id"].startswith(record["request_id"]) for record in records)


def test_the_pool_adds_up(loaded: Evidence) -> None:
    """In every scrape, under load: 1 null block + free + cached + used = all."""
    most_used = 0.0
    for found in loaded.scrapes:
        states = found["memory"].family("quire_pool_blocks")
        assert set(states) == {"free", "cached", "used"}
        assert 1 + sum(states.values()) == found["memory"]["quire_pool_num_blocks"]
        most_used = max(most_used, states["used"])
    assert most_used > 10


def test_the_pool_is_what_inspection_shows(loaded: Evidence) -> None:
    """The same numbers by two ways."""
    memory, pool = loaded.last["memory"], loaded.pool
    assert memory.family("quire_pool_blocks") == {
        "free": pool.num_free_blocks,
        "cached": pool.num_cached_blocks,
        "used": pool.num_used_blocks,
    }
    same = {
        "quire_pool_num_blocks": pool.num_blocks,
        "quire_pool_num_shared_blocks": pool.num_shared_blocks,
        "quire_pool_num_sequences": pool.num_sequences,
        "quire_pool_bytes": pool.size_mib * (1 << 20),
        "quire_num_sessions": pool.num_sessions,
        "quire_writer_alive": pool.writer_alive,
        "quire_num_evictions_total": int(pool.num_evictions),
        "quire_prefix_query_tokens_total": int(pool.num_prefix_query_tokens),
        "quire_prefix_hit_tokens_total": int(pool.num_prefix_hit_tokens),
    }
    assert {name: memory[name] for name in same} == same
    assert memory["quire_num_admissions_refused_total/NO_BLOCKS"] > 0
    assert memory["quire_integrity_findings_total"] == 0


def test_the_services_tell_of_the_same_steps(loaded: Evidence) -> None:
    """Steps, failures and time on the device are the same for router and compute; memory answered at least as many."""
    router, memory, compute = (loaded.last[name] for name in ("router", "memory", "compute"))
    assert router["quire_num_steps_total"] == compute["quire_compute_num_steps_total"]
    assert memory["quire_memory_num_steps_total"] >= router["quire_num_steps_total"]
    num_failures = router["quire_num_step_failures_total"]
    assert num_failures == compute["quire_compute_num_step_failures_total"] > 0
    num_ran = router["quire_num_steps_total"] - num_failures
    stages = router.family("quire_step_seconds_count")
    assert stages == dict.fromkeys(("plan", "memory", "device", "compute_wait", "publish"), num_ran)
    assert compute["quire_compute_device_seconds_count"] == num_ran
    device_s = compute["quire_compute_device_seconds_sum"]
    assert router["quire_step_seconds_sum/device"] == pytest.approx(device_s)
    assert compute["quire_compute_outputs_total"] >= router["quire_output_tokens_total"]
    assert compute["quire_compute_model_load_seconds"] > 0


def test_vllm_names_carry_the_same_numbers(loaded: Evidence, quire: Quire) -> None:
    """With `--metrics-compat vllm` each name has our number, in every scrape; without it there is none."""
    for found in routers(loaded):
        theirs = {key.replace("/model", ""): value for key, value in found.values.items()}
        for name, ours in VLLM_NAMES.items():
            assert theirs[name] == found[ours]
        assert 0 <= theirs["vllm:kv_cache_usage_perc"] <= 1
    num_blocks = f"{loaded.pool.num_blocks}"
    (config,) = (key for key in found.values if key.startswith("vllm:cache_config_info/"))
    assert set(config.split("/")[1:]) == {"16", "float32", "True", "model", num_blocks}
    without = scrape_all(quire.addresses)["router"].values
    assert not any(key.startswith("vllm:") for key in without)


def test_the_dashboard_asks_for_what_is_there(loaded: Evidence) -> None:
    """Every metric in the dashboard's queries is in a live scrape; ids are unique, no data source is fixed."""
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    there = {name for found in loaded.last.values() for name in found.names}
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    asked = set(re.findall(r"\bquire_\w+", " ".join(expressions)))
    assert len(asked) > 25
    assert asked <= there
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert set(re.findall(r'"uid": "([^"]+)"', json.dumps(panels))) == {"${datasource}"}
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {
        "datasource",
        "namespace",
        "job",
        "instance",
    }


def test_the_documentation_names_every_metric(loaded: Evidence) -> None:
    """docs/metrics.md has a row for each of our metrics in a live scrape, and for no other."""
    rows = re.findall(r"^\| `(quire_\w+)` \|", DOCUMENTATION.read_text(), re.MULTILINE)
    suffixes = re.compile("_(bucket|count|sum)$")
    there = {
        suffixes.sub("", name) if f"{suffixes.sub('', name)}_bucket" in found.names else name
        for found in loaded.last.values()
        for name in found.names
        if name.startswith("quire_")
    }
    assert sorted(rows) == sorted(there)


def run_memory(tmp_path: Path, metrics_listen: str) -> subprocess.Popen[str]:
    sockets = ("--listen", f"unix:{tmp_path}/m", "--descriptor-socket", f"{tmp_path}/d")
    command = [QUIRE, "memory", *sockets, "--metrics-listen", metrics_listen]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    """A metrics address that somebody listens on ends the start, and is named; so does one that makes no sense."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        _, error = run_memory(tmp_path, address).communicate(timeout=30)
        assert error == f"error: cannot serve metrics on {address}: Address already in use\n"
    process = run_memory(tmp_path, "somewhere")
    _, error = process.communicate(timeout=30)
    assert process.returncode == 1
    assert error == "error: cannot serve metrics on 'somewhere': write host:port or off\n"


def test_up_names_a_taken_port_before_it_starts_anything() -> None:
    """The metrics of `quire up` are 10, 11 and 12 above the router's port; a taken one is one line."""
    port = free_port()
    with socket.create_server(("127.0.0.1", port + 11)):
        ended = subprocess.run(
            [QUIRE, "up", "--listen", f"127.0.0.1:{port}"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    expected = f"error: cannot listen on 127.0.0.1:{port + 11}: Address already in use\n"
    assert (ended.returncode, ended.stderr) == (1, expected)


def test_off_opens_no_port(tmp_path: Path) -> None:
    """A service with `--metrics-listen off` has no TCP socket but those of gRPC."""
    process = run_memory(tmp_path, "off")
    assert process.stderr is not None
    assert "serving" in process.stderr.readline()
    assert psutil.Process(process.pid).net_connections("tcp") == []
    process.terminate()
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (0, "")
