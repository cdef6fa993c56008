"""A client of Quire: `Client` blocks, `AsyncClient` is for asyncio, `PoolInspector` looks into the memory service.

    with Client("127.0.0.1:7071") as client:
        for delta in client.generate("import os", max_tokens=32):
            print(delta.text, end="")

What goes in are plain values, what comes out are the messages of the contract (`protos/router/v1/router.proto`). A call
that fails raises the `QuireError` that the service raised; a failure of the transport, such as a deadline that passed, is
a `RemoteError`, which is one too.
"""

from quire.client.aio import AsyncClient, AsyncGeneration
from quire.client.inspector import Pool, PoolInspector
from quire.client.requests import GenerateOptions, Prompt
from quire.client.sync import Client, Generation
from quire.errors import QuireError
from quire.rpc_status import RemoteError

__all__ = [
    "AsyncClient",
    "AsyncGeneration",
    "Client",
    "GenerateOptions",
    "Generation",
    "Pool",
    "PoolInspector",
    "Prompt",
    "QuireError",
    "RemoteError",
]
