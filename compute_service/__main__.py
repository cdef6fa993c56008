"""`python -m compute_service`: the compute service as a process.

What can be said without torch and transformers, which take seconds to import, is said before.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import NoReturn

from compute_service.checkpoint_folder import check_local_files
from compute_service.refusal import ModelRefused
from quire import demo_model, logs
from quire.descriptor import DescriptorRefusedError
from quire.errors import QuireError
from quire.pool_trailer import WrongPoolBytesError
from quire.serving import StartupError, end_with_parent
from quire.settings import ComputeSettings
from quire.settings_loader import load

_DEMO = "demo"


def main() -> int:
    """Run until SIGTERM or SIGINT; the process's exit status."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # Nothing is open yet. An exception would be lost where it met a callback of the import system.
        signal.signal(number, lambda _number, _frame: end(0))
    settings = load(ComputeSettings, sys.argv[1:], prog="quire compute")
    logs.configure(settings.log_level, settings.log_format, "compute")
    end_with_parent(settings.parent_pid)
    if settings.model == _DEMO:
        settings = settings.model_copy(update={"model": str(demo_model.path())})
    try:
        check_local_files(settings.model)
        return _serve(settings)
    except (
        StartupError,
        QuireError,
        ModelRefused,
        DescriptorRefusedError,
        WrongPoolBytesError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _serve(settings: ComputeSettings) -> int:
    # Until there is an engine it would search the half a million objects of torch and transformers again and again.
    gc.disable()
    from compute_service.process import serve  # noqa: PLC0415 -- it imports both, for seconds

    return serve(settings)


def end(status: int) -> NoReturn:
    """End the process without the interpreter's own end, which would search all those objects, for two seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    end(main())
