"""Clients of Quire: `Client` blocks, `AsyncClient` is for asyncio, `PoolInspector` looks into the memory service.

    with Client("127.0.0.1:7071") as client:
        for delta in client.generate("import os", max_tokens=32):
            print(delta.text, end="")

`Watching` keeps a picture of the pool up to date, `PoolController` changes how tenants share it.

What goes in are plain values, what comes out are the messages of the contract (`protos/`). A call
that fails raises the `QuireError` that the service raised; a failure of the transport, such as a deadline that passed, is
a `RemoteError`, which is one too.
"""

from quire.client.aio import AsyncClient, AsyncGeneration
from quire.client.control import (
    FlushAnswer,
    PoolController,
    PublishAnswer,
    QuotaAnswer,
    ReleaseAnswer,
    RetainAnswer,
    WithdrawAnswer,
)
from quire.client.inspector import (
    Block,
    BlockAnswer,
    ExplainAnswer,
    Pool,
    PoolCounts,
    PoolInspector,
    ProbeAnswer,
    RetentionsAnswer,
    Sequence,
    SequenceAnswer,
    TenantsAnswer,
    Watch,
    WatchAnswer,
)
from quire.client.pool_mirror import PoolMirror
from quire.client.pool_view import (
    BlockState,
    MirrorCounts,
    MirroredSequence,
    MirroredTenant,
    MirrorView,
)
from quire.client.rate_window import Rates
from quire.client.requests import GenerateOptions, Prompt
from quire.client.sync import Client, Generation
from quire.client.watching import Link, Watching
from quire.errors import QuireError
from quire.rpc_status import RemoteError

__all__ = [
    "AsyncClient",
    "AsyncGeneration",
    "Block",
    "BlockAnswer",
    "BlockState",
    "Client",
    "ExplainAnswer",
    "FlushAnswer",
    "GenerateOptions",
    "Generation",
    "Link",
    "MirrorCounts",
    "MirrorView",
    "MirroredSequence",
    "MirroredTenant",
    "Pool",
    "PoolController",
    "PoolCounts",
    "PoolInspector",
    "PoolMirror",
    "ProbeAnswer",
    "Prompt",
    "PublishAnswer",
    "QuireError",
    "QuotaAnswer",
    "Rates",
    "ReleaseAnswer",
    "RemoteError",
    "RetainAnswer",
    "RetentionsAnswer",
    "Sequence",
    "SequenceAnswer",
    "TenantsAnswer",
    "Watch",
    "WatchAnswer",
    "Watching",
    "WithdrawAnswer",
]
