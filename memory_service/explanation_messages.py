"""The answer of Explain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memory_service.inspection_messages import timestamp
from protos.memory.v1 import inspection_pb2 as pb
from quire.errors import FieldViolation, InvalidRequest

if TYPE_CHECKING:
    from memory_service.explanations import Explanation, Explanations


def explain(
    explanations: Explanations, request: pb.ExplainRequest, tenant: str | None, revision: int
) -> pb.ExplainResponse:
    """What is known about what is asked about, as one tenant may know it; raises InvalidRequest."""
    asks_block = request.HasField("block_id")
    if asks_block == bool(request.sequence_id):
        description = "exactly one of sequence_id and block_id is set"
        raise InvalidRequest.of([FieldViolation("sequence_id", description)])
    if asks_block:
        found = explanations.of_block(request.block_id, tenant)
    else:
        found = explanations.of_sequence(request.sequence_id, tenant)
    return pb.ExplainResponse(
        revision=str(revision), explanations=[_explanation(each) for each in found]
    )


def _explanation(found: Explanation) -> pb.Explanation:
    return pb.Explanation(
        kind=pb.DecisionKind.ValueType(found.kind.value),
        reason=found.reason,
        revision=str(found.revision),
        time=timestamp(found.time),
        num_times=str(found.num_times),
        sequence_id=found.sequence_id,
        num_needed_blocks=found.num_needed_blocks,
        num_available_blocks=found.num_available_blocks,
        cause_sequence_id=found.cause_sequence_id,
    )
