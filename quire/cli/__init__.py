"""The command line: services, and commands that talk to them. Each command's module is imported when it is called."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec

from quire import __version__

_SERVICES = {
    "memory": "memory_service",
    "compute": "compute_service",
    "router": "router",
    "replay": "memory_service.replay",
}
_COMMANDS = ("up", "demo", "generate", "chat", "inspect", "top", "control")
_NEED_COMPUTE = ("up", "demo", "compute")
_COMPUTE_LIBRARIES = ("torch", "transformers", "numba")
_USAGE = """usage: quire COMMAND [flags]

  up        start memory, compute and router, supervised; one ready line with every address
  demo      show all of it with the packaged model, then end
  memory    start the memory service alone
  compute   start the compute service alone
  router    start the router alone
  generate  continue a text
  chat      talk to the model
  inspect   look into the pool: counts, sequences, blocks, tenants, why something happened
  top       show the pool live
  control   quotas, retention, flush, shared prefixes
  replay    show the pool at any past revision of its log
  version   print the version

`quire COMMAND --help` lists the flags of a command."""


def main() -> int:
    """Entry point of the `quire` script; the process's exit status."""
    # gRPC's core tells on stderr, in lines that are no records, of connections that end as they should.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    command, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    missing = _missing_for(command)
    if missing:
        print(
            f"error: quire {command}: the compute service's libraries are not installed ({', '.join(missing)}); "
            "pip install 'quire[compute]' brings them",
            file=sys.stderr,
        )
        return 1
    if command in _COMMANDS:
        status: int = getattr(import_module(f"quire.cli.{command}"), command)(arguments)
        return status
    if command in _SERVICES:
        # The process becomes another one, so that its signals and exit status are that one's own.
        module = [sys.executable, "-m", _SERVICES[command]]
        os.execv(sys.executable, [*module, *arguments])  # noqa: S606 -- our own interpreter and module
    if command in {"version", "--version"}:
        print(__version__)
        return 0
    if command in {"--help", "-h"}:
        print(_USAGE)
        return 0
    print(f"error: unknown command {command!r}; `quire --help` lists them", file=sys.stderr)
    return 2


def _missing_for(command: str) -> list[str]:
    """Libraries that `command` needs and that a light installation leaves out."""
    if command not in _NEED_COMPUTE:
        return []
    return [name for name in _COMPUTE_LIBRARIES if find_spec(name) is None]
