"""ftkit prep reads: tables of every make, JSON inside JSON, Parquet, packed files, folders, text, hub data sets."""

import gzip
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import assert_refused
from prep_shell import jsonl, rows_of

from ftkit.errors import ExitCode, UserError

QA = [{"prompt": f"q{number}", "completion": f"a{number}"} for number in range(5)]


def parquet_bytes(table):
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


def packed(text, codec):
    if codec == "gz":
        return gzip.compress(text.encode())
    return pyarrow.compress(text.encode(), codec="zstd", asbytes=True)


@pytest.mark.parametrize("codec", ["gz", "zst"])
def test_packed_rows_are_the_same_as_unpacked_ones_from_a_file_and_from_stdin(prep, tmp_path, codec):
    (tmp_path / f"qa.jsonl.{codec}").write_bytes(packed(jsonl(*QA), codec))
    assert prep(f"qa.jsonl.{codec}").rows == QA
    assert prep("-", stdin=packed(jsonl(*QA), codec)).rows == QA


def test_packed_pieces_one_after_the_other_are_read_whole(prep, tmp_path):
    for codec in ("gz", "zst"):
        (tmp_path / f"qa.jsonl.{codec}").write_bytes(packed(jsonl(*QA[:2]), codec) + packed(jsonl(*QA[2:]), codec))
        assert prep(f"qa.jsonl.{codec}").rows == QA


@pytest.mark.parametrize("codec", ["gz", "zst"])
def test_a_damaged_or_mislabelled_packed_file_is_named_with_its_codec(prep, tmp_path, codec):
    called = {"gz": "gzip", "zst": "Zstandard"}[codec]
    name = f"qa.jsonl.{codec}"
    (tmp_path / name).write_bytes(packed(jsonl(*QA) * 50, codec)[:-9])
    cut = prep(name)
    assert (
        cut.exit_code == ExitCode.DATA and f"{name}: damaged {called}" in cut.stderr and "Traceback" not in cut.stderr
    )
    (tmp_path / name).write_text(jsonl(*QA))
    assert f"{name}: not {called}, as its name says" in prep(name).stderr


def test_parquet_gives_text_numbers_lists_and_dates_as_json_has_them(prep, tmp_path):
    import datetime

    table = pyarrow.table(
        {
            "question": ["a", "b"],
            "answer": ["1", "2"],
            "day": [datetime.date(2020, 1, 2)] * 2,
            "kind": pyarrow.array(["x", "y"]).dictionary_encode(),
        }
    )
    (tmp_path / "qa.parquet").write_bytes(parquet_bytes(table))
    options = ["--template", "completion", "--map", "prompt={question} {day} {kind}", "--map", "completion=answer"]
    result = prep("qa.parquet", *options)
    assert [row["prompt"] for row in result.rows] == ["a 2020-01-02 x", "b 2020-01-02 y"]
    piped = prep("-", *options, stdin=parquet_bytes(table))
    assert piped.stdout == result.stdout, piped.stderr
    (tmp_path / "packed.parquet.gz").write_bytes(gzip.compress(parquet_bytes(table)))
    assert prep("packed.parquet.gz", *options).stdout == result.stdout


def test_damaged_parquet_and_bytes_in_parquet_are_errors(prep, tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(pyarrow.table({"text": ["a"] * 100}))[:-40])
    assert "a.parquet: damaged Parquet" in prep("a.parquet").stderr
    (tmp_path / "b.parquet").write_bytes(parquet_bytes(pyarrow.table({"text": [b"\xff"]})))
    result = prep("b.parquet")
    assert result.exit_code == ExitCode.DATA and "column 'text' holds bytes" in result.stderr
    (tmp_path / "c.parquet").write_bytes(parquet_bytes(pyarrow.table({"text": pyarrow.array([], pyarrow.string())})))
    assert "c.parquet: 0 rows" in prep("c.parquet").stderr


def test_a_folder_and_a_pattern_stand_for_their_files_in_order(prep, tmp_path):
    (tmp_path / "data" / "b").mkdir(parents=True)
    (tmp_path / "data" / ".hidden.jsonl").write_text("no")
    (tmp_path / "data" / "notes.pdf").write_text("no")
    (tmp_path / "data" / "a.jsonl").write_text(jsonl(QA[0]))
    (tmp_path / "data" / "b" / "c.jsonl.gz").write_bytes(packed(jsonl(QA[1]), "gz"))
    (tmp_path / "data" / "z.csv").write_text("prompt,completion\nq2,a2\n")
    for given in ("data", "data/**/*.[jc]s*"):
        result = prep(given)
        assert sorted(row["prompt"] for row in result.rows) == ["q0", "q1", "q2"], result.stderr
        assert f"{given}: 3 files" in result.stderr
    missing = prep("data/*.txt")
    assert missing.exit_code == ExitCode.DATA and "data/*.txt: no such file" in missing.stderr


def test_records_inside_an_object_are_found_by_their_key_with_their_lines(prep, tmp_path):
    nested = {"meta": {"version": 1}, "data": {"instances": QA}}
    (tmp_path / "n.json").write_text(json.dumps(nested, indent=1))
    assert prep("n.json", "--records", "data.instances").rows == QA
    (tmp_path / "bad.json").write_text('{"instances": [\n{"prompt": "a", "completion": "b"},\n{"prompt": "a"}]}\n')
    assert "bad.json:3: has no 'completion'" in prep("bad.json", "--records", "instances").stderr
    wrong = prep("n.json", "--records", "instances")
    assert wrong.exit_code == ExitCode.DATA and "no key 'instances'" in wrong.stderr and "meta, data" in wrong.stderr
    assert "no list of records begins here" in prep("n.json", "--records", "meta").stderr
    lines = jsonl({"rows": QA[:2]}, {"rows": QA[2:]})
    assert prep("--records", "rows", stdin=lines).rows == QA
    skipped = prep("--records", "rows", "--on-error", "skip", stdin=jsonl({"rows": QA[:2]}, {"other": 1}))
    assert skipped.rows == QA[:2] and "<stdin>:2: no 'rows' (it has other) of records" in skipped.stderr


def test_dotted_names_reach_into_records(prep):
    record = {"context": {"title": "T"}, "answers": [{"text": "first"}, {"text": "second"}]}
    maps = ["--map", "prompt=On {context.title}:", "--map", "completion=answers.1.text"]
    result = prep("--template", "completion", *maps, stdin=jsonl(record))
    assert [(row["prompt"], row["completion"]) for row in result.rows] == [("On T:", "second")], result.stderr
    missing = prep("--template", "completion", *maps, stdin=jsonl(record, {**record, "answers": []}))
    assert missing.exit_code == ExitCode.DATA and "<stdin>:2: has no 'answers.1.text'" in missing.stderr
    assert (
        "no column 'answers.7.text'"
        in prep(*["--template", "completion", *maps[:3], "completion=answers.7.text"], stdin=jsonl(record)).stderr
    )


def test_a_table_without_a_header_takes_names_or_numbers(prep):
    table = "good film\t1\nbad film\t0\n"
    named = prep("--columns", "text,label", stdin=table)
    assert named.rows == [{"text": "good film", "label": "1"}, {"text": "bad film", "label": "0"}]
    numbered = prep("--no-header", "--template", "classify", "--map", "text=1", "--map", "label=2", stdin=table)
    assert [row["label"] for row in numbered.rows] == ["1", "0"]
    short = prep("--columns", "text,label,more", stdin=table)
    assert "<stdin>:1: 2 values, --columns names 3 columns" in short.stderr


def test_stray_quotes_are_characters_where_quotes_mean_nothing(prep):
    table = 'text\tlabel\nthe "best\t1\n"odd" one\t0\n'
    assert "quote" in prep(stdin=table).stderr
    result = prep("--quoting", "none", stdin=table)
    assert [row["text"] for row in result.rows] == ['the "best', '"odd" one']


def test_lines_above_a_table_are_passed_over_and_line_numbers_stay_true(prep):
    table = "A title, with; commas\n\nprompt;completion\na;b\nc;d;e\n"
    result = prep("--skip-lines", "2", "--on-error", "skip", stdin=table)
    assert result.rows == [{"prompt": "a", "completion": "b"}]
    assert "<stdin>:5: 3 values, the header has 2 columns" in result.stderr


TEXT = "One line.\nAnother.\n\n \nLast paragraph.\n"


def test_plain_text_is_a_document_a_paragraph_or_a_line_a_row(prep, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    whole = prep("a.txt")
    assert whole.rows == [{"text": TEXT}] and "plain text, one document" in whole.stderr
    assert prep("a.txt", "--documents", "paragraph").rows == [
        {"text": "One line.\nAnother."},
        {"text": "Last paragraph."},
    ]
    assert [row["text"] for row in prep("-", "--documents", "line", stdin=TEXT).rows] == [
        "One line.",
        "Another.",
        "Last paragraph.",
    ]
    (tmp_path / "b.txt").write_text("another file")
    assert len(prep("a.txt", "b.txt").rows) == 2
    assert "0 rows" in prep("--documents", "file", stdin=" \n \n").stderr


def test_a_text_in_which_every_line_has_a_tab_is_a_table(prep, tmp_path):
    (tmp_path / "pairs.txt").write_text("prompt\tcompletion\na\tb\nc\td\n")
    assert prep("pairs.txt").rows == [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


def test_dialogues_in_plain_text_become_conversations(prep):
    text = "User: hi\nthere\nBot: hello\nUser: bye\nBot: see you\n\nUser: one\nBot: two\n"
    result = prep("--turns", "User:,Bot:", stdin=text)
    assert [[turn["content"] for turn in row["messages"]] for row in result.rows] == [
        ["hi\nthere", "hello", "bye", "see you"],
        ["one", "two"],
    ]
    assert "no line begins with User: or Bot:" in prep("--turns", "User:,Bot:", stdin="plain\n").stderr
    assert prep("--turns", "User:", stdin=text).exit_code == ExitCode.USAGE


def test_a_folder_laid_out_as_on_the_hub_is_read_by_its_split(prep, tmp_path):
    (tmp_path / "set" / "data").mkdir(parents=True)
    for split, rows in (("train", QA[:3]), ("test", QA[3:])):
        table = pyarrow.Table.from_pylist(rows)
        (tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet").write_bytes(parquet_bytes(table))
    assert prep("hf:./set").rows == QA[:3]
    assert prep("hf:./set:test").rows == QA[3:]
    wrong = prep("hf:./set:dev")
    assert wrong.exit_code == ExitCode.DATA and "no split 'dev'" in wrong.stderr and "train, test" in wrong.stderr
    assert prep("hf:./nowhere").exit_code == ExitCode.DATA


def test_a_damaged_file_of_a_data_set_is_one_error_and_the_rows_before_it_come(prep, tmp_path):
    data = tmp_path / "set" / "data"
    data.mkdir(parents=True)
    whole = parquet_bytes(pyarrow.Table.from_pylist(QA))
    (data / "train-00000-of-00002.parquet").write_bytes(whole)
    (data / "train-00001-of-00002.parquet").write_bytes(whole[: len(whole) // 2])
    result = prep("hf:./set")
    assert result.exit_code == ExitCode.DATA and result.rows == QA
    error, hint = result.stderr.splitlines()  # `datasets` itself says nothing
    assert error.startswith("ftkit: error: hf:./set: damaged behind row 5: ") and "files again" in hint
    for each in data.iterdir():
        each.unlink()
    (data / "train.jsonl").write_text(jsonl(*QA) + '{"prompt": \n')
    assert_refused(prep("hf:./set"), ExitCode.DATA, "hf:./set: damaged behind row")


class Streamed:
    """Rows as `datasets` streams them."""

    features = None

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return self.rows


def test_a_network_that_goes_away_is_no_fault_of_the_data():
    from ftkit.io.hub_data import number_rows

    def rows():
        yield {"text": "a"}
        raise ConnectionError("Connection reset by peer")

    read = number_rows(Streamed(rows()), "hf:a/b", is_local=False)
    assert next(read).values == {"text": "a"}
    with pytest.raises(UserError, match="hf:a/b: not read behind row 1: Connection reset") as caught:
        next(read)
    assert caught.value.exit_code == ExitCode.ENVIRONMENT


def test_two_encodings_are_read_only_when_given(prep, tmp_path):
    for encoding, text in (("big5", "電影很好"), ("latin-1", "déjà vu")):
        (tmp_path / "a.csv").write_bytes(f"prompt,completion\nx,{text}\n".encode(encoding))
        assert prep("a.csv", "--encoding", encoding).rows == [{"prompt": "x", "completion": text}]
        guess = prep("a.csv")
        assert guess.exit_code == ExitCode.DATA and "not UTF-8" in guess.stderr and "--encoding" in guess.stderr


EXAMPLES = Path(__file__).parents[1] / "docs/examples"
SLOTS, TAGS = f"{EXAMPLES}/slots.py:slots", f"{EXAMPLES}/tags.py:entities"
MADE = {"prompt", "completion", "meta"}
SHARED_ROWS = [
    ("chat/glaive_toolcall_en_demo.json", [], 265, {"messages", "tools"}),
    ("chat/oasst_questions_first476.jsonl", ["--template", "chatml"], 476, {"messages", "template"}),
    ("chat/tinychat_val.txt", ["--turns", "User:,Bot:", "--where", "text.startswith('User:')"], 704, {"messages"}),
    ("classify/banking77_train.csv", ["--template", "classify"], 10_003, {"text", "label", "template"}),
    ("classify/banking77_test.csv", ["--template", "classify"], 3_080, {"text", "label", "template"}),
    ("classify/amazon_cells_labelled.txt", ["--columns", "text,label", "--quoting", "none"], 923, {"text", "label"}),
    ("classify/imdb_labelled.txt", ["--columns", "text,label", "--quoting", "none"], 950, {"text", "label"}),
    ("preference/hh_rlhf_harmless_first1000.jsonl.gz", ["--on-error", "skip"], 990, {"prompt", "chosen", "rejected"}),
    ("preference/dpo_en_demo.json", [], 295, {"prompt", "chosen", "rejected"}),
    ("preference/kto_en_demo.json", [], 300, {"prompt", "completion", "label"}),
    ("extract/snips_validate_GetWeather.json", ["--records", "GetWeather", "--augment", SLOTS], 99, MADE),
    ("ner/emerging.dev.conll", ["--documents", "paragraph", "--augment", TAGS], 1_007, MADE),
    ("text/wiki_demo.txt", ["--documents", "line"], 30, {"text"}),
    ("text/tiny_shakespeare.txt", [], 1, {"text"}),
    ("text/c4_demo.jsonl", [], 300, {"text"}),
]


@pytest.mark.parametrize(("name", "options", "rows", "keys"), SHARED_ROWS)
def test_real_files_become_rows_of_their_kind(prep, shared, name, options, rows, keys):
    result = prep(shared / "data" / name, *options)
    assert result.exit_code == 0, result.stderr
    assert all(set(row) <= keys for row in result.rows)
    assert len(result.rows) >= rows * 0.99 and any(set(row) == keys for row in result.rows)
    assert f"rows in = {len(result.rows):,} out" in result.stderr


SPANISH = [
    "--encoding",
    "latin-1",
    "--on-error",
    "skip",
    "--map",
    "instruction=¿Qué es {F}?",
    "--map",
    "output=Descripción",
]
NAME, TEXT_OF_IT = "景點中文名稱", "景點特色詳細文字簡述"
CHINESE = [
    "--encoding",
    "big5",
    "--on-error",
    "skip",
    "--map",
    f"instruction=介紹 {{{NAME}}}",
    "--map",
    f"output={TEXT_OF_IT}",
]
PADDED = [
    "--skip-lines",
    "11",
    "--delimiter",
    ";",
    "--on-error",
    "skip",
    "--map",
    "instruction={column 1}",
    "--map",
    "output={2010}",
]
MESSY = [
    ("simple.ssv", ["--map", "instruction=Temperature in {place} on {date}?", "--map", "output={temperature}"], 6),
    ("simple.psv", ["--map", "instruction=Dwellings in {Year}?", "--map", "output={All dwellings}"], 28),
    ("example.tsv", ["--map", "instruction=Impressions at {hour}?", "--map", "output={expr1_0_imp}"], 140),
    ("skip_initials.csv", ["--map", "instruction=field1", "--map", "output=field2"], 2),
    ("null.csv", ["--no-header", "--map", "instruction=What is in row {1}?", "--map", "output={3}"], 9),
    ("utf-16le_encoded.csv", ["--map", "instruction={Organisation_code}", "--map", "output=Organisation_name"], 150),
    ("spanish_chars.csv", SPANISH, 20),
    ("characters.csv", CHINESE, 300),
    ("weird_head_padding.csv", PADDED, 30),
]


@pytest.mark.parametrize(("name", "options", "least"), MESSY)
def test_messy_tables_convert_by_a_documented_command(prep, shared, name, options, least):
    result = prep(shared / "data/messy" / name, "--template", "alpaca", *options)
    assert result.exit_code == 0, result.stderr
    assert len(rows_of(result.stdout)) >= least


def test_a_header_without_rows_is_an_exact_error(prep, shared):
    result = prep(shared / "data/messy/utf8bom.csv", "--template", "alpaca")
    assert result.exit_code == ExitCode.DATA and "header but no rows" in result.stderr
