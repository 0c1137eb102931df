"""What glibc's malloc does with freed blocks: give them back to the system, or keep them for the next ones of their size.

By default it learns its limits from what is freed. Other C libraries are left as they are.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
MOST = 2**31 - 1  # that mallopt takes
MOST_MAPPED = 32 * 2**20  # that it takes for M_MMAP_THRESHOLD in older versions, which refuse more


def give_back_freed_memory(above: int) -> None:
    """Blocks of more than `above` bytes go back as soon as they are freed, smaller ones are kept for reuse.

    Too low, and the system hands out every piece of a stream anew, as zeros: half of a merge's time. Too high, and blocks of
    changing sizes leave holes: 270 MB in a proof of 300 million parameters.
    """
    set_limits(above, 8 * above)


def keep_freed_memory() -> None:
    """Nothing goes back: the same blocks come again at every step, and the system would hand them out as zeros."""
    set_limits(MOST, MOST)


def give_back_free_memory() -> None:
    """What is free now, blocks in the middle included."""
    library = glibc()
    if library is not None:
        library.malloc_trim(0)


def set_limits(mmap: int, trim: int) -> None:
    """Bytes of a block from which it is mapped by itself, and bytes free at the heap's end from which they go back."""
    library = glibc()
    if library is not None:
        if not library.mallopt(M_MMAP_THRESHOLD, mmap):
            library.mallopt(M_MMAP_THRESHOLD, MOST_MAPPED)
        library.mallopt(M_TRIM_THRESHOLD, min(trim, MOST))


def glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it is glibc."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
