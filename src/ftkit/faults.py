"""Named places where a test makes this process die, lack memory or disk, or meet a NaN. Nothing in normal use.

`FTKIT_FAULT=PLACE:WHAT[:N]` strikes at the Nth passage of a place, counted from 1; several stand apart by commas.
PLACE `*` is any place, so that a sweep over N meets them all. WHAT: kill, term, int, usr1, hup (signals), memory,
enospc, eio, edquot (failed writes), nan (the place's number becomes one).
"""

import errno
import os
import signal
from collections import Counter

VARIABLE = "FTKIT_FAULT"
SIGNALS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
    "usr1": signal.SIGUSR1,
    "hup": signal.SIGHUP,
}
WRITE_ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO, "edquot": errno.EDQUOT}
_passages: Counter[str] = Counter()


def point(place: str) -> bool:
    """Strike here if the environment says so; True where a number should become a NaN."""
    asked = os.environ.get(VARIABLE)
    if not asked:
        return False
    _passages.update((place, "*"))
    return any([strike(place, fault) for fault in asked.split(",")])


def strike(place: str, fault: str) -> bool:
    """One fault, `PLACE:WHAT[:N]`, if this is its place and passage."""
    where, what, *times = fault.split(":")
    if where not in (place, "*") or _passages[where] != int(times[0] if times else 1):
        return False
    if what in SIGNALS:
        os.kill(os.getpid(), SIGNALS[what])
        return False
    if what in WRITE_ERRORS:
        raise OSError(WRITE_ERRORS[what], os.strerror(WRITE_ERRORS[what]), place)
    if what == "memory":
        raise MemoryError(place)
    if what != "nan":
        raise ValueError(f"{VARIABLE}: {fault}")
    return True


def forget() -> None:
    """Count passages from the beginning again: for tests that run commands in one process."""
    _passages.clear()
