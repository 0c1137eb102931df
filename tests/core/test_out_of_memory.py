import pytest

from ftkit.core.out_of_memory import in_halves
from ftkit.errors import ExitCode, UserError


def worker(room, errors=MemoryError):
    """Work that takes at most `room` items at a time, and remembers how many it was given."""
    given = []

    def work(items):
        given.append(len(items))
        if len(items) > room:
            raise errors("you tried to allocate: can't allocate memory")
        return [item * 10 for item in items]

    return work, given


@pytest.mark.parametrize("errors", [MemoryError, RuntimeError, type("OutOfMemoryError", (RuntimeError,), {})])
def test_work_goes_on_in_halves_and_no_item_is_lost_or_done_twice(errors):
    work, given = worker(3, errors)
    parts = list(in_halves(work, range(10)))
    assert [item for items, _ in parts for item in items] == list(range(10))
    assert [value for _, values in parts for value in values] == [item * 10 for item in range(10)]
    assert given == [10, 5, 3, 2, 5, 3, 2]


def test_a_single_item_that_does_not_fit_is_exit_5_and_other_errors_pass():
    work, _ = worker(0)
    with pytest.raises(UserError) as error:
        list(in_halves(work, [1, 2]))
    assert error.value.exit_code == ExitCode.MEMORY and error.value.hint
    with pytest.raises(KeyError):
        list(in_halves(lambda items: {}[0], [1, 2]))
