"""`quire top`: the pool, live."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import grpc
from rich.live import Live

from quire.cli.keys import Keys
from quire.cli.memory import address_of, reporting_memory_errors
from quire.cli.output import make_console
from quire.cli.top_frame import Sight, frame
from quire.client import PoolInspector, QuireError, RemoteError, Watching
from quire.inspection_settings import TopSettings
from quire.settings_loader import load

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from quire.client import Pool

_PRINTED_WIDTH = 100  # of what is no terminal
_ASK_EVERY_S = 2.0
_ASK_TIMEOUT_S = 1.0
_END_KEYS = ("q", "Q")


def top(argv: Sequence[str]) -> int:
    """Draw until q, Ctrl-C or SIGTERM, all of which end it well; the process's exit status."""
    settings = load(TopSettings, argv, prog="quire top")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        reporting_memory_errors(settings, interrupted=0) as outcome,
        PoolInspector(address_of(settings)) as inspector,
        Watching(inspector) as watching,
    ):
        _show(settings, _Eye(inspector, watching, settings.tenant))
    return outcome.status


class _Eye:
    """Looks at the watched picture, and every two seconds asks for what a Watch does not tell."""

    def __init__(self, inspector: PoolInspector, watching: Watching, tenant: str | None) -> None:
        self._inspector = inspector
        self._watching = watching
        self._tenant = tenant  # whose sequences are shown; None: all of them
        self._pool: Pool | None = None
        self._asked_in = ""  # epoch
        self._asked_at = 0.0

    def wait(self, timeout_s: float) -> None:
        """Wait for the first picture; raises why there is none when nobody answers at all."""
        link = self._watching.wait(timeout_s)
        if isinstance(link.error, RemoteError):
            raise link.error

    def look(self) -> Sight:
        """What is to be seen now."""
        view = self._watching.look()
        if view is not None and self._watching.link.is_up:
            self._ask(view.epoch)
        if view is not None and self._tenant is not None:
            view = view.of_tenant(self._tenant)
        return Sight(self._watching.link, view, self._pool, self._watching.num_missed)

    def _ask(self, epoch: str) -> None:
        if epoch == self._asked_in and time.monotonic() - self._asked_at < _ASK_EVERY_S:
            return
        self._asked_in, self._asked_at = epoch, time.monotonic()
        try:
            self._pool = self._inspector.get_pool(timeout_s=_ASK_TIMEOUT_S)
        except QuireError:
            # The link tells that the service is away; the last answer is shown beside it.
            return


def _show(settings: TopSettings, eye: _Eye) -> None:
    console = make_console()
    eye.wait(settings.timeout_s)
    if settings.once or not console.is_terminal:
        time.sleep(settings.interval_s)  # rates need some time to be of
        _print_once(eye, console)
    else:
        _draw(settings, eye, console)


def _print_once(eye: _Eye, console: Console) -> None:
    sight = eye.look()
    if sight.view is None:
        message = "there was no picture in time"
        raise sight.link.error or RemoteError(grpc.StatusCode.DEADLINE_EXCEEDED, message)
    width = min(console.width, _PRINTED_WIDTH)
    console.print(frame(sight, console, width, None))


def _draw(settings: TopSettings, eye: _Eye, console: Console) -> None:
    with Keys() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            picture = frame(eye.look(), console, console.width, console.height)
            live.update(picture, refresh=True)
            if keys.wait(settings.interval_s) in _END_KEYS:
                return
