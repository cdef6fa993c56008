"""Which addresses the services of `quire up` get on the network."""

from __future__ import annotations

import socket
from contextlib import ExitStack

from quire.serving import MAX_PORT, UNIX_PREFIX, check_port_is_free

_SERVICES = ("router", "memory", "compute")
_METRICS_OFFSET = 10
_LOCALHOST = "127.0.0.1"


def router_address(listen: str) -> str:
    """`listen` with a port that is free now, chosen when it is 0; raises StartupError."""
    if listen.startswith(UNIX_PREFIX):
        return listen
    check_port_is_free(listen)
    host, _, port = listen.rpartition(":")
    return listen if port != "0" else _free_addresses(host, 1)[0]


def metrics_addresses(listen: str) -> dict[str, str]:
    """Addresses of `GET /metrics` by service: the ports 10, 11 and 12 above a port that was named, else free ones.

    Raises:
        StartupError: when one of them is taken.
    """
    host, port = _LOCALHOST, 0
    if not listen.startswith(UNIX_PREFIX):
        host, port = listen.rpartition(":")[0], int(listen.rpartition(":")[2])
    first = port + _METRICS_OFFSET
    if port == 0 or first + len(_SERVICES) > MAX_PORT:
        return dict(zip(_SERVICES, _free_addresses(host, len(_SERVICES)), strict=True))
    chosen = {name: f"{host}:{first + index}" for index, name in enumerate(_SERVICES)}
    for address in chosen.values():
        check_port_is_free(address)
    return chosen


def _free_addresses(host: str, count: int) -> list[str]:
    """So many different ones: each port is held until all are chosen."""
    name = host.strip("[]")
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    with ExitStack() as held:
        probes = [
            held.enter_context(socket.create_server((name, 0), family=family)) for _ in range(count)
        ]
        return [f"{host}:{probe.getsockname()[1]}" for probe in probes]
