"""Micro-batches that shrink until they fit, with the same rows in them."""

import pytest

from ftkit.core.encoding import Example
from ftkit.core.plan import Plan, halved, within_memory
from ftkit.errors import ExitCode, UserError

PADDED = Plan(batch=8, micro_batch=8, steps=5, lr=0.01, schedule="linear", warmup=0.2, max_grad_norm=1.0, seed=42)
PACKED = Plan(**{**vars(PADDED), "pack": True, "micro_tokens": 200})
ROWS = [Example([3 + row] * (6 + 2 * row), [True] * (6 + 2 * row)) for row in range(8)]


def fits(limit):
    """Work that only takes micro-batches of up to `limit` places, and says how often it was tried."""
    tries = []

    def work(batches):
        tries.append(len(batches))
        if max(batch.input_ids.numel() for batch in batches) > limit:
            raise MemoryError("too large")
        return sum(batch.tokens for batch in batches)

    return tries, work


@pytest.mark.parametrize("plan", [PADDED, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("limit", [1000, 60, 30, 19])
def test_the_work_is_begun_again_in_smaller_pieces_until_it_fits(plan, limit):
    tries, work = fits(limit)
    tokens, used = within_memory(plan, ROWS, work)
    assert tokens == sum(len(row.ids) for row in ROWS)  # no row is lost
    assert tries == sorted(set(tries)) and (used == plan) == (len(tries) == 1)
    assert len(used.cut(ROWS)) == tries[-1]


@pytest.mark.parametrize("plan", [PADDED, PACKED], ids=["padded", "packed"])
def test_where_one_row_does_not_fit_it_is_exit_5_with_what_to_type(plan):
    tries, work = fits(18)
    with pytest.raises(UserError, match="out of memory with one row at once: too large") as caught:
        within_memory(plan, ROWS, work)
    assert caught.value.exit_code == ExitCode.MEMORY and "--gradient-checkpointing on" in caught.value.hint
    assert tries[-1] == len(ROWS) and len(tries) <= len(ROWS)


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), True),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), True),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_only_a_lack_of_memory_is_tried_again(error, is_memory):
    tries = []

    def work(batches):
        tries.append(batches)
        if len(tries) == 1:
            raise error
        return "done"

    if is_memory:
        assert within_memory(PADDED, ROWS, work)[0] == "done"
    else:
        with pytest.raises(RuntimeError, match="shapes"):
            within_memory(PADDED, ROWS, work)


def test_halving_skips_sizes_that_would_change_nothing():
    plan = Plan(**{**vars(PADDED), "micro_batch": 64})
    assert halved(plan, ROWS).micro_batch == 4
    assert halved(Plan(**{**vars(PADDED), "micro_batch": 1}), ROWS) is None
