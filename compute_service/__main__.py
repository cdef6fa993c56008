"""`python -m compute_service`: the compute service as a process.

What can be said without torch and transformers, which take seconds to import, is said before.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from compute_service.checkpoint_folder import check_if_local
from compute_service.refusal import ModelRefused
from quire import demo_model, logs
from quire.descriptor import DescriptorRefusedError
from quire.errors import QuireError
from quire.pool_trailer import WrongPoolBytesError
from quire.serving import StartupError, end_with_parent
from quire.settings import ComputeSettings
from quire.settings_loader import load

if TYPE_CHECKING:
    from types import FrameType

_DEMO = "demo"


class _StoppedWhileLoading(BaseException):
    """SIGTERM or SIGINT before there was an engine to stop."""


def main() -> int:
    """Run until SIGTERM or SIGINT; the process's exit status."""
    settings = load(ComputeSettings, sys.argv[1:], prog="quire compute")
    logs.configure(settings.log_level, settings.log_format, "compute")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _raise_stopped)
    end_with_parent(settings.parent_pid)
    if settings.model == _DEMO:
        settings = settings.model_copy(update={"model": str(demo_model.path())})
    try:
        check_if_local(settings.model)
        return _serve(settings)
    except _StoppedWhileLoading:
        return 0
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


def _raise_stopped(_number: int, _frame: FrameType | None) -> None:
    raise _StoppedWhileLoading


def end(status: int) -> NoReturn:
    """End the process without the interpreter's own end, which would search all those objects, for two seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    end(main())
