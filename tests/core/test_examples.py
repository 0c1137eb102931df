"""Rows that are too long are dropped or cut, and every one of them is in the ledger."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ftkit.core.batching import make_batch
from ftkit.core.encoding import Encoder, Example, last_turn
from ftkit.core.examples import checked_example, encode_rows, fit, join_documents
from ftkit.errors import ExitCode, UserError


@pytest.fixture(scope="module")
def encoder(tiny_model):
    return Encoder(AutoTokenizer.from_pretrained(tiny_model))


def placed(rows):
    return [(f"rows.jsonl:{number}", row) for number, row in enumerate(rows, 1)]


def answer_tokens(encoder, row):
    return len(encoder.encode(row["completion"])) + 1


SHORT = {"prompt": "Q: a\n", "completion": "b"}
LONG = {"prompt": "Q: a\n", "completion": "b c d e f g h i j k"}
NO_ROOM = {"prompt": "Q: a b c d e f g h i j k l m n\n", "completion": "b"}


def test_rows_that_fit_are_kept_as_they_are(encoder):
    examples, origin, ledger = encode_rows(placed([SHORT, LONG]), encoder, max_length=100, overlength="drop")
    assert examples == [encoder.example(SHORT), encoder.example(LONG)] and origin == [0, 1]
    assert (ledger.rows, ledger.kept, ledger.dropped, ledger.truncated, ledger.lost_tokens) == (2, 2, 0, 0, 0)
    assert ledger.longest == len(examples[1].ids) and ledger.tokens == sum(len(e.ids) for e in examples)
    assert ledger.counted == answer_tokens(encoder, SHORT) + answer_tokens(encoder, LONG)


def test_rows_beyond_the_length_are_dropped_and_counted(encoder):
    limit = len(encoder.example(SHORT).ids)
    examples, origin, ledger = encode_rows(placed([LONG, SHORT, NO_ROOM]), encoder, max_length=limit, overlength="drop")
    assert examples == [encoder.example(SHORT)] and origin == [1]
    assert (ledger.rows, ledger.kept, ledger.dropped, ledger.truncated) == (3, 1, 2, 0)
    assert ledger.lost_tokens == answer_tokens(encoder, LONG) + answer_tokens(encoder, NO_ROOM)


def test_truncating_cuts_the_answer_and_drops_where_nothing_of_it_is_left(encoder):
    limit = len(encoder.example(SHORT).ids) + 1
    examples, origin, ledger = encode_rows(
        placed([LONG, SHORT, NO_ROOM]), encoder, max_length=limit, overlength="truncate"
    )
    whole = encoder.example(LONG)
    assert examples == [Example(whole.ids[:limit], whole.counted[:limit]), encoder.example(SHORT)] and origin == [0, 1]
    assert examples[0].ids[-1] not in encoder.stop_ids  # a cut answer has no stop to learn
    assert (ledger.dropped, ledger.truncated, ledger.kept) == (1, 1, 2)
    assert ledger.lost_tokens == len(whole.ids) - limit + answer_tokens(encoder, NO_ROOM)


def test_a_row_with_a_text_beside_its_answer_is_not_cut_into_pieces(encoder):
    """Such a row is prompt and completion: pieces of it would train the answer without its prompt."""
    row = {**LONG, "text": "kept from the table"}
    examples, _, ledger = encode_rows(
        placed([row, SHORT]), encoder, max_length=len(encoder.example(SHORT).ids), overlength="drop"
    )
    assert examples == [encoder.example(SHORT)] and ledger.dropped == 1


@given(ids=st.lists(st.integers(0, 99), min_size=2, max_size=40), limit=st.integers(2, 12))
@settings(deadline=None)
def test_cutting_a_text_predicts_every_token_of_it_once(ids, limit):
    pieces = fit(Example(ids, [True] * len(ids)), limit, "drop", is_text=True)
    assert all(2 <= len(piece.ids) <= limit for piece in pieces)
    assert [label for piece in pieces for label in make_batch([piece]).labels.tolist()] == ids[1:]


def test_pieces_of_a_text_come_from_one_row(encoder):
    text = {"text": "one two three four five six seven eight"}
    examples, origin, ledger = encode_rows(placed([text, text]), encoder, max_length=10, overlength="drop")
    assert origin == sorted(origin) and set(origin) == {0, 1} and len(examples) > 2
    assert (ledger.rows, ledger.kept, ledger.dropped, ledger.truncated, ledger.lost_tokens) == (2, 2, 0, 0, 0)
    assert ledger.counted == 2 * (len(encoder.example(text).ids) - 1)


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=8),
    st.integers(2, 30),
    st.sampled_from(["drop", "truncate"]),
)
@settings(deadline=None, max_examples=40)
def test_no_row_and_no_answer_token_goes_missing_from_the_ledger(encoder, lengths, limit, overlength):
    rows = [{"prompt": "a" * prompt, "completion": "b" * answer} for prompt, answer in lengths]
    examples, origin, ledger = encode_rows(placed(rows), encoder, max_length=limit, overlength=overlength)
    assert ledger.rows == ledger.kept + ledger.dropped == len(rows) and len(origin) == ledger.kept == len(examples)
    assert ledger.counted + ledger.lost_tokens == sum(answer_tokens(encoder, row) for row in rows)
    assert all(len(example.ids) <= limit for example in examples)
    assert overlength == "truncate" or ledger.truncated == 0


def test_a_row_that_trains_nothing_is_refused_with_its_place(encoder, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{% for m in messages | reverse %}{{ m.content }}{{ eos_token }}{% endfor %}"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(UserError, match=r"rows\.jsonl:7: ") as caught:
        checked_example(Encoder(tokenizer), row, "rows.jsonl:7")
    assert caught.value.exit_code == ExitCode.DATA


def test_an_answer_that_ends_in_a_token_that_stops_nothing_is_refused(tiny_model):
    """The turn of this row closes with the opening token: the model would be taught to go on."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{{ '<|im_start|>' if m.content == 'go on' else eos_token }}{% endfor %}"
    )
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "go on"}]}
    with pytest.raises(UserError, match="stop token") as caught:
        checked_example(Encoder(tokenizer), row, "rows.jsonl:1")
    assert caught.value.exit_code == ExitCode.DATA


# ---------------------------------------------------------------- documents joined, the last turn
def test_joined_documents_count_the_same_tokens_in_rows_that_are_full():
    """Three texts of 5, 9 and 4 tokens, read in pieces of 6, joined to rows of 6: 18 tokens, no first token counted."""
    texts = [list(range(10, 15)), list(range(20, 29)), list(range(30, 34))]
    pieces, origin = [], []
    for number, ids in enumerate(texts):
        found = fit(Example(ids, [True] * len(ids)), 6, "drop", is_text=True)
        pieces, origin = pieces + found, origin + [number] * len(found)
    rows = join_documents(pieces, origin, 6)
    stream = [*rows[0].ids, *(token for row in rows[1:] for token in row.ids[1:])]
    assert stream == [token for ids in texts for token in ids] and [len(row.ids) for row in rows] == [6, 6, 6, 3]
    counted = [token for row in rows for token, counts in zip(row.ids[1:], row.counted[1:], strict=True) if counts]
    assert counted == [token for ids in texts for token in ids[1:]]


def test_only_the_last_stretch_of_a_conversation_is_left():
    flags = [False, True, True, False, False, True, True, False]
    found = last_turn(Example(list(range(8)), flags))
    assert found.counted == [False] * 5 + [True, True, False]
    assert last_turn(found) == found


ROWS = [
    {"prompt": "Q: a\n", "completion": "b c <|im_end|> ü"},
    {"prompt": "", "completion": " b"},
    {"prompt": "Q: a\n", "completion": "\nb"},
    {"text": "b c\n\nd"},
    {"prompt": "<s>", "completion": "x" * 50},
]


@pytest.mark.parametrize("name", ["stories260k", "tinystories-chat-3m", None])
def test_texts_encoded_ahead_of_their_rows_give_the_same_examples(name, tiny_model, request, monkeypatch):
    folder = tiny_model if name is None else request.getfixturevalue("shared") / "models" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    monkeypatch.setattr("ftkit.core.examples.AHEAD", 3)
    some = Encoder(tokenizer)
    examples, origin, _ = encode_rows(placed(ROWS * 2), some, max_length=500, overlength="drop")
    assert origin == list(range(10)) and some._ahead
    assert examples == [Encoder(tokenizer).example(row) for row in ROWS * 2]


@pytest.mark.parametrize("name", ["stories260k", "tinystories-chat-3m", None])
def test_ids_are_what_transformers_call_gives_whatever_it_was_asked_before(name, tiny_model, request):
    folder = tiny_model if name is None else request.getfixturevalue("shared") / "models" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [text for row in ROWS for text in row.values() if text] + [
        "<|im_end|><s>a</s> b",
        " a  b\n",
        "日本 ü 👍",
        "▁a",
    ]
    called = {
        (text, specials): tokenizer(text, add_special_tokens=False, split_special_tokens=not specials).input_ids
        for text in texts
        for specials in (False, True)
    }
    assert Encoder(tokenizer)._backend is not None
    assert {key: Encoder(tokenizer)._ids(*key) for key in called} == called
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a", "a b c d"], padding=True, truncation=True, max_length=2)
    assert {key: Encoder(tokenizer)._ids(*key) for key in called} == called


def test_a_tokenizer_with_a_call_of_its_own_is_called(tiny_model):
    class Loud(PreTrainedTokenizerFast):
        def __call__(self, text, **options):
            return super().__call__(text.upper(), **options)

    loud, plain = Loud.from_pretrained(tiny_model), Encoder(AutoTokenizer.from_pretrained(tiny_model))
    assert Encoder(loud).encode("abc") == plain.encode("ABC") != plain.encode("abc")
