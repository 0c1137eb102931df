"""ftkit prep chooses rows: filters, samples, mixtures, splits, duplicates, lengths, augmentation; and what it shows."""

import csv
import io
import json
import sys
from collections import Counter

import pytest
from conftest import assert_refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prep_shell import jsonl, rows_of, run_prep

from ftkit.core.encoding import Encoder
from ftkit.errors import ExitCode
from ftkit.io.template_files import shipped_names

TEXTS = [{"text": f"text number {number} of many"} for number in range(200)]
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def test_a_condition_keeps_the_records_for_which_it_holds(prep):
    rows = [
        {"text": "a", "lang": "en", "n": 1},
        {"text": "b", "lang": "de", "n": 5},
        {"text": "c", "lang": "en", "n": 9},
    ]
    options = ["--template", "text", "--map", "text=text", "--plain"]
    result = prep(*options, "--where", "lang == 'en' and n > 3", stdin=jsonl(*rows))
    assert result.rows == [{"text": "c"}]
    assert "3 rows in = 1 out + 0 rejected + 0 duplicates + 2 filtered (--where 2)" in result.stderr
    for where, code, words in [
        ("lan == 'en'", 3, "did you mean 'lang'"),
        ("lang ==", 2, "--where lang ==: "),
        ("lang > 3", 3, "<stdin>:1: --where:"),
        ("row.__class__", 3, "--where"),
        ("text|length > 100", 3, "0 rows left of 3: 3 left out by --where"),
    ]:
        wrong = prep(*options, "--where", where, stdin=jsonl(*rows))
        assert wrong.exit_code == code and words in wrong.stderr and wrong.stdout == "", where
    assert len(prep("--where", "text in ['a', 'b']", "--template", "text", stdin=jsonl(*rows)).rows) == 2


def test_rows_too_short_or_too_long_are_counted_by_the_option(prep):
    rows = [{"prompt": "a" * n, "completion": "b" * n} for n in (1, 5, 9)]
    result = prep("--min-chars", "3", "--max-chars", "17", stdin=jsonl(*rows))
    assert result.rows == rows[1:2] and "2 filtered (--min-chars 1, --max-chars 1)" in result.stderr


def test_a_sample_is_the_same_for_a_seed_and_in_order(prep):
    first = prep("--sample", "20", stdin=jsonl(*TEXTS))
    assert len(first.rows) == 20 and [row for row in TEXTS if row in first.rows] == first.rows
    assert "200 rows in = 20 out + 0 rejected + 0 duplicates + 180 not sampled" in first.stderr
    assert prep("--sample", "20", stdin=jsonl(*TEXTS)).stdout == first.stdout
    assert prep("--sample", "20", "--seed", "1", stdin=jsonl(*TEXTS)).stdout != first.stdout
    assert 5 < len(prep("--sample", "0.1", stdin=jsonl(*TEXTS)).rows) < 40


def test_a_shuffle_keeps_every_row_and_changes_with_the_seed(prep):
    first = prep("--shuffle", stdin=jsonl(*TEXTS))
    assert first.rows != TEXTS and sorted(map(str, first.rows)) == sorted(map(str, TEXTS))
    assert prep("--shuffle", stdin=jsonl(*TEXTS)).stdout == first.stdout
    assert prep("--shuffle", "--seed", "1", stdin=jsonl(*TEXTS)).stdout != first.stdout


def test_weighted_inputs_are_mixed_in_their_proportions_and_reported(prep, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(jsonl(*({"text": f"{name} {number}"} for number in range(1000))))
    result = prep("a.jsonl=0.7", "b.jsonl=0.3")
    counts = Counter(row["text"][0] for row in result.rows)
    assert abs(counts["a"] - 0.7 * len(result.rows)) <= 1 and counts["a"] == 1000
    assert "mixed: a.jsonl 1,000 (69.98%)" in result.stderr and "not sampled" in result.stderr
    ten = prep("a.jsonl=3", "b.jsonl=1", "--sample", "100")
    assert Counter(row["text"][0] for row in ten.rows) == {"a": 75, "b": 25}
    assert prep("a.jsonl=0.7", "b.jsonl").exit_code == ExitCode.USAGE
    wrong = ["a.jsonl=0", "a.jsonl=-1", "a.jsonl=nan", "a.jsonl=inf", "a.jsonl=much", "a.jsonl="]
    for argument in (*wrong, "*.jsonl=-1", "hf:org/x=-1", "missing.jsonl=-1", "missing.jsonl=0"):
        weight = argument.partition("=")[2]
        assert_refused(prep(argument, "b.jsonl=1"), ExitCode.USAGE, f"{argument}: '{weight}' is no weight", "a weight")
    assert "missing=x.jsonl: no such file" in prep("missing=x.jsonl").stderr
    (tmp_path / "a=-1").write_text(jsonl({"text": "a"}))
    assert prep("a=-1").rows == [{"text": "a"}]


def test_nearly_equal_rows_are_left_out_and_their_clusters_reported(prep):
    pytest.importorskip("datasketch")
    text = " ".join(f"{word} {other}" for word in WORDS for other in WORDS)
    rows = [{"text": text}, {"text": text + " and a bit"}, {"text": " ".join(WORDS)}, {"text": text.upper() + "."}]
    result = prep("--dedupe", "near", stdin=jsonl(*rows))
    assert result.rows == [rows[0], rows[2]]
    assert "+ 2 duplicates (2 of them near)" in result.stderr
    assert "near duplicates: 1 clusters; the largest are those of <stdin>:1 (2)" in result.stderr
    assert len(prep(stdin=jsonl(*rows)).rows) == 4


def test_rows_that_were_made_of_one_record_are_compared_with_each_other(prep, tmp_path):
    pytest.importorskip("datasketch")
    (tmp_path / "more.py").write_text(
        "def rows(row): return [row, {'text': row['text'][::-1]}, {'text': row['text'] + '!'}]\n"
    )
    result = prep("--dedupe", "near", "--augment", "more.py:rows", stdin=jsonl({"text": " ".join(WORDS)}))
    assert [row["text"] for row in result.rows] == [" ".join(WORDS), " ".join(WORDS)[::-1]], result.stderr
    assert "1 rows in + 2 made = 2 out + 0 rejected + 1 duplicates (1 of them near)" in result.stderr


def test_without_datasketch_near_duplicates_are_refused_with_the_command_to_install_it(prep, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    result = prep("--dedupe", "near", stdin=jsonl(*TEXTS))
    assert result.exit_code == ExitCode.ENVIRONMENT and "pip install" in result.stderr and result.stdout == ""


def test_a_stratified_split_keeps_the_shares_within_each_label(prep, tmp_path):
    rows = [{"text": f"text {number}", "label": "rare" if number % 20 == 0 else "common"} for number in range(400)]
    options = ["--split", "train=0.8,test=0.2", "-o", "s", "--stratify", "label", "--stats"]
    result = prep(*options, stdin=jsonl(*rows))
    test = Counter(row["label"] for row in rows_of((tmp_path / "s/test.jsonl").read_text()))
    assert abs(test["rare"] - 4) <= 1 and abs(test["common"] - 76) <= 1, result.stderr
    assert "label rare: 20 (5.0%)" in result.stderr
    assert "no column 'lable'" in prep(*options[:-2], "lable", "--force", stdin=jsonl(*rows)).stderr
    assert prep("--stratify", "label", stdin=jsonl(*rows)).exit_code == ExitCode.USAGE


def test_equal_rows_stay_together_in_a_stratified_split(prep, tmp_path):
    rows = [{"text": f"text {number % 9}", "label": "abc"[number % 3]} for number in range(90)]
    options = ["--dedupe", "none", "--split", "train=0.5,test=0.5", "--stratify", "label", "-o", "s"]
    result = prep(*options, stdin=jsonl(*rows))
    train, test = (rows_of((tmp_path / f"s/{part}.jsonl").read_text()) for part in ("train", "test"))
    assert len(train) + len(test) == 90 and train and test, result.stderr
    assert not {row["text"] for row in train} & {row["text"] for row in test}


def test_what_a_row_weighs_travels_through_templates_where_the_record_is_a_training_row(prep):
    ready = [
        {"prompt": "q", "completion": "a long answer"},
        {"prompt": "q", "completion": "a heavy answer", "weight": 3},
    ]
    for options in ([], ["--template", "alpaca"], ["--template", "chatml"], ["--template", "completion"]):
        assert [row.get("weight") for row in prep(*options, stdin=jsonl(*ready)).rows] == [None, 3]
        bad = prep(*options, stdin=jsonl(*ready, {**ready[0], "weight": -3}))
        assert bad.exit_code == ExitCode.DATA and "<stdin>:3: 'weight' is -3" in bad.stderr
    chat = {"messages": CHAT, "weight": 2, "meta": {"made_by": "f"}, "id": 5}
    (row,) = prep("--template", "chatml", stdin=jsonl(chat)).rows
    assert (row["weight"], row["meta"], row["template"][:7]) == (2, {"made_by": "f"}, "chatml@")
    (row,) = prep(stdin=jsonl({"messages": CHAT, "weight": None, "label": None})).rows
    assert row == {"messages": CHAT}
    table = "prompt,completion,weight\nq,a long answer,2\nq,another long answer,\n"
    for options in ([], ["--template", "completion"]):
        assert [row.get("weight") for row in prep(*options, stdin=table).rows] == [2, None]
        assert "'weight' is text" in prep(*options, stdin=table + "q,a third long answer,heavy\n").stderr
    products = jsonl({"product": "Lamp", "text": "It shines.", "weight": 3})
    mapped = prep("--template", "alpaca", "--map", "instruction=On {product}", "--map", "output=text", stdin=products)
    assert "weight" not in mapped.rows[0] and "left out: weight" in mapped.stderr


def test_a_conversation_in_which_an_answer_is_empty_is_left_out_and_said(prep):
    blank = [CHAT[0], {"role": "assistant", "content": " "}, *CHAT[2:]]
    flat = {"text": "### Human: a ### Assistant: ### Human: b ### Assistant: c"}
    result = prep(stdin=jsonl({"messages": CHAT}, {"messages": blank}))
    assert result.exit_code == 0 and result.rows == [{"messages": CHAT}]
    assert "left out: <stdin>:2: turn 2: no answer, nothing to learn" in result.stderr
    assert "1 out + 1 rejected" in result.stderr
    alone = prep(stdin=jsonl({"messages": blank}))
    assert alone.exit_code == ExitCode.DATA and "0 rows left of 1" in alone.stderr
    assert prep("--template", "chatml", stdin=jsonl(flat)).exit_code == ExitCode.DATA


def test_statistics_count_lengths_and_leaks_between_parts(prep, tmp_path):
    rows = [{"prompt": f"q{number % 50}", "completion": f"{number}" + "x" * number} for number in range(200)]
    result = prep("--stats", "--json", stdin=jsonl(*rows))
    assert result.exit_code == 0, result.stderr
    chars = json.loads(result.stdout)["stats"]["chars"]
    lengths = sorted(len(row["prompt"]) + len(row["completion"]) for row in rows)
    assert (chars["p50"], chars["p95"], chars["max"]) == (lengths[99], lengths[189], lengths[-1])
    assert sum(count for _, _, count in chars["histogram"]) == 200
    assert all(sum(low <= n <= high for n in lengths) == count for low, high, count in chars["histogram"])
    split = prep("--stats", "--split", "a=0.5,b=0.5", "-o", "d", stdin=jsonl(*rows))
    assert "rows ask what is also asked in the other part" in split.stderr and "█" in split.stderr
    assert "median" in prep("--stats", stdin=jsonl(*rows)).stderr


def test_a_label_that_is_known_is_counted_however_many_there_are(prep):
    labels = [f"l{number}" for number in range(1005)] + ["l0"] * 9
    options = ["--stats", "--dedupe", "none"]
    rows = jsonl(*({"text": f"{number}", "label": label} for number, label in enumerate(labels)))
    found = json.loads(prep(*options, "--json", stdin=rows).stdout)["stats"]
    assert found["labels"]["l0"] == 10 and len(found["labels"]) == 1000 and found["other_labels"] == 5
    told = prep(*options, stdin=rows).stderr
    assert "label l0: 10 (1.0%)" in told and "beyond the first 1,000 were not told apart: 5 rows" in told


def test_rows_that_are_also_in_a_test_set_are_counted_and_with_strict_refused(prep, tmp_path):
    (tmp_path / "test.jsonl").write_text(jsonl({"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}))
    rows = jsonl(
        {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "other"}, {"prompt": "x", "completion": "y"}
    )
    result = prep("--against", "test.jsonl", stdin=rows)
    assert len(result.rows) == 3 and "leak: 1 rows are also in test.jsonl, 1 more ask the same" in result.stderr
    strict = prep("--against", "test.jsonl", "--strict", "-o", "out.jsonl", stdin=rows)
    assert strict.exit_code == ExitCode.DATA and not (tmp_path / "out.jsonl").exists()
    assert prep("--strict", stdin=rows).exit_code == ExitCode.USAGE


AUGMENT = """
def rows(row):
    if row["text"] == "drop":
        return []
    if row["text"] == "crash":
        raise ValueError("no")
    if row["text"] == "odd":
        return ["x"]
    return [row, {"text": row["text"].upper()}]
"""


def test_a_function_of_ones_own_makes_rows_which_are_marked(prep, tmp_path):
    (tmp_path / "mine.py").write_text(AUGMENT)
    result = prep("--augment", "mine.py:rows", stdin=jsonl({"text": "a"}, {"text": "drop"}, {"text": "b"}))
    marked = {"meta": {"made_by": "mine.py:rows"}}
    assert result.rows == [{"text": "a"}, {"text": "A", **marked}, {"text": "b"}, {"text": "B", **marked}]
    assert "3 rows in + 2 made = 4 out + 0 rejected + 0 duplicates + 1 filtered (--augment 1)" in result.stderr
    assert prep("--augment", "mine.py:rows", "--plain", stdin=jsonl({"text": "a"})).rows == [
        {"text": "a"},
        {"text": "A"},
    ]
    for text, words in (("crash", "<stdin>:2: --augment: ValueError: no"), ("odd", "gave text, should give a list")):
        wrong = prep("--augment", "mine.py:rows", stdin=jsonl({"text": "a"}, {"text": text}))
        assert wrong.exit_code == ExitCode.DATA and words in wrong.stderr
    for address, words in (("mine.py:row", "did you mean 'rows'"), ("no.py:f", "no such file"), ("mine", "FILE.py:")):
        wrong = prep("--augment", address, stdin=jsonl({"text": "a"}))
        assert wrong.exit_code == ExitCode.USAGE and words in wrong.stderr


def test_plain_leaves_out_what_only_ftkit_reads(prep):
    result = prep("--template", "alpaca", "--plain", stdin=jsonl({"question": "q", "answer": "a"}))
    assert list(result.rows[0]) == ["prompt", "completion"]


def test_the_templates_are_listed_with_what_they_need(prep):
    listed = prep("--list-templates")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == shipped_names()
    assert "instruction, output, [input]" in listed.stdout
    found = json.loads(prep("--list-templates", "--json").stdout)
    assert [template["name"] for template in found["templates"]] == shipped_names()


CHAT = [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")]


def test_every_shape_of_preference_goes_through_templates(prep):
    pair = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert prep(stdin=jsonl({**pair, "id": 1})).rows == [pair]
    named = prep("--template", "preference", stdin=jsonl(pair)).rows[0]
    assert named.pop("template").startswith("preference@") and named == pair
    alpaca = prep("--template", "alpaca", stdin=jsonl(pair)).rows[0]
    assert "### Instruction:\nq\n" in alpaca["prompt"] and alpaca["chosen"] == "good"
    chat = prep("--template", "llama3", stdin=jsonl(pair)).rows[0]
    assert chat["prompt"] == [{"role": "user", "content": "q"}] and chat["rejected"][0]["role"] == "assistant"
    refused = prep("--template", "text", stdin=jsonl(pair))
    assert refused.exit_code == ExitCode.DATA and "no place for pairs" in refused.stderr
    good = prep("--template", "alpaca", "--map", "instruction=prompt", "--map", "output=chosen", stdin=jsonl(pair))
    assert set(good.rows[0]) == {"prompt", "completion", "template"}


def test_tool_calls_stay_without_a_template_and_are_refused_by_one_that_has_no_place_for_them(prep):
    row = {
        "conversations": [
            {"from": "human", "value": "area?"},
            {"from": "function_call", "value": '{"name": "area", "arguments": {"x": 2}}'},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "4."},
        ],
        "tools": '[{"name": "area"}]',
    }
    (out,) = prep(stdin=jsonl(row)).rows
    assert out["tools"] == [{"type": "function", "function": {"name": "area"}}]
    assert [turn["role"] for turn in out["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert out["messages"][1]["tool_calls"][0]["function"] == {"name": "area", "arguments": {"x": 2}}
    assert prep(stdin=jsonl(out)).rows == [out]
    refused = prep("--template", "llama3", stdin=jsonl(row))
    assert refused.exit_code == ExitCode.DATA and "turn 2 calls a tool" in refused.stderr


def test_train_refuses_what_it_cannot_train_yet(run_here, tmp_path):
    (tmp_path / "p.jsonl").write_text(jsonl({"prompt": "q", "chosen": "a", "rejected": "b"}))
    result = run_here("train", "p.jsonl", "--dry-run")
    assert result.exit_code == ExitCode.DATA
    assert "p.jsonl:1: rows of preference cannot be trained yet" in result.stderr


def test_text_that_looks_like_a_special_token_is_kept_and_counted(prep):
    result = prep(stdin=jsonl({"text": "hello <|im_end|> you"}, {"text": "a < b"}))
    assert (
        result.rows[0]["text"] == "hello <|im_end|> you"
        and "1 rows hold text that looks like a special" in result.stderr
    )


@pytest.fixture(scope="module")
def lengths(tmp_path_factory, tiny_model):
    """Rows of known numbers of tokens, in a folder with the model that counts them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)


def test_rows_beyond_the_limit_are_dropped_cut_or_an_error_and_answer_tokens_counted(prep, tiny_model, lengths):
    rows = [{"prompt": "q:", "completion": "short"}, {"prompt": "q:", "completion": "long " * 40}]
    most = lengths("q:") + 20
    options = ["--tokenizer", tiny_model, "--max-tokens", most]
    dropped = prep(*options, stdin=jsonl(*rows))
    assert dropped.rows == rows[:1]
    lost = lengths("long " * 40) + 1
    assert f"1 rows dropped, {lost} answer tokens lost" in dropped.stderr and "(--max-tokens 1)" in dropped.stderr
    cut = prep(*options, "--overlength", "truncate", "--stats", stdin=jsonl(*rows))
    assert rows[1]["completion"].startswith(cut.rows[1]["completion"]) and cut.rows[1]["completion"]
    assert lengths("q:") + lengths(cut.rows[1]["completion"]) + 1 <= most and "1 rows cut" in cut.stderr
    stopped = prep(*options, "--overlength", "error", stdin=jsonl(*rows))
    assert (
        stopped.exit_code == ExitCode.DATA
        and "<stdin>:2: " in stopped.stderr
        and "tokens, --max-tokens is" in stopped.stderr
    )
    gone = prep(
        *options,
        "--overlength",
        "truncate",
        "--on-error",
        "skip",
        stdin=jsonl(rows[0], {"prompt": "q: " * 60, "completion": "a"}),
    )
    assert gone.rows == rows[:1] and "no answer would be left" in gone.stderr
    assert prep("--max-tokens", "9", stdin=jsonl(*rows)).exit_code == ExitCode.USAGE


def test_pairs_are_not_cut_and_what_is_rejected_is_in_the_ledger(prep, tiny_model, lengths):
    rows = jsonl(
        {"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "long " * 40, "rejected": "b"}
    )
    options = ["--tokenizer", tiny_model, "--max-tokens", "20", "--overlength", "truncate"]
    stopped = prep(*options, stdin=rows)
    assert stopped.exit_code == ExitCode.DATA and "answers to be compared are not cut" in stopped.stderr
    assert "hint: --overlength drop" in stopped.stderr and "no answer would be left" not in stopped.stderr
    skipped = prep(*options, "--on-error", "skip", stdin=rows)
    lost = lengths("long " * 40) + 1
    assert f"longer than --max-tokens: 1 rows rejected, {lost} answer tokens lost" in skipped.stderr


def test_a_conversation_is_cut_after_an_answer(prep, tiny_model):
    options = ["--tokenizer", tiny_model, "--template", "chatml", "--max-tokens", "60", "--overlength", "truncate"]
    (row,) = prep(*options, stdin=jsonl({"messages": CHAT})).rows
    assert 0 < len(row["messages"]) < 6 and row["messages"] == CHAT[: len(row["messages"])]
    assert row["messages"][-1]["role"] == "assistant"


def test_rows_are_shown_with_trained_tokens_marked_and_boundaries(prep, tiny_model):
    rows = jsonl({"prompt": "Below is", "completion": " an é"})
    shown = prep("--show", "1", "--tokenizer", tiny_model, stdin=rows)
    (line,) = [line for line in shown.stderr.splitlines() if "⟦" in line]
    untrained, _, trained = line.partition("⟦")
    assert untrained.replace("│", "") == "Below is" and trained.endswith("<|endoftext|>⟧")
    assert trained.replace("│", "") == " an é<|endoftext|>⟧" and "│" in trained
    assert shown.rows == rows_of(rows)
    chat = prep("--show", "1", "--template", "chatml", "--tokenizer", tiny_model, stdin=jsonl({"messages": CHAT}))
    text = chat.stderr.replace("│", "")
    assert text.count("⟦") == 3 and "⟦assistant 1<|im_end|>⟧" in text and "user 1<|im_end|>" in text
    pair = prep("--show", "1", "--tokenizer", tiny_model, stdin=jsonl({"prompt": "a", "chosen": "b", "rejected": "c"}))
    assert pair.stderr.count("⟦") == 2


@pytest.mark.parametrize(("options", "encoded"), [([], 2), (["--tokenizer"], 2), (["--stats", "--tokenizer"], 14)])
def test_to_show_some_rows_no_others_are_made_tokens(prep, tiny_model, monkeypatch, options, encoded):
    seen, example = [], Encoder.example
    monkeypatch.setattr(Encoder, "example", lambda encoder, row: seen.append(row) or example(encoder, row))
    options = [*options, tiny_model] if options else []
    shown = prep("--show", "2", *options, stdin=jsonl(*({"text": f"{number}"} for number in range(12))))
    assert len(shown.rows) == 12 and shown.stderr.count("⟦") == 2 and len(seen) == encoded


def test_a_row_that_cannot_be_shown_stops_unless_bad_rows_are_skipped(prep, tiny_model):
    bad, good = {"messages": CHAT}, {"prompt": "a", "completion": "b"}
    options = ["--tokenizer", tiny_model, "--show", "1"]  # this tokenizer has no chat template
    assert_refused(prep(*options, stdin=jsonl(bad)), ExitCode.MODEL, "no chat template")
    skipped = prep(*options, "--on-error", "skip", stdin=jsonl(bad))
    assert skipped.rows == [bad] and "row 1 cannot be shown: the tokenizer has no chat template" in skipped.stderr
    counted = prep("--tokenizer", tiny_model, "--max-tokens", "99", stdin=jsonl(bad))
    assert_refused(counted, ExitCode.MODEL, "<stdin>:1: the tokenizer has no chat template")
    assert prep(*options, stdin=jsonl(good)).rows == [good]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_tokens_are_counted_as_transformers_call_counts_them(prep, tiny_model, monkeypatch, jobs):
    rows = [{"prompt": f"{number} <|im_end|>é", "completion": "word " * (number % 40)} for number in range(1, 200)]
    options = ["--tokenizer", tiny_model, "--max-tokens", "90", "--overlength", "truncate", "--stats", "--jobs", jobs]
    fast = prep(*options, stdin=jsonl(*rows))
    monkeypatch.setattr(Encoder, "_backend", None)
    assert fast == prep(*options, stdin=jsonl(*rows)) and "rows cut" in fast.stderr


ROW = st.sampled_from(
    [{"text": "a"}, {"text": "b"}, {"text": "cc"}, {"text": ""}, {"text": 1}, {"text": "long " * 9}, {}, [], "x"]
)
OPTIONS = st.tuples(
    st.sampled_from([[], ["--where", "text != 'b'"]]),
    st.sampled_from([[], ["--sample", "2"], ["--sample", "0.5"]]),
    st.sampled_from([[], ["--shuffle"]]),
    st.sampled_from([[], ["--min-chars", "2"], ["--max-chars", "9"]]),
    st.sampled_from([[], ["--dedupe", "none"]]),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ROW, max_size=14), OPTIONS, st.booleans())
def test_in_is_out_and_rejected_and_duplicates_and_filtered_and_not_sampled(
    tmp_path, monkeypatch, rows, options, as_csv
):
    rows = [{"text": "first one"}, *rows]
    if as_csv:
        text = io.StringIO()
        csv.writer(text).writerows(
            [["text"], *([row["text"]] for row in rows if isinstance(row, dict) and "text" in row)]
        )
        content, count = text.getvalue(), sum(isinstance(row, dict) and row.get("text", "") != "" for row in rows)
    else:
        content, count = jsonl(*rows), len(rows)
    for old in ("out.jsonl", "bad.jsonl"):
        (tmp_path / old).unlink(missing_ok=True)
    flags = [flag for group in options for flag in group]
    files = [
        "--on-error",
        "skip",
        "--rejects",
        "bad.jsonl",
        "-o",
        "out.jsonl",
        "--json",
        "--format",
        "csv" if as_csv else "jsonl",
    ]
    result = run_prep(monkeypatch, tmp_path, [*flags, *files], content)
    assert result.exit_code in (0, ExitCode.DATA), result.stderr
    summary = json.loads(result.stdout)
    left_out = summary["rejected"] + summary["duplicates"] + sum(summary["filtered"].values()) + summary["not_sampled"]
    assert summary["in"] == summary["out"] + left_out == count
    assert len(rows_of((tmp_path / "bad.jsonl").read_text())) == summary["rejected"]
    written = (tmp_path / "out.jsonl").read_text() if result.exit_code == 0 else ""
    assert len(rows_of(written)) == summary["out"]


def sharded(prep, count, *arguments, stdin=""):
    """The lines of all shards, and the rows that each counted."""
    lines, counted = [], []
    for number in range(1, count + 1):
        result = prep(*arguments, "--shard", f"{number}/{count}", stdin=stdin)
        assert result.exit_code == 0, result.stderr
        lines += result.stdout.splitlines()
        counted.append(int(result.stderr.split(" rows in")[0].split()[-1].replace(",", "")))
    return lines, counted


@pytest.mark.parametrize("count", [1, 3, 12])
def test_the_shards_together_are_the_whole_whatever_was_asked(prep, count):
    rows = [*TEXTS, *TEXTS[:50], {"text": ""}, {"text": "café"}]
    for asked in (["--dedupe", "none"], [], ["--where", "'9' in text"], ["--jobs", "2"]):
        arguments = [*asked, "--template", "text", "--on-error", "skip"]
        lines, counted = sharded(prep, count, *arguments, stdin=jsonl(*rows))
        assert Counter(lines) == Counter(prep(*arguments, stdin=jsonl(*rows)).stdout.splitlines())
        assert sum(counted) == len(rows)


def test_shards_of_every_input_hold_each_record_once(prep, tmp_path):
    import gzip

    import pyarrow
    import pyarrow.parquet

    rows = [{"instruction": f"q {number}", "output": f"a\n{number}"} for number in range(60)]
    table = io.StringIO()
    writer = csv.DictWriter(table, ["instruction", "output"])
    writer.writeheader()
    writer.writerows(rows)
    (tmp_path / "a.csv").write_text(table.getvalue(), newline="")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(table.getvalue().encode()))
    (tmp_path / "utf16.csv").write_bytes(table.getvalue().encode("utf-16"))
    (tmp_path / "a.json").write_text(json.dumps(rows))  # all of it on one line
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = {}
    for name in ("a.csv", "a.csv.gz", "utf16.csv", "a.json", "a.parquet"):
        lines, counted = sharded(prep, 3, tmp_path / name, "--template", "alpaca")
        assert len(lines) == len(set(lines)) == 60 and min(counted) > 5
        found[name] = lines
    assert all(lines == found["a.json"] for lines in found.values())  # what is in a shard depends on the record alone


def test_a_bad_row_stops_the_one_shard_that_it_is_in(prep):
    lines = [*(json.dumps(row) for row in TEXTS), "{broken"]
    ends = [prep("--shard", f"{number}/4", stdin="\n".join(lines)) for number in range(1, 5)]
    assert sorted(end.exit_code for end in ends) == [0, 0, 0, ExitCode.DATA]
    assert sum("<stdin>:201" in end.stderr for end in ends) == 1


def test_a_shard_without_a_record_is_empty_and_said(prep):
    ends = [prep("--shard", f"{number}/2", stdin=jsonl({"text": "one"})) for number in (1, 2)]
    assert sorted(len(end.rows) for end in ends) == [0, 1] and {end.exit_code for end in ends} == {0}
    assert sum("no row falls into shard" in end.stderr for end in ends) == 1
    for wrong in ("0/2", "3/2", "1", "a/b", "1/0", "-1/2"):
        refused = prep("--shard", wrong, stdin=jsonl({"text": "one"}))
        assert refused.exit_code == ExitCode.USAGE and "--shard 1/8" in refused.stderr
