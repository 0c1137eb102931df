"""ftkit prep, as a shell sees it: rows on stdout, words on stderr, one exact error for a bad input."""

import csv
import io
import json
import os
import pty
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prep_shell import jsonl, rows_of

from ftkit.core.columns import is_missing
from ftkit.core.prep_settings import PrepSettings
from ftkit.errors import ExitCode
from ftkit.io.template_files import load_template

PRODUCTS = [
    ("Uplas", "Wall Clock", "A graphic clock with bold numerals, calm above every desk."),
    ("Faiden", "Toaster", 'An unobtrusive "toaster" that lifts small slices.'),
    ("Iro", "Lamp", "A quiet lamp,\nwarm and bright."),
    ("Solinum", "Washbasin", "A slender basin made of polished concrete."),
]
PATTERN = "Write the description. product: {product}; category: {category}"


def table(rows=PRODUCTS, columns=("product", "category", "description", "text"), delimiter=","):
    """A CSV shaped like the Red Dot products; `text` repeats the other columns."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([*row, f"{row[1]}: {row[0]}. {row[2]}"][: len(columns)] for row in rows)
    return text.getvalue()


@pytest.fixture
def reddot(tmp_path):
    path = tmp_path / "reddot.csv"
    path.write_text(table())
    return path


def test_a_table_becomes_rows_with_template_and_pattern(ftkit, reddot):
    result = ftkit("prep", "reddot.csv", "--template", "alpaca")
    assert result.exit_code == 0
    alpaca = load_template("alpaca")
    product, category, description = PRODUCTS[2]
    row = rows_of(result.stdout)[2]
    assert list(row) == ["prompt", "completion", "template", "pattern"]
    question = f"Write the description. product: {product}; category: {category}"
    assert alpaca.typed_text(row["prompt"]) == question
    assert row["completion"] == description
    assert (row["template"], row["pattern"]) == (alpaca.fingerprint, PATTERN)
    assert len(rows_of(result.stdout)) == 4
    for words in (f'instruction = "{PATTERN}"', "output = description", "left out: text", "--map"):
        assert words in result.stderr
    assert "4 rows in = 4 out + 0 rejected + 0 duplicates" in result.stderr


def test_the_same_input_gives_the_same_bytes_from_a_file_a_pipe_and_a_second_pass(ftkit, reddot):
    from_file = ftkit("prep", "reddot.csv", "--template", "alpaca").stdout
    for arguments in (["-"], []):
        assert ftkit("prep", *arguments, "--template", "alpaca", stdin=reddot.read_bytes()).stdout == from_file
    again = ftkit("prep", stdin=from_file)
    assert again.exit_code == 0 and again.stdout == from_file


def test_maps_choose_columns_and_patterns(prep, reddot):
    maps = ["--map", "instruction=Describe {product}, a {category}.", "--map", "output=text"]
    result = prep("reddot.csv", "--template", "alpaca", *maps)
    row = rows_of(result.stdout)[0]
    assert "### Instruction:\nDescribe Uplas, a Wall Clock.\n" in row["prompt"]
    assert row["completion"].startswith("Wall Clock: Uplas. ") and row["pattern"] == "Describe {product}, a {category}."
    by_column = prep("reddot.csv", "--template", "alpaca", "--map", "instruction=product", "--map", "output=text")
    assert "pattern" not in rows_of(by_column.stdout)[0]


def test_a_table_for_a_chat_template_becomes_conversations_of_two_turns(prep, reddot):
    row = rows_of(prep("reddot.csv", "--template", "chatml").stdout)[0]
    assert list(row) == ["messages", "template", "pattern"]
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
    assert row["messages"][1]["content"] == PRODUCTS[0][2]


def test_conversations_of_both_kinds_become_messages(prep):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    expected = {"messages": messages, "template": load_template("chatml").fingerprint}
    for row in ({"messages": messages, "id": 3}, {"conversations": turns, "tools": "[]"}):
        result = prep("--template", "chatml", stdin=jsonl(row))
        assert rows_of(result.stdout) == [expected], result.stderr
    assert rows_of(prep(stdin=jsonl({"conversations": turns})).stdout) == [{"messages": messages}]


def test_plain_text_and_known_rows_pass_without_a_template(prep):
    for row in ({"text": "once upon a time"}, {"prompt": "a", "completion": "b"}):
        result = prep(stdin=jsonl({**row}))
        assert rows_of(result.stdout) == [row]
    result = prep("--template", "text", stdin=jsonl({"text": "once", "id": 1}))
    assert rows_of(result.stdout) == [{"text": "once", "template": load_template("text").fingerprint}]


def test_a_template_of_ones_own_is_taken_from_its_file(prep, reddot, tmp_path):
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\nrequired = ["product", "description"]\n'
        'prompt = "{{ product }}:"\ncompletion = " {{ description }}"\n'
    )
    row = rows_of(prep("reddot.csv", "--template", "mine.toml").stdout)[3]
    assert (
        row["prompt"] == "Solinum:"
        and row["completion"].startswith(" A slender")
        and row["template"].startswith("mine@")
    )


def test_a_delimiter_an_encoding_and_a_byte_order_mark_are_found_and_named(prep, tmp_path):
    (tmp_path / "a.csv").write_bytes(table(delimiter=";").encode("utf-16"))
    result = prep("a.csv", "--template", "alpaca")
    assert len(rows_of(result.stdout)) == 4
    assert "UTF-16" in result.stderr and "';' (semicolon)" in result.stderr


def test_equal_rows_are_left_out_once_and_counted(prep):
    doubled = table(PRODUCTS + PRODUCTS[:2])
    result = prep("--template", "alpaca", stdin=doubled)
    assert len(rows_of(result.stdout)) == 4
    assert "6 rows in = 4 out + 0 rejected + 2 duplicates" in result.stderr
    kept = prep("--template", "alpaca", "--dedupe", "none", stdin=doubled)
    assert len(rows_of(kept.stdout)) == 6


def test_only_equal_rows_get_a_warning(prep):
    result = prep(stdin=jsonl(*[{"text": "same"}] * 7))
    assert result.exit_code == 0 and "all 7 rows are the same" in result.stderr


def test_text_read_in_the_wrong_encoding_gets_a_warning_with_a_sample(prep):
    result = prep(stdin=jsonl({"text": "good café"}, {"text": "bad cafÃ© and more"}))
    assert (
        result.exit_code == 0 and "1 rows look like UTF-8" in result.stderr and "<stdin>:2: bad cafÃ©" in result.stderr
    )


BAD = jsonl({"question": "q1", "answer": "a1"}) + "{broken\n" + jsonl({"question": "q2", "answer": 5}, {"q": 1})


def test_the_first_bad_row_stops_and_is_named(prep, tmp_path):
    (tmp_path / "qa.jsonl").write_text(BAD)
    result = prep("qa.jsonl", "--template", "alpaca", "-o", "out.jsonl")
    assert result.exit_code == ExitCode.DATA and not (tmp_path / "out.jsonl").exists()
    assert result.stderr.count("ftkit: error:") == 1 and "ftkit: error: qa.jsonl:2:2: not JSON" in result.stderr


def test_bad_rows_can_be_skipped_and_each_has_an_address_in_the_rejects(prep, tmp_path):
    (tmp_path / "qa.jsonl").write_text(BAD)
    options = ["--on-error", "skip", "--rejects", "bad.jsonl", "-o", "out.jsonl", "--json"]
    result = prep("qa.jsonl", "--template", "alpaca", *options)
    assert result.exit_code == 0, result.stderr
    rejects = rows_of((tmp_path / "bad.jsonl").read_text())
    assert [(reject["file"], reject["line"], reject["field"]) for reject in rejects] == [
        ("qa.jsonl", 2, None),
        ("qa.jsonl", 3, "output"),
        ("qa.jsonl", 4, "instruction"),
    ]
    assert rejects[0]["row"] == "{broken\n" and rejects[1]["row"] == {"question": "q2", "answer": 5}
    assert "'answer' is a number, should be text" in rejects[1]["reason"]
    assert "has no 'question' (it has q), as the rows from qa.jsonl:1 on do" in rejects[2]["reason"]
    summary = json.loads(result.stdout)
    assert summary["schema"] == "ftkit.prep/1"
    assert (summary["in"], summary["out"], summary["rejected"], summary["duplicates"]) == (4, 1, 3, 0)


def test_a_row_without_an_answer_is_left_out_named_and_counted(prep):
    result = prep("--template", "alpaca", stdin=table([*PRODUCTS, ("Nolo", "Sofa", " ")], PRODUCTS_COLUMNS))
    assert result.exit_code == 0 and len(rows_of(result.stdout)) == 4
    assert "<stdin>:7: no answer, nothing to learn ('description' is empty)" in result.stderr
    assert "5 rows in = 4 out + 1 rejected + 0 duplicates" in result.stderr


PRODUCTS_COLUMNS = ("product", "category", "description")


def test_rows_without_any_answer_are_an_error_with_count_and_lines(prep):
    rows = [{"question": f"q{number}", "answer": ""} for number in range(8)]
    result = prep("--template", "alpaca", "--rejects", "bad.jsonl", stdin=jsonl(*rows))
    assert result.exit_code == ExitCode.DATA and result.stdout == ""
    assert "0 rows left of 8: no answer" in result.stderr and "8 times, lines 1, 2, 3, 4, 5, ..." in result.stderr


def test_five_bad_rows_of_a_kind_are_shown_and_the_others_counted(prep):
    rows = [{"text": number} for number in range(9)] + [{"text": "good"}]
    result = prep("--on-error", "skip", stdin=jsonl(*rows))
    assert result.stderr.count("left out: <stdin>:") == 5 and "left out: 4 more: 'text' is a number" in result.stderr
    assert "10 rows in = 1 out + 9 rejected + 0 duplicates" in result.stderr


def test_a_split_is_a_whole_folder_and_adding_rows_moves_none(prep, tmp_path):
    texts = [{"text": f"text number {number}"} for number in range(300)]
    for folder, rows in (("a", texts[:200]), ("b", texts[::-1])):
        result = prep("--split", "train=0.8,valid=0.2", "-o", folder, stdin=jsonl(*rows))
        assert result.exit_code == 0, result.stderr
    parts = {
        (folder, part): {row["text"] for row in rows_of((tmp_path / folder / f"{part}.jsonl").read_text())}
        for folder in "ab"
        for part in ("train", "valid")
    }
    assert parts["a", "train"] < parts["b", "train"] and parts["a", "valid"] < parts["b", "valid"]
    assert len(parts["b", "train"]) + len(parts["b", "valid"]) == 300
    assert parts["b", "train"].isdisjoint(parts["b", "valid"])
    assert 20 <= len(parts["a", "valid"]) <= 60
    again = prep("--split", "train=1", "-o", "a", stdin=jsonl(*texts))
    assert again.exit_code == ExitCode.EXISTS and "--force" in again.stderr
    assert prep("--split", "train=1", "-o", "a", "--force", stdin=jsonl(*texts)).exit_code == 0
    assert sorted(os.listdir(tmp_path / "a")) == ["manifest.json", "train.jsonl"]


def test_a_folder_that_ftkit_did_not_make_is_never_replaced(prep, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "dear.jpg").write_text("x")
    result = prep("--split", "train=1", "-o", "photos", "--force", stdin=jsonl({"text": "a"}))
    assert result.exit_code == ExitCode.EXISTS and (tmp_path / "photos" / "dear.jpg").exists()


def test_several_inputs_of_one_kind_go_into_one_stream_and_other_kinds_do_not(prep, reddot, tmp_path):
    (tmp_path / "qa.jsonl").write_text(jsonl({"question": "q", "answer": "a"}))
    result = prep("reddot.csv", "qa.jsonl", "--template", "alpaca")
    assert len(rows_of(result.stdout)) == 5
    (tmp_path / "text.jsonl").write_text(jsonl({"text": "a"}))
    (tmp_path / "pairs.jsonl").write_text(jsonl({"prompt": "a", "completion": "b"}))
    mixed = prep("text.jsonl", "pairs.jsonl")
    assert mixed.exit_code == ExitCode.DATA
    assert "pairs.jsonl:1: gives rows of prompt_completion, text.jsonl:1 gives rows of text" in mixed.stderr


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        ('{"messages": []}', 3, "--template chatml"),
        ('{"prompt": "x", "completion": "y", "template": "alpaca@0"}', 3, "would wrap them twice"),
        ('{"prompt": "x", "chosen": "y", "rejected": 5}', 3, "'rejected' is a number, should be text"),
    ],
)
def test_a_bad_input_gets_one_exact_error_and_the_documented_code(prep, tmp_path, content, code, words):
    (tmp_path / "bad.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    result = prep("bad.csv", "--template", "alpaca")
    assert result.exit_code == code and result.stdout == ""
    assert result.stderr.count("ftkit: error:") == 1 and "hint:" in result.stderr and words in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nofile.csv"], 3, "nofile.csv: no such file"),
        (["empty"], 3, "is a directory without data files"),
        (["reddot.csv"], 2, "no --template is given"),
        (["reddot.csv", "--template", "alpacca"], 2, "did you mean 'alpaca'"),
        (["reddot.csv", "--template", "bad.toml"], 3, "bad.toml:2: completion: Expected an expression"),
        (["reddot.csv", "--template", "missing.toml"], 3, "reddot.csv:2: template m: 'foo' is undefined"),
        (["reddot.csv", "--template", "alpaca", "--map", "output=descripton"], 3, "did you mean 'description'"),
        (["reddot.csv", "--template", "alpaca", "--map", "outptu=text"], 2, "did you mean 'output'"),
        (["reddot.csv", "--map", "output=text"], 2, "--template"),
        (["reddot.csv", "--template", "alpaca", "-o", "reddot.csv", "--force"], 2, "would replace the input"),
        (["reddot.csv", "--template", "alpaca", "-o", "./x/../reddot.csv"], 2, "would replace the input"),
        (["reddot.csv", "--template", "alpaca", "-o", "old.jsonl"], 9, "old.jsonl exists"),
        (["reddot.csv", "--template", "alpaca", "-o", "/dev/null", "--force"], 2, "not a regular file"),
        (["reddot.csv", "--template", "alpaca", "--json"], 2, "-o FILE"),
        (["reddot.csv", "--template", "alpaca", "--split", "a=0.5,b=0.5"], 2, "-o FOLDER"),
        (["reddot.csv", "--template", "alpaca", "--split", "a=0.5", "-o", "d"], 2, "sum to 0.5"),
        (["reddot.csv", "--template", "alpaca", "--encoding", "klingon"], 2, "klingon"),
        (["reddot.csv", "--template", "alpaca", "--encoding", "base64"], 2, "base64"),
        (["reddot.csv", "--template", "alpaca", "--delimiter", "::"], 2, "one character"),
        (["reddot.csv", "--template", "alpaca", "--max-field-bytes", "20"], 3, "longer than 20 bytes"),
        (["-", "-", "--template", "alpaca"], 2, "give - once"),
    ],
)
def test_a_wrong_request_gets_one_exact_error_and_the_documented_code(prep, reddot, tmp_path, arguments, code, words):
    (tmp_path / "old.jsonl").write_text("old\n")
    (tmp_path / "bad.toml").write_text('name = "m"\ncompletion = "{% if %}"\n')
    (tmp_path / "missing.toml").write_text('name = "m"\nrequired = ["product"]\ncompletion = "{{ foo }}"\n')
    (tmp_path / "empty").mkdir()
    before = reddot.read_bytes()
    result = prep(*arguments)
    assert result.exit_code == code, result.stderr
    assert result.stdout == "" and words in result.stderr and result.stderr.count("ftkit: error:") == 1
    assert "Traceback" not in result.stderr
    assert reddot.read_bytes() == before and (tmp_path / "old.jsonl").read_text() == "old\n"
    assert sorted(os.listdir(tmp_path)) == ["bad.toml", "empty", "missing.toml", "old.jsonl", "reddot.csv"]


def test_without_input_on_a_terminal_prep_explains_itself_and_does_not_wait(tmp_path):
    master, terminal = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "ftkit", "prep"], stdin=terminal, capture_output=True, cwd=tmp_path, timeout=60
    )
    os.close(master)
    os.close(terminal)
    assert done.returncode == ExitCode.USAGE and b"ftkit prep reddot.csv" in done.stderr


def run_shell(command, cwd):
    command = command.replace("ftkit", f"{sys.executable} -m ftkit")
    return subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, cwd=cwd, timeout=120)


def test_a_reader_that_leaves_ends_prep_quietly_with_141(reddot, tmp_path):
    (tmp_path / "long.jsonl").write_text(jsonl(*({"text": f"line {number} " * 20} for number in range(5000))))
    done = run_shell("ftkit prep long.jsonl | head -1", tmp_path)
    assert done.returncode == ExitCode.CLOSED_PIPE and done.stdout.count(b"\n") == 1
    assert b"error" not in done.stderr and b"Traceback" not in done.stderr


def test_a_full_disk_is_an_error_with_74(reddot, tmp_path):
    done = run_shell("ftkit prep reddot.csv --template alpaca -q > /dev/full", tmp_path)
    assert done.returncode == ExitCode.IO and b"No space left" in done.stderr and b"Traceback" not in done.stderr


def test_closed_streams_are_no_crash(reddot, tmp_path):
    assert run_shell("ftkit prep reddot.csv --template alpaca 2>&-", tmp_path).stdout.count(b"\n") == 4
    for command, code in [
        ("ftkit prep <&-", ExitCode.USAGE),
        ("ftkit prep reddot.csv --template alpaca >&-", ExitCode.IO),
    ]:
        done = run_shell(command, tmp_path)
        assert done.returncode == code and b"is a bug" not in done.stderr, done.stderr


def test_stdout_onto_the_input_is_refused(reddot, tmp_path):
    done = run_shell("ftkit prep reddot.csv --template alpaca >> reddot.csv", tmp_path)
    assert done.returncode == ExitCode.USAGE and b"stdout goes to the input" in done.stderr
    assert reddot.read_text() == table()


def test_prep_loads_no_heavy_library():
    code = (
        "import sys; from ftkit.cli import main\n"
        "try: main(['prep', '--template', 'alpaca', '-q'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'rich', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], input=table().encode(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def run_here(tmp_path, content, **options):
    """prep in this process: exit code, rows and rejects, for laws over many inputs."""
    from ftkit import console
    from ftkit.commands import prep
    from ftkit.errors import UserError

    source, out, rejects = (tmp_path / name for name in ("in.txt", "out.jsonl", "bad.jsonl"))
    source.write_bytes(content)
    out.unlink(missing_ok=True)
    rejects.unlink(missing_ok=True)
    console.set_level(console.QUIET)
    try:
        prep.run(PrepSettings(inputs=[str(source)], output=str(out), rejects=str(rejects), on_error="skip", **options))
        code = 0
    except UserError as error:
        code = error.exit_code
    finally:
        console.set_level(console.NORMAL)
    read = [rows_of(path.read_text(encoding="utf-8")) if path.exists() else None for path in (out, rejects)]
    return code, *read


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)
SLOW_FIXTURE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SLOW_FIXTURE
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8))
def test_no_row_of_any_table_is_lost_or_changed(tmp_path, capsys, pairs):
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([("prompt", "completion"), *pairs])
    code, rows, rejects = run_here(tmp_path, text.getvalue().encode(), dedupe="none", format="csv", delimiter=",")
    good = [(prompt, answer) for prompt, answer in pairs if answer.strip() and not is_missing(answer)]
    assert code == (0 if good else ExitCode.DATA)
    assert [(row["prompt"], row["completion"]) for row in rows or []] == good
    assert len(rejects) == len(pairs) - len(good)


@SLOW_FIXTURE
@given(
    st.lists(
        st.sampled_from([{"text": "a"}, {"text": "b"}, {"text": ""}, {"text": 1}, {}, [], "x"]), min_size=1, max_size=12
    )
)
def test_rows_in_are_rows_out_and_rejected_and_duplicates(tmp_path, capsys, values):
    code, rows, rejects = run_here(tmp_path, jsonl({"text": "first"}, *values).encode(), format="jsonl")
    good = [value["text"] for value in values if isinstance(value, dict) and value.get("text") in ("a", "b")]
    assert code == 0 and [row["text"] for row in rows] == ["first", *dict.fromkeys(good)]
    assert len(rejects) == len(values) - len(good)


@SLOW_FIXTURE
@given(
    st.binary(max_size=120) | st.text('a,;"\n{}[]:1 \t', max_size=60).map(str.encode),
    st.sampled_from(["alpaca", "chatml", None]),
)
def test_any_bytes_end_with_a_documented_code(tmp_path, capsys, content, template):
    code, rows, _ = run_here(tmp_path, content, template=template)
    assert code in (0, ExitCode.USAGE, ExitCode.DATA)
    assert (rows is not None) == (code == 0)


def test_code_alpaca_becomes_rows_but_for_two_without_an_answer(prep, shared):
    result = prep(shared / "data/instruct/code_alpaca_2k.json", "--template", "alpaca")
    assert result.exit_code == 0
    source = json.loads((shared / "data/instruct/code_alpaca_2k.json").read_text())
    rows = rows_of(result.stdout)
    assert [row["completion"] for row in rows] == [row["output"] for row in source if row["output"].strip()]
    assert "2,017 rows in = 2,015 out + 2 rejected + 0 duplicates" in result.stderr
    alpaca = load_template("alpaca")
    assert rows[0]["prompt"] == alpaca.render_prompt(source[0]) and "pattern" not in rows[0]


def test_gsm8k_is_read_by_its_usual_names(prep, shared):
    result = prep(shared / "data/instruct/gsm8k_train.jsonl", "--template", "alpaca")
    assert result.exit_code == 0 and "instruction is question, output is answer" in result.stderr
    rows = rows_of(result.stdout)
    assert len(rows) == 7473 and rows[0]["completion"].endswith("#### 72")


def test_chats_without_tools_are_taken_by_a_template_without_a_place_for_them_and_the_others_named(prep, shared):
    path = shared / "data/chat/glaive_toolcall_en_demo.json"
    assert "calls a tool" in prep(path, "--template", "chatml").stderr
    result = prep(path, "--template", "chatml", "--on-error", "skip")
    chats = [row for row in json.loads(path.read_text()) if row["tools"] == "[]"]
    without = [turns for row in chats if "function_call" not in (turns := json.dumps(row["conversations"]))]
    assert result.exit_code == 0 and f"+ {300 - len(without)} rejected" in result.stderr
    assert len(rows_of(result.stdout)) == len(set(without)) > 0
