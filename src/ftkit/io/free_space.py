"""Is there room: on the disk for what will be written, in this machine's memory for what will be loaded."""

import shutil
from pathlib import Path

from ftkit.errors import ExitCode, UserError

MEMORY_FACTS = Path("/proc/meminfo")


def require_disk(folder: Path, needed: int, what: str, *, hint: str) -> None:
    """Exit 74 where the disk of `folder` has fewer than `needed` bytes free. what: who takes them, as `it takes`."""
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{folder}: {what} {size(needed)}, the disk has {size(free)} free",
            ExitCode.IO,
            hint=hint,
        )


def require_memory(needed: float, what: str) -> None:
    """Exit 5 where this machine has fewer than `needed` bytes of memory to give; unknown outside Linux."""
    free = available_memory()
    if free is not None and free < needed:
        raise UserError(
            f"{what} takes {size(needed)} of memory, {size(free)} are free",
            ExitCode.MEMORY,
            hint="a smaller --model, or --qlora; ftkit estimate-memory says what fits",
        )


def available_memory() -> int | None:
    """Bytes that programs can get without swapping, as Linux counts them."""
    try:
        lines = MEMORY_FACTS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    (kilobytes,) = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")] or [0]
    return kilobytes * 1024 or None


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
