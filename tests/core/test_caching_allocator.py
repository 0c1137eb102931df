"""The model of the caching allocator, against numbers worked out by hand from PyTorch's rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.caching_allocator import (
    KIB,
    MIB,
    CachingAllocator,
    OutOfMemoryError,
    Pool,
    round_size,
    segment_size,
)


@pytest.mark.parametrize(
    ("asked", "block", "segment"),
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 1, 10 * MIB, 10 * MIB),  # rounded to 10 MiB first, and so a segment to measure
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
        (33 * MIB, 33 * MIB, 34 * MIB),
    ],
)
def test_sizes_of_blocks_and_segments_follow_the_rules(asked, block, segment):
    assert round_size(asked) == block
    assert segment_size(block) == segment


def test_a_tensor_without_elements_owns_no_memory():
    allocator = CachingAllocator()
    assert allocator.malloc(0) is None
    allocator.free(None)
    assert allocator.reserved_bytes == 0


def test_small_and_large_blocks_live_in_their_own_segments():
    allocator = CachingAllocator()
    small, large = allocator.malloc(1000), allocator.malloc(3 * MIB)
    assert (small.pool, large.pool) == (Pool.SMALL, Pool.LARGE)
    assert allocator.allocated_bytes == 1024 + 3 * MIB
    assert allocator.reserved_bytes == 2 * MIB + 20 * MIB


def test_a_rest_of_up_to_one_mebibyte_stays_with_its_large_block():
    allocator = CachingAllocator()
    allocator.malloc(11 * MIB)  # its segment has 12 MiB: the rest of exactly 1 MiB is not split off
    assert allocator.allocated_bytes == 12 * MIB
    allocator.malloc(int(12.5 * MIB))  # its segment has 14 MiB: 1.5 MiB are split off
    assert allocator.allocated_bytes == 12 * MIB + 12.5 * MIB


def test_the_smallest_block_that_fits_is_taken():
    allocator = CachingAllocator()
    wide, _, narrow, _ = (allocator.malloc(size * MIB) for size in (6, 2, 4, 2))
    allocator.free(wide)
    allocator.free(narrow)
    assert allocator.malloc(3 * MIB).offset == 8 * MIB, "the hole of 4 MiB, not the one of 6 MiB"
    assert allocator.reserved_bytes == 20 * MIB


def test_free_neighbours_become_one_block_again():
    allocator = CachingAllocator()
    blocks = [allocator.malloc(5 * MIB) for _ in range(4)]  # fills one segment of 20 MiB
    for place in (1, 3, 2, 0):
        allocator.free(blocks[place])
    allocator.malloc(20 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


def test_a_hole_that_is_too_small_costs_a_new_segment():
    allocator = CachingAllocator()
    first, _ = allocator.malloc(12 * MIB), allocator.malloc(12 * MIB)
    allocator.free(first)
    allocator.malloc(14 * MIB)
    assert allocator.allocated_bytes == 26 * MIB
    assert allocator.reserved_bytes == 38 * MIB


def test_empty_cache_gives_back_only_segments_that_are_free_as_a_whole():
    allocator = CachingAllocator()
    alone, beside, _ = allocator.malloc(30 * MIB), allocator.malloc(3 * MIB), allocator.malloc(3 * MIB)
    allocator.free(alone)
    allocator.free(beside)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 20 * MIB
    assert allocator.peak_reserved_bytes == 50 * MIB
    allocator.malloc(3 * MIB)
    assert allocator.reserved_bytes == 20 * MIB, "the hole in the segment that stayed is used again"


def test_a_full_card_gives_its_cache_back_before_it_fails():
    allocator = CachingAllocator(capacity_bytes=40 * MIB)
    allocator.free(allocator.malloc(30 * MIB))
    allocator.malloc(32 * MIB)
    assert (allocator.retries, allocator.reserved_bytes) == (1, 32 * MIB)
    with pytest.raises(OutOfMemoryError):
        allocator.malloc(20 * MIB)


def test_expandable_segments_grow_by_pages_and_fill_their_holes():
    allocator = CachingAllocator(expandable_segments=True)
    first = allocator.malloc(12 * MIB)
    assert allocator.reserved_bytes == 20 * MIB
    second = allocator.malloc(12 * MIB)  # 8 MiB are left, 4 are missing: one more page
    assert allocator.reserved_bytes == 40 * MIB
    allocator.free(first)
    allocator.free(second)
    allocator.malloc(40 * MIB)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (40 * MIB, 40 * MIB)


def test_expandable_segments_give_their_free_end_back():
    allocator = CachingAllocator(expandable_segments=True)
    kept, gone = allocator.malloc(10 * MIB), allocator.malloc(50 * MIB)
    allocator.free(gone)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 20 * MIB
    allocator.free(kept)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0
    assert allocator.malloc(KIB) is not None and allocator.malloc(5 * MIB) is not None


def test_a_full_card_with_expandable_segments_shortens_one_pool_for_the_other():
    allocator = CachingAllocator(capacity_bytes=42 * MIB, expandable_segments=True)
    allocator.free(allocator.malloc(40 * MIB))
    for _ in range(3):  # 2 MiB each in the small pool: the second page has no room beside the large pool
        allocator.malloc(MIB)
    assert (allocator.retries, allocator.reserved_bytes) == (1, 4 * MIB)
    with pytest.raises(OutOfMemoryError):
        allocator.malloc(40 * MIB)


@given(
    sizes=st.lists(st.integers(1, 40 * MIB), min_size=1, max_size=40),
    order=st.randoms(use_true_random=False),
    is_expandable=st.booleans(),
)
def test_whatever_the_order_every_byte_comes_back(sizes, order, is_expandable):
    allocator = CachingAllocator(expandable_segments=is_expandable)
    live = []
    for size in sizes:
        live.append(allocator.malloc(size))
        if order.random() < 0.4:
            allocator.free(live.pop(order.randrange(len(live))))
        assert allocator.allocated_bytes == sum(block.size_bytes for block in live) <= allocator.reserved_bytes
        places = [(block.pool, block.segment, block.offset, block.size_bytes) for block in live]
        for pool, segment, offset, length in places:
            overlapping = [p for p in places if p[:2] == (pool, segment) and offset <= p[2] < offset + length]
            assert len(overlapping) == 1, "two live blocks share an address"
    for block in live:
        allocator.free(block)
    allocator.empty_cache()
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (0, 0)
