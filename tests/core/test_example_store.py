"""Examples in arrays are the examples that were put into them."""

import sys
from array import array

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.encoding import Example
from ftkit.core.example_store import Chosen, ExampleStore
from ftkit.core.examples import fit, join_documents

TOKENS = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=9)
EXAMPLES = st.lists(
    st.builds(
        lambda tokens, weight: Example([i for i, _ in tokens], [c for _, c in tokens], weight),
        TOKENS,
        st.floats(0.1, 10),
    ),
    max_size=6,
)


@given(EXAMPLES)
def test_what_is_put_in_comes_out(examples):
    store = ExampleStore(examples)
    assert store == examples and len(store) == len(examples) and list(store) == examples
    assert [store[-1 - at] for at in range(len(examples))] == examples[::-1]
    assert store[1:3] == examples[1:3] and bool(store) is bool(examples)
    assert all(type(flag) is bool for example in store for flag in example.counted)
    assert all(type(number) is int for example in store for number in example.ids)
    mapped = ExampleStore.of(*(np.asarray(each) for each in (store.ids, store.counted, store.ends, store.weights)))
    assert mapped == examples


@given(EXAMPLES, st.data())
def test_some_of_them_are_chosen_without_a_copy(examples, data):
    places = data.draw(st.lists(st.integers(0, len(examples) - 1)) if examples else st.just([]))
    chosen = Chosen(ExampleStore(examples), places)
    assert list(chosen) == [examples[place] for place in places] and chosen[1:] == list(chosen)[1:]


def test_a_token_takes_five_bytes():
    store = ExampleStore(Example(list(range(1000, 1125)), [False] * 60 + [True] * 65) for _ in range(1000))
    arrays = (store.ids, store.counted, store.ends, store.weights)
    assert sum(map(sys.getsizeof, arrays)) < 6 * 125 * 1000 and all(isinstance(each, array) for each in arrays)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(2, 7))
def test_joined_documents_are_one_stream_cut_into_rows(lengths, limit):
    texts = [list(range(100 * at, 100 * at + length)) for at, length in enumerate(lengths, 1)]
    pieces, origin = [], []
    for number, ids in enumerate(texts):
        found = fit(Example(ids, [True] * len(ids)), limit, "drop", is_text=True)
        pieces, origin = pieces + found, origin + [number] * len(found)
    stream = [i for number in sorted(set(origin)) for i in texts[number]]
    flags = [at > 0 for number in sorted(set(origin)) for at in range(len(texts[number]))]
    assert list(join_documents(pieces, origin, limit)) == fit(Example(stream, flags), limit, "drop", is_text=True)
