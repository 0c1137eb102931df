"""Lengths of time as people type them: 90s, 55m, 1h30m, 2d, or seconds; and the rhythm of --save-every."""

import re
from dataclasses import dataclass

UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def seconds_of(text: str) -> float | None:
    """`1h30m` -> 5400.0, `90` -> 90.0; None for what is no length of time above zero."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text) or None
    if not re.fullmatch(r"(\d+(\.\d+)?[dhms])+", text):
        return None
    return sum(float(number) * UNITS[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)) or None


@dataclass(frozen=True)
class Rhythm:
    """When something happens again: after so many steps, or after so many seconds; one of them is None."""

    steps: int | None = None
    seconds: float | None = None


def rhythm_of(text: str, steps: int) -> Rhythm | None:
    """`50` steps, `10%` of all `steps`, `10m`; None for anything else."""
    if share := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
        return Rhythm(steps=max(1, round(steps * float(share[1]) / 100))) if 0 < float(share[1]) <= 100 else None
    if text.isdecimal():
        return Rhythm(steps=int(text)) if int(text) else None
    seconds = seconds_of(text) if text[-1:] in UNITS else None
    return Rhythm(seconds=seconds) if seconds else None
