"""Requests to stop a long command: signals and the time limit. They wait for a good moment, then become an exit status.

SIGINT ends with 130, a second one at once. SIGTERM, SIGUSR1 (what Slurm sends ahead of its limit), SIGHUP and the end
of `--time-limit` end with 75: stopped, and the same command goes on where it was.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ftkit.errors import ExitCode, UserError

STARTED = time.monotonic()
"""When this process began, but for the time that Python itself takes to start."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Stopped(BaseException):
    """A request to stop has been met. No Exception, so that no library takes it for a failure of its own."""


class StopRequest:
    """What has been asked for: `reason` is None until something was."""

    def __init__(self, seconds: float | None = None) -> None:
        self.reason: str | None = None
        self.exit_code = ExitCode.STOPPED
        self.deadline = None if seconds is None else STARTED + seconds
        self.at_once = True
        self._process = os.getpid()

    def hear(self, number: int, _: object) -> None:
        """The signal handler. A forked child has inherited it and must not answer for its parent."""
        if os.getpid() != self._process:
            return
        if number == signal.SIGINT:
            if self.reason is not None:
                raise KeyboardInterrupt
            self.exit_code = ExitCode.INTERRUPTED
        self.reason = self.reason or signal.Signals(number).name
        if self.at_once:
            raise Stopped

    def is_due(self, seconds_ahead: float = 0.0) -> bool:
        """True once a signal came, or if the time limit ends within `seconds_ahead`."""
        if self.deadline is not None and self.reason is None and time.monotonic() + seconds_ahead >= self.deadline:
            self.reason = "--time-limit"
        return self.reason is not None

    def check(self) -> None:
        """Raise Stopped where a request is waiting: called between the parts of long work."""
        if self.is_due():
            raise Stopped

    @contextmanager
    def held(self) -> Iterator[None]:
        """For as long as the block lasts, signals only leave a note: it looks at `is_due` or calls `check` itself."""
        before, self.at_once = self.at_once, False
        try:
            yield
        finally:
            self.at_once = before


@contextmanager
def stop_requests(seconds: float | None = None) -> Iterator[StopRequest]:
    """Listen for signals while the block lasts; a `Stopped` that nobody met before becomes words and an exit status.

    seconds: how long this process may run; None: no limit.
    """
    request = StopRequest(seconds)
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, request.hear) for number in SIGNALS}
    try:
        yield request
    except Stopped:
        hint = "the same command begins again; nothing was trained yet"
        raise UserError(f"stopped by {request.reason}", request.exit_code, hint=hint) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
