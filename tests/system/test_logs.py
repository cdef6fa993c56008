"""What a system under mixed load logs: one JSON record a line, with ids, without what clients said."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixed_load import CALL_IDS, MARKER, POISONED_PROMPT

if TYPE_CHECKING:
    from mixed_load import Evidence


def test_every_line_is_a_record(loaded: Evidence) -> None:
    """Each line of three processes, from start to stop, parses and says what happened, when, how grave and where."""
    records = loaded.log()
    assert {"session_ended", "writer_gone"} <= {record["event"] for record in records}
    assert {record["service"] for record in records} == {"memory", "compute", "router"}
    for record in records:
        assert {"event", "level", "timestamp", "service"} <= set(record)


def test_no_record_holds_text_or_tokens(loaded: Evidence) -> None:
    """The prompts' marker is nowhere, rejected, failed and cancelled requests included; nor is a prompt in tokens."""
    text = loaded.log_file.read_text()
    assert MARKER not in text
    assert MARKER.split()[-1] not in text
    assert ", ".join(map(str, POISONED_PROMPT)) not in text


def test_each_accepted_request_has_one_line_at_its_end(loaded: Evidence) -> None:
    """With the reason, counts and times that its client saw, under its id."""
    records = {record["request_id"]: record for record in loaded.records("finished")}
    assert len(records) == len(loaded.records("finished"))
    assert set(records) == {*loaded.finished, *loaded.cancelled, *loaded.failed}
    assert {found["request_id"] for found in loaded.records("accepted")} == set(records)
    for name, samples in loaded.finished.items():
        usage, record = samples[0].usage, records[name]
        assert record["num_prompt_tokens"] == usage.num_prompt_tokens
        assert record["num_cached_tokens"] == usage.num_cached_tokens
        num_output = sum(sample.usage.num_output_tokens for sample in samples)
        assert record["num_output_tokens"] == num_output
        assert 0 <= record["queue_s"] <= record["ttft_s"] <= record["e2e_s"]
    assert records["left"]["finish_reason"] == "CANCELLED"
    assert (records["poisoned"]["finish_reason"], records["poisoned"]["ttft_s"]) == ("ERROR", None)


def test_the_ids_of_a_call_are_on_its_own_records_only(loaded: Evidence) -> None:
    """`x-request-id` and `traceparent` of a call's metadata: on its request's records, on nobody else's."""
    sent = {
        "x_request_id": CALL_IDS["x-request-id"],
        "traceparent": CALL_IDS["traceparent"],
    }
    for event in ("accepted", "finished"):
        for record in loaded.records(event):
            found = {key: record[key] for key in sent if key in record}
            is_ours = record["request_id"] in loaded.finished and record["request_id"] != "aborted"
            assert found == (sent if is_ours else {})


def test_rejections_name_the_fields(loaded: Evidence) -> None:
    """A rejected request is logged with its reason and the fields that were wrong, not with what they held."""
    found = {
        record["request_id"]: (record["reason"], record["fields"])
        for record in loaded.records("rejected")
    }
    assert found == {
        "wrong": ("INVALID_REQUEST", ["sampling.top_p"]),
        "long": ("CONTEXT_LENGTH_EXCEEDED", ["text"]),
        "large": ("POOL_TOO_SMALL", []),
        "aborted": ("REQUEST_ID_IN_USE", []),
        "": ("INVALID_REQUEST", ["conversation"]),
    }


def test_failing_steps_name_the_guilty_request(loaded: Evidence) -> None:
    """Router and compute log the failed steps; the request that caused them is named once."""
    services = {record["service"] for record in loaded.records("step_failed")}
    assert services == {"router", "compute"}
    (guilty,) = loaded.records("makes_steps_fail")
    assert (guilty["request_id"], guilty["sequence_id"]) == ("poisoned", "poisoned/0")


def test_pool_and_session_are_told(loaded: Evidence) -> None:
    """A pool is created and attached, a session opened with both services, each under its id."""
    (pool,) = loaded.records("pool_created")
    (attached,) = loaded.records("pool_attached")
    sessions = loaded.records("session_opened")
    assert pool["pool_id"] == attached["pool_id"] == loaded.pool.pool_id
    assert {record["service"] for record in sessions} == {"memory", "compute"}
    (session_id,) = {record["session_id"] for record in sessions}
    assert session_id.startswith("router-")
