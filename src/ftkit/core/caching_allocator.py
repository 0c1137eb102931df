"""A model of PyTorch's CUDA caching allocator: which bytes a run reserves, given what it allocates and frees.

Source: c10/cuda/CUDACachingAllocator.cpp of PyTorch 2.x with its default settings (no max_split_size, no
rounding to powers of two, one stream). Rules, in that file's words:

- a size is rounded up to 512 B; up to 1 MiB it lives in the small pool, above in the large pool;
- the smallest free block that is large enough is taken (best fit; on equal size the lowest address);
- where none fits, a segment is taken from the driver: 2 MiB for the small pool, 20 MiB for sizes below
  10 MiB, otherwise the size rounded up to 2 MiB;
- the rest of a block is split off if it has 512 B or more (small pool) or more than 1 MiB (large pool);
- a freed block merges with its free neighbours in the same segment;
- empty_cache, and a refusal by the driver, give back the segments that are free as a whole.

With expandable segments each pool has one address range that grows in pages of 2 MiB (small pool) or 20 MiB
(large pool), splits off any rest, and therefore leaves hardly any holes.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from enum import IntEnum

KIB, MIB, GIB = 2**10, 2**20, 2**30
SMALLEST_BLOCK = 512  # bytes; every size is a multiple of it
LARGEST_SMALL = 1 * MIB  # a larger size lives in the large pool
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
OWN_SEGMENT = 10 * MIB  # from this size on, a segment is made to measure
MEASURE = 2 * MIB  # and rounded up to this


class Pool(IntEnum):
    """Where a block lives; the two never share a segment."""

    SMALL = 0
    LARGE = 1


@dataclass(eq=False, slots=True)
class Block:
    """A stretch of one segment, free or allocated; `size_bytes` is what memory_allocated() counts."""

    pool: Pool
    segment: int
    offset: int
    size_bytes: int
    is_free: bool = True
    previous: "Block | None" = None
    next: "Block | None" = None

    @property
    def fills_segment(self) -> bool:
        """No other block shares the segment, so the driver can have it back."""
        return self.previous is None and self.next is None


FreeEntry = tuple[int, int, int, Block]  # size, segment, offset: the order of best fit; never compares blocks


def round_size(size_bytes: int) -> int:
    """The size of the smallest block that holds so many bytes: a multiple of 512, at least 512."""
    return max(SMALLEST_BLOCK, round_up(size_bytes, SMALLEST_BLOCK))


def segment_size(block_bytes: int) -> int:
    """The bytes taken from the driver when no free block of this (rounded) size is left."""
    if block_bytes <= LARGEST_SMALL:
        return SMALL_SEGMENT
    if block_bytes < OWN_SEGMENT:
        return LARGE_SEGMENT
    return round_up(block_bytes, MEASURE)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below the value."""
    return -(-value // multiple) * multiple


class OutOfMemoryError(Exception):
    """The modelled card has no room for a segment, even after its cache was given back."""


class CachingAllocator:
    """Replays malloc and free; counts allocated and reserved bytes as torch.cuda.memory_stats() does.

    capacity_bytes: what the driver can give; None is without limit. With a limit, `retries` counts how often
    the cache had to be given back to go on, and a request that fits nowhere raises OutOfMemoryError.
    """

    def __init__(self, *, capacity_bytes: int | None = None, expandable_segments: bool = False) -> None:
        self.capacity_bytes = capacity_bytes
        self.expandable_segments = expandable_segments
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.retries = 0
        self._free: dict[Pool, list[FreeEntry]] = {Pool.SMALL: [], Pool.LARGE: []}
        self._tails: dict[Pool, Block] = {}  # last block of each pool's growing range, if segments expand
        self._segments = 0

    def malloc(self, size_bytes: int) -> Block | None:
        """A block for so many bytes; None for no bytes, as a tensor without elements owns no memory."""
        if size_bytes == 0:
            return None
        wanted = round_size(size_bytes)
        pool = Pool.SMALL if wanted <= LARGEST_SMALL else Pool.LARGE
        block = self._best_fit(pool, wanted) or self._grow(pool, wanted)
        self._split(block, wanted)
        block.is_free = False
        self.allocated_bytes += block.size_bytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: Block | None) -> None:
        """Give a block back to the cache, merged with its free neighbours."""
        if block is None:
            return
        assert not block.is_free, "freed twice"
        self.allocated_bytes -= block.size_bytes
        block.is_free = True
        if block.next is not None and block.next.is_free:
            self._forget(block.next)
            self._absorb_next(block)
        if block.previous is not None and block.previous.is_free:
            block = block.previous
            self._forget(block)
            self._absorb_next(block)
        self._remember(block)

    def empty_cache(self) -> None:
        """Give the segments that are free as a whole back to the driver (of expandable ones, the free end)."""
        for pool in Pool:
            for _, _, _, block in list(self._free[pool]):
                if self.expandable_segments:
                    self._shrink(block)
                elif block.fills_segment:
                    self._forget(block)
                    self.reserved_bytes -= block.size_bytes

    def _best_fit(self, pool: Pool, wanted: int) -> Block | None:
        free = self._free[pool]
        place = bisect_left(free, (wanted,))  # shorter than an entry of that size, so before it
        return free.pop(place)[3] if place < len(free) else None

    def _grow(self, pool: Pool, wanted: int) -> Block:
        """A block of at least the wanted size on memory that is new from the driver."""
        if self._is_refused(self._missing(pool, wanted)):
            self.retries += 1
            self.empty_cache()
        size = self._missing(pool, wanted)  # computed anew: an expandable range may have been shortened
        if self._is_refused(size):
            raise OutOfMemoryError(f"{size} bytes on top of {self.reserved_bytes} of {self.capacity_bytes}")
        self.reserved_bytes += size
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        if self.expandable_segments:
            return self._extend_range(pool, size)
        self._segments += 1
        return Block(pool, self._segments, 0, size)

    def _missing(self, pool: Pool, wanted: int) -> int:
        """The bytes to take from the driver; a free end of an expandable range counts towards the wanted size."""
        if not self.expandable_segments:
            return segment_size(wanted)
        tail = self._tails.get(pool)
        at_hand = tail.size_bytes if tail is not None and tail.is_free else 0
        return round_up(wanted - at_hand, SMALL_SEGMENT if pool is Pool.SMALL else LARGE_SEGMENT)

    def _is_refused(self, size: int) -> bool:
        return self.capacity_bytes is not None and self.reserved_bytes + size > self.capacity_bytes

    def _extend_range(self, pool: Pool, size: int) -> Block:
        """Map so many bytes behind the pool's last block, as a part of it where that is free."""
        tail = self._tails.get(pool)
        if tail is not None and tail.is_free:
            self._forget(tail)
            tail.size_bytes += size
            return tail
        offset = tail.offset + tail.size_bytes if tail is not None else 0
        block = Block(pool, 0, offset, size, previous=tail)
        if tail is not None:
            tail.next = block
        self._tails[pool] = block
        return block

    def _split(self, block: Block, wanted: int) -> None:
        """Cut what is beyond the wanted size off as a free block, if it is worth it."""
        rest = block.size_bytes - wanted
        if block.pool is Pool.SMALL or self.expandable_segments:
            is_worth_it = rest >= SMALLEST_BLOCK
        else:
            is_worth_it = rest > LARGEST_SMALL
        if not is_worth_it:
            return
        remainder = Block(block.pool, block.segment, block.offset + wanted, rest, previous=block, next=block.next)
        if block.next is not None:
            block.next.previous = remainder
        block.next, block.size_bytes = remainder, wanted
        if self._tails.get(block.pool) is block:
            self._tails[block.pool] = remainder
        self._remember(remainder)

    def _absorb_next(self, block: Block) -> None:
        """Merge the following block into this one."""
        absorbed = block.next
        assert absorbed is not None
        block.size_bytes += absorbed.size_bytes
        block.next = absorbed.next
        if absorbed.next is not None:
            absorbed.next.previous = block
        if self._tails.get(block.pool) is absorbed:
            self._tails[block.pool] = block

    def _shrink(self, block: Block) -> None:
        """Unmap the whole pages at the end of an expandable range (holes further inside stay mapped)."""
        if self._tails.get(block.pool) is not block:
            return
        page = SMALL_SEGMENT if block.pool is Pool.SMALL else LARGE_SEGMENT
        unmapped = block.size_bytes // page * page
        self._forget(block)
        self.reserved_bytes -= unmapped
        block.size_bytes -= unmapped
        if block.size_bytes:
            self._remember(block)
        elif block.previous is not None:
            block.previous.next = None
            self._tails[block.pool] = block.previous
        else:
            del self._tails[block.pool]

    def _remember(self, block: Block) -> None:
        insort(self._free[block.pool], (block.size_bytes, block.segment, block.offset, block))

    def _forget(self, block: Block) -> None:
        free = self._free[block.pool]
        place = bisect_left(free, (block.size_bytes, block.segment, block.offset))
        assert free[place][3] is block
        del free[place]
