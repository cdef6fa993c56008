"""Errors: one list of reasons in the contract and in the code."""

from __future__ import annotations

import pytest

from protos.common.v1 import error_reason_pb2
from quire.errors import ErrorReason, FieldViolation, InvalidRequest, QueueFull
from quire.rpc_status import to_status

PREFIX = "ERROR_REASON_"


def test_the_contract_names_every_reason() -> None:
    """The enum of the contract and the reasons that are sent are the same."""
    names = {name.removeprefix(PREFIX) for name in error_reason_pb2.ErrorReason.keys()}  # noqa: SIM118 -- no dict
    assert names - {"UNSPECIFIED"} == {reason.value for reason in ErrorReason}


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest.of([FieldViolation("a", "is wrong"), FieldViolation("b", "is too")]),
        QueueFull("full", metadata={"num_waiting": 3}, retry_after_s=0.5),
    ],
)
def test_a_status_carries_reason_and_details(error: InvalidRequest | QueueFull) -> None:
    """Code, message and details of an error are in the status that is sent."""
    status = to_status(error)
    assert (status.code.name, status.details) == (error.code, error.message)
    ((key, packed),) = status.trailing_metadata
    assert key == "grpc-status-details-bin"
    assert error.reason.value.encode() in packed
