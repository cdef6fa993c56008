"""A checkpoint without a tokenizer: tokens go in and out, text is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest

from protos.router.v1 import router_pb2 as pb
from quire.client import Client, QuireError
from quire.rpc_status import from_rpc_error

if TYPE_CHECKING:
    from processes import Quire


def test_tokens_stream_one_by_one(tiny_quire: Quire) -> None:
    """Nothing waits for text that will never come."""
    with Client(tiny_quire.addresses["router"]) as client:
        deltas = list(client.generate([5, 6, 7], max_tokens=5, ignore_eos=True))
    assert sum(len(delta.token_ids) for delta in deltas) == 5
    assert len(deltas) > 1
    assert not any(delta.text for delta in deltas)


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [("import", {}, "prompt"), ([5], {"stop_strings": ("x",)}, "stopping.stop_strings")],
)
def test_text_is_refused(
    tiny_quire: Quire, prompt: str | list[int], options: dict[str, tuple[str, ...]], field: str
) -> None:
    """Whatever would need text names the missing tokenizer."""
    with Client(tiny_quire.addresses["router"]) as client, pytest.raises(QuireError) as caught:
        client.complete(prompt, **options)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert [found.field for found in caught.value.violations] == [field]
    assert "tokenizer" in caught.value.violations[0].description


def test_detokenize_is_refused(tiny_quire: Quire) -> None:
    """There is nothing to decode with."""
    with pytest.raises(grpc.RpcError) as caught:
        tiny_quire.router.Detokenize(pb.DetokenizeRequest(token_ids=[5]))
    assert from_rpc_error(caught.value).reason == "INVALID_REQUEST"
