"""Sizes as people type them: `500MB` is 500 x 10^6 bytes, `24GiB` 24 x 2^30."""

import re

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(gib|gb|g|mib|mb|m)", re.IGNORECASE)
UNITS = {"gib": 2**30, "gb": 10**9, "g": 10**9, "mib": 2**20, "mb": 10**6, "m": 10**6}


def byte_size(text: str) -> int | None:
    """The bytes that a text means; None where it is no size."""
    size = SIZE.fullmatch(text.strip())
    return int(float(size[1]) * UNITS[size[2].lower()]) if size else None
