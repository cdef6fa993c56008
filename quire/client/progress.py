"""What is known of a generation while its events arrive."""

from __future__ import annotations

from protos.router.v1 import router_pb2 as pb

_CUT_OFF = (pb.FINISH_REASON_CANCELLED, pb.FINISH_REASON_ERROR)


class GenerationProgress:
    """The events of a request that are not output."""

    def __init__(self) -> None:
        self.accepted: pb.Accepted | None = (
            None  # request id, prompt tokens, seed; set by the first event
        )
        self.finished: dict[int, pb.Finished] = {}  # by sample index; whole after the last delta

    @property
    def was_cut_off(self) -> bool:
        """Whether a sample ended before its time: aborted, or by a router that shuts down."""
        return any(found.finish_reason in _CUT_OFF for found in self.finished.values())

    def take(self, event: pb.GenerateResponse) -> pb.Delta | None:
        """Note `event`; the delta when it is one."""
        kind = event.WhichOneof("event")
        if kind == "delta":
            return event.delta
        if kind == "accepted":
            self.accepted = event.accepted
        elif kind == "finished":
            self.finished[event.finished.sample_index] = event.finished
        return None
