"""Columns -> fields: what a person names, what is usually called so, and what the first rows tell."""

import pytest

from ftkit.core.columns import (
    BadValue,
    NoAnswer,
    Pattern,
    Wanted,
    choose_columns,
    fill_fields,
    is_free_text,
    mostly_made_of,
    parse_maps,
    parse_source,
    repeating_columns,
)
from ftkit.errors import ExitCode, UserError

ALPACA = Wanted("alpaca", ("instruction", "output"), ("input",), "instruction")
COMPLETION = Wanted("completion", ("prompt", "completion"), (), "prompt")
TEXT = Wanted("text", ("text",))
CLASSIFY = Wanted("classify", ("text", "label"))

PRODUCTS = [
    {
        "product": name,
        "category": kind,
        "description": f"The {name} is a {kind.lower()} that {what} every day.",
        "text": f"product: {name}; category: {kind}; The {name} is a {kind.lower()} that {what} every day.",
    }
    for name, kind, what in [
        ("Uplas", "Wall Clock", "ticks"),
        ("Faiden", "Toaster", "toasts"),
        ("Iro", "Lamp", "shines"),
    ]
]


def choose(wanted, rows, **maps):
    return choose_columns(wanted, list(rows[0]), rows, maps, "t.csv")


def sources(choice):
    return {name: source.text if isinstance(source, Pattern) else source for name, source in choice.sources.items()}


def test_red_dots_text_is_left_out_and_the_longest_free_text_is_the_answer():
    choice = choose(ALPACA, PRODUCTS)
    assert sources(choice) == {
        "output": "description",
        "instruction": "Write the description. product: {product}; category: {category}",
    }
    assert choice.left_out == {"text": "it repeats product, category, description"}
    assert choice.inferred == {"instruction", "output"}
    assert choice.pattern_of("instruction") == "Write the description. product: {product}; category: {category}"
    filled = fill_fields(PRODUCTS[1], choice, ALPACA, "t.csv:3")
    assert filled["instruction"] == "Write the description. product: Faiden; category: Toaster"
    assert filled["output"] == "The Faiden is a toaster that toasts every day."


def test_a_description_that_names_its_product_is_not_taken_for_a_repetition():
    rows = [{"product": row["product"], "description": row["description"]} for row in PRODUCTS]
    assert sources(choose(ALPACA, rows))["output"] == "description"


def test_a_copy_of_a_column_is_left_out_and_the_first_one_stays():
    rows = [
        {"title": f"nice thing {i}", "a": f"long text of words {i}", "b": f"long text of words {i}"} for i in range(4)
    ]
    choice = choose(ALPACA, rows)
    assert sources(choice)["output"] == "a" and set(choice.left_out) == {"b"}


@pytest.mark.parametrize(
    ("value", "others", "expected"),
    [
        ("a: b", ["a", "b"], False),  # two of four characters are not more than half
        ("ab: cd", ["ab", "cd"], True),
        ("the lamp shines on all of the table", ["lamp"], False),
        ("lamp lamp", ["lamp"], False),  # each value counts once
        ("anything", ["", "  "], False),
    ],
)
def test_a_text_is_a_repetition_if_more_than_half_of_it_is_copied(value, others, expected):
    assert mostly_made_of(value, others) is expected


def test_columns_repeat_only_if_nearly_all_rows_do():
    texts = {"a": ["x1", "y2", "z3"], "b": ["x1!", "y2!", "other words"]}
    assert repeating_columns(texts) == {}
    assert repeating_columns({"a": ["x1", "y2"], "b": ["x1!", "y2!"]}) == {"b": "it repeats a"}


def test_free_text_is_words_or_a_script_without_spaces_and_differs_from_row_to_row():
    assert is_free_text(["a bright lamp", "a loud clock"])
    assert is_free_text(["你好吗", "再见了"])
    assert not is_free_text(["2012-06-22 00:00:00", "2012-06-22 01:00:00"])
    assert not is_free_text(["same old words", "same old words"])
    assert not is_free_text(["Lamp", "Clock"])


def test_columns_called_as_the_template_calls_them_are_taken():
    row = {"output": "b", "instruction": "a", "input": "c", "more": "d"}
    choice = choose(ALPACA, [row])
    assert sources(choice) == {"instruction": "instruction", "output": "output", "input": "input"}
    assert not choice.inferred and choice.pattern_of("instruction") is None


@pytest.mark.parametrize(
    ("wanted", "row", "expected"),
    [
        (ALPACA, {"question": "q", "answer": "a"}, {"instruction": "question", "output": "answer"}),
        (ALPACA, {"prompt": "q", "completion": "a"}, {"instruction": "prompt", "output": "completion"}),
        (COMPLETION, {"question": "q", "answer": "a"}, {"prompt": "question", "completion": "answer"}),
        (
            COMPLETION,
            {"instruction": "q", "output": "a", "input": ""},
            {"prompt": "instruction", "completion": "output"},
        ),
        (
            ALPACA,
            {"instruction": "q", "context": "c", "response": "a"},
            {"instruction": "instruction", "output": "response", "input": "context"},
        ),
    ],
)
def test_the_usual_names_of_other_data_sets_are_understood(wanted, row, expected):
    assert sources(choose(wanted, [row])) == expected


def test_a_context_that_the_template_cannot_take_is_not_dropped_in_silence():
    row = {"instruction": "q", "output": "a", "input": " "}
    choice = choose(COMPLETION, [row])
    assert fill_fields(row, choice, COMPLETION, "t.csv:2") == {"prompt": "q", "completion": "a"}
    with pytest.raises(BadValue, match=r"t.csv:3: .* no field for the column 'input'") as caught:
        fill_fields({**row, "input": "c"}, choice, COMPLETION, "t.csv:3")
    assert '--map prompt="{instruction} {input}"' in (caught.value.hint or "")


def test_a_context_is_looked_for_in_every_row_also_where_the_first_have_none():
    first, later = {"instruction": "q", "response": "a"}, {"instruction": "q", "response": "a", "context": "c"}
    lines = choose_columns(ALPACA, list(first), [first], {}, "t.jsonl", is_table=False)
    table = choose(ALPACA, [{**first, "context": ""}])
    for choice in (lines, table):
        assert fill_fields(later, choice, ALPACA, "t:2")["input"] == "c"
    assert fill_fields(first, lines, ALPACA, "t:1").get("input", "") == ""
    assert "input" not in choose(ALPACA, [first]).sources  # a table gets no more columns


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_not_written_into_a_question(number):
    choice = choose(ALPACA, [{"a": 1.5, "b": "x"}], instruction="How much is {a}?", output="b")
    assert fill_fields({"a": 1.5, "b": "x"}, choice, ALPACA, "t:1")["instruction"] == "How much is 1.5?"
    with pytest.raises(BadValue, match=f"t:2: 'a' is {number}, no number"):
        fill_fields({"a": number, "b": "x"}, choice, ALPACA, "t:2")


def test_a_map_is_obeyed_and_what_it_leaves_open_is_inferred():
    choice = choose(ALPACA, PRODUCTS, output="category")
    assert sources(choice)["output"] == "category" and choice.inferred == {"instruction"}
    choice = choose(ALPACA, PRODUCTS, instruction="Describe {product}.")
    assert sources(choice) == {"instruction": "Describe {product}.", "output": "description"}
    choice = choose(ALPACA, PRODUCTS, instruction="Describe {product}.", output="text")
    assert choice.sources["output"] == "text" and not choice.inferred


@pytest.mark.parametrize(
    ("wanted", "row", "needs"),
    [
        (ALPACA, {"a": "1", "b": "2"}, "needs instruction and output; the rows have a, b"),
        (ALPACA, {"output": "some words", "b": "2"}, "needs instruction and output; the rows have output, b"),
        (TEXT, {"a": "some words"}, "needs text; the rows have a"),
    ],
)
def test_a_template_that_cannot_be_filled_names_what_is_needed_and_there(wanted, row, needs):
    with pytest.raises(UserError) as caught:
        choose(wanted, [row])
    assert needs in caught.value.message and "--map" in (caught.value.hint or "")
    assert caught.value.exit_code == ExitCode.DATA


def test_conversations_given_to_a_single_turn_template_get_the_chat_template_as_hint():
    with pytest.raises(UserError) as caught:
        choose(ALPACA, [{"messages": []}])
    assert "--template chatml" in (caught.value.hint or "")


@pytest.mark.parametrize("header", [["Good case, I liked it.", "1"], ["x" * 100, "label"], ["text", "0"]])
def test_a_first_line_that_reads_like_data_is_no_header(header):
    rows = [dict(zip(header, cells, strict=True)) for cells in (["nice words here", "1"], ["other words there", "0"])]
    with pytest.raises(UserError, match="reads like data"):
        choose(ALPACA, rows)


def hint_of(wanted, rows, *, is_table=True):
    with pytest.raises(UserError) as caught:
        choose_columns(wanted, list(rows[0]), rows, {}, "t", is_table=is_table)
    return caught.value.hint or ""


def test_a_table_without_a_header_is_told_the_fields_as_names_in_the_order_of_its_columns():
    sentence = "So there is no way for me to plug it in."
    assert "--columns text,label;" in hint_of(CLASSIFY, [{sentence: "Good case, it fits.", "0": "1"}])
    assert "--columns label,text;" in hint_of(CLASSIFY, [{"0": "1", sentence: "Good case, it fits."}])
    assert "--columns a,b,c;" in hint_of(CLASSIFY, [{sentence: "Good case, it fits.", "0": "1", "x": "y"}])
    assert "--columns text;" in hint_of(TEXT, [{sentence: "It fits."}]) and "--documents paragraph" in hint_of(
        TEXT, [{sentence: "It fits."}]
    )
    names = hint_of(CLASSIFY, [{sentence: "a", **{f"{n}": "b" for n in range(29)}}]).partition("--columns ")[2]
    assert names.partition(";")[0].split(",") == [f"c{n}" for n in range(1, 31)]
    assert "--map text=1 --map label=2" in hint_of(CLASSIFY, [{"1": "a", "2": "b"}])  # as --no-header names them
    assert "--map" in hint_of(CLASSIFY, [{sentence: "a", "b": "c"}], is_table=False)  # keys of JSON are no row


@pytest.mark.parametrize(
    "rows", [[{"Peter": "is", "B-PER": "O"}, {"Peter": "", "B-PER": ""}], [{"EU NNP B-ORG": "rejects VBZ O"}]]
)
def test_words_and_their_tags_are_no_table(rows):
    assert "--documents paragraph --augment FILE.py:function" in hint_of(COMPLETION, rows)
    assert "--documents" not in hint_of(COMPLETION, [{"word": "is", "tag": "O"}])
    assert "--documents" not in hint_of(COMPLETION, [{"H": "1", "O": "2"}])


def test_a_list_of_records_and_pieces_of_text_are_not_offered_as_texts():
    records = [{"data": [{"text": "rain "}, {"text": "now", "entity": "time"}]}, {"data": [{"text": "a"}]}]
    assert hint_of(COMPLETION, [{"GetWeather": records}], is_table=False).endswith("--records GetWeather")
    inside = hint_of(COMPLETION, records, is_table=False)
    assert "--augment FILE.py:function" in inside and "--map prompt=data.0.text" in inside
    assert "--map text=" not in inside and "--records" not in inside
    assert hint_of(COMPLETION, [{"a": None}] * 2, is_table=False).endswith("--augment FILE.py:function")
    mixed = [{"a": ["x"], "b": 1, "c": "two words"}, {"a": [], "b": 2, "c": "other words"}]
    assert hint_of(CLASSIFY, mixed, is_table=False) == "for example --map text=c --map label=b"
    pair = Wanted("pairs", ("prompt", "chosen", "rejected"))
    assert "--map rejected=COLUMN" in hint_of(pair, [{"prompt": "a", "chosen": "b"}], is_table=False)


def test_patterns_fill_columns_with_any_name_and_keep_doubled_braces():
    columns = ["price: USD", "a.b", "n"]
    pattern = parse_source("{{x}} {price: USD} and {a.b}, {n}", columns, "t")
    assert isinstance(pattern, Pattern) and pattern.columns == columns
    assert pattern.fill({"price: USD": "5", "a.b": "{n}", "n": 1.5}, "instruction", "t:2") == "{x} 5 and {n}, 1.5"


def test_an_unknown_column_is_an_error_that_names_the_nearest():
    for text in ("Describe {prodct}", "prodct"):
        with pytest.raises(UserError, match="no column 'prodct'") as caught:
            parse_source(text, ["product", "category"], "t")
        assert "did you mean 'product'" in (caught.value.hint or "")


def test_text_without_columns_is_fixed_text():
    fixed = parse_source("Summarise the article.", ["text", "summary"], "t")
    assert isinstance(fixed, Pattern) and fixed.fill({}, "instruction", "t:2") == "Summarise the article."
    rows = [{"text": "long words", "summary": "short words"}]
    assert (
        choose(ALPACA, rows, instruction="Summarise the article.", output="summary").pattern_of("instruction") is None
    )


@pytest.mark.parametrize(
    ("item", "words"), [("output", "FIELD=COLUMN"), ("otput=a", "no field 'otput'"), ("output=", "FIELD=COLUMN")]
)
def test_a_map_that_cannot_be_read_is_a_usage_error(item, words):
    with pytest.raises(UserError, match=words) as caught:
        parse_maps([item], ALPACA.fields, "alpaca")
    assert caught.value.exit_code == ExitCode.USAGE
    with pytest.raises(UserError, match="twice"):
        parse_maps(["output=a", "output=b"], ALPACA.fields, "alpaca")


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        ({"instruction": "q", "output": " \n"}, NoAnswer, "no answer, nothing to learn ('output' is empty)"),
        ({"instruction": "q", "output": "NaN"}, BadValue, "the answer is 'NaN', a missing value"),
        ({"instruction": "q", "output": None}, BadValue, "'output' is null"),
        ({"instruction": "q", "output": 5}, BadValue, "'output' is a number, should be text"),
        ({"instruction": "q", "output": ["a"]}, BadValue, "'output' is a list, should be text"),
        ({"instruction": " ", "output": "a"}, BadValue, "no instruction ('instruction' is empty)"),
        ({"prompt": "q", "output": "a"}, BadValue, "has no 'instruction' (it has prompt, output)"),
    ],
)
def test_a_row_that_does_not_fill_the_fields_is_named_with_field_and_reason(row, kind, words):
    choice = choose(ALPACA, [{"instruction": "a", "output": "b"}])
    with pytest.raises(BadValue) as caught:
        fill_fields(row, choice, ALPACA, "t.jsonl:7")
    assert (
        type(caught.value) is kind and caught.value.message.startswith("t.jsonl:7: ") and words in caught.value.message
    )
    assert caught.value.field in ("instruction", "output") and caught.value.exit_code == ExitCode.DATA


def test_an_optional_field_may_be_missing_or_null():
    choice = choose(ALPACA, [{"instruction": "a", "output": "b", "input": "c"}])
    for row in ({"instruction": "q", "output": "a"}, {"instruction": "q", "output": "a", "input": None}):
        assert fill_fields(row, choice, ALPACA, "t:2")["input"] == ""


def test_a_fixed_question_may_hold_the_word_nan_but_an_answer_may_not():
    choice = choose(ALPACA, [{"instruction": "a", "output": "b"}])
    assert fill_fields({"instruction": "nan", "output": "banana"}, choice, ALPACA, "t:2")["instruction"] == "nan"
