"""Requests to stop a long command: signals and the time limit. They wait for a good moment, then become an exit status.

SIGINT ends with 130, the second one at once. SIGTERM, SIGUSR1 (what Slurm sends ahead of its limit), SIGHUP and the end
of `--time-limit` end with 75: stopped, and the same command goes on where it was.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ftkit.errors import ExitCode, UserError

STARTED = time.monotonic()
"""When this process began, but for the time that Python itself takes to start."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGALRM)
TIME_LIMIT = "--time-limit"


class Stopped(BaseException):
    """A request to stop has been met. No Exception, so that no library takes it for a failure of its own."""


class StopRequest:
    """What has been asked for: `reason` is None until something was."""

    def __init__(self, seconds: float | None = None, hint: str | None = None) -> None:
        self.hint = hint
        self.reason: str | None = None
        self.exit_code = ExitCode.STOPPED
        self.deadline = None if seconds is None else STARTED + seconds
        self.was_raised = False
        self._at_once = True
        self._interrupts = 0
        self._process = os.getpid()

    def hear(self, number: int, _: object) -> None:
        """The signal handler. A forked child has inherited it and must not answer for its parent."""
        if os.getpid() != self._process:
            return
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        if self.reason is None:
            self.reason = TIME_LIMIT if number == signal.SIGALRM else signal.Signals(number).name
            self.exit_code = ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.STOPPED
        if self._at_once:
            self.was_raised = True
            raise Stopped

    def is_due(self, seconds_ahead: float = 0.0) -> bool:
        """True once a signal came, or if the time limit ends within `seconds_ahead`."""
        if self.deadline is not None and self.reason is None and time.monotonic() + seconds_ahead >= self.deadline:
            self.reason = TIME_LIMIT
        return self.reason is not None

    def check(self) -> None:
        """Raise Stopped where a request is waiting: called between the parts of long work."""
        if self.is_due():
            raise Stopped

    def error(self) -> UserError:
        """What a person reads, and a scheduler gets, where nothing was done since the command began."""
        if self.reason == TIME_LIMIT:  # with status 75 a script would type the same command for ever
            hint = "a longer --time-limit: loading and validating take longer than this one"
            return UserError("--time-limit is over before a single step was made", ExitCode.USAGE, hint=hint)
        return UserError(f"stopped by {self.reason}", self.exit_code, hint=self.hint)

    def hold(self) -> None:
        """From now on signals only leave a note: the work looks at `is_due` or calls `check` at good moments."""
        self._at_once = False


@contextmanager
def stop_requests(
    seconds: float | None = None, *, hint: str | None = None, signals: Sequence[signal.Signals] = SIGNALS
) -> Iterator[StopRequest]:
    """Listen for signals while the block lasts; a `Stopped` that nobody met before becomes words and an exit status.

    seconds: how long this process may run; None: no limit. hint: how the command is gone on with. signals: which ones;
    a command that people talk to has a meaning of its own for Ctrl-C.
    """
    request = StopRequest(seconds, hint)
    before = {}
    if threading.current_thread() is threading.main_thread():
        listened = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]  # as nohup asks
        before = {number: signal.signal(number, request.hear) for number in listened}
        if request.deadline is not None:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, request.deadline - time.monotonic()))
    try:
        yield request
    except (Stopped, Exception) as error:
        if not isinstance(error, Stopped) and not request.was_raised:
            raise
        # a library that is stopped while it loads may have made an error of its own of it
        raise request.error() from None
    finally:
        if before and request.deadline is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
