"""The table of bad inputs (B1 to B49, those about data) and rows that train refuses: code, one error with its place, hint."""

import gzip
import json

import pytest
from conftest import assert_refused
from prep_shell import Piped, jsonl, run_prep

from ftkit.errors import ExitCode

DATA, USAGE = ExitCode.DATA, ExitCode.USAGE
ALPACA = ["--template", "alpaca"]
CHATML = ["--template", "chatml"]
QUESTION, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
CALLING = {"tool_calls": CALLS["tool_calls"]}
NAN = {"role": "assistant", "content": "nan"}
CHAT = {"messages": [QUESTION, ANSWER]}
PAIR = {"prompt": "a", "completion": "b"}
DPO = {"prompt": "a", "chosen": "b", "rejected": "c"}


def chat(*turns):
    """A good conversation on line 1, this one on line 2."""
    return jsonl({"messages": [QUESTION, ANSWER]}, {"messages": list(turns)})


REFUSED = [
    ("B1", "in.csv", "a,b\n1,2\n", ["in.cvs"], DATA, ["in.cvs: no such file", "did you mean 'in.csv'?"]),
    ("B2", "in.csv", "", [], DATA, ["in.csv: 0 rows"]),
    ("B2", "in.jsonl", "\n \n", [], DATA, ["in.jsonl: 0 rows"]),
    ("B3", "in.csv", "instruction,output\n", ALPACA, DATA, ["header but no rows"]),
    ("B4", "in.csv", "a\n", ["folder"], DATA, ["folder is a directory"]),
    ("B5", "in.csv", "a,b\n1,x\n".encode("utf-16-le"), ALPACA, DATA, ["--encoding utf-16-le"]),
    (
        "B6",
        "in.csv",
        b"instruction,output\nq,\xe9\n",
        ALPACA,
        DATA,
        ["in.csv:2: not UTF-8 at byte 3", "--on-error skip"],
    ),
    ("B6", "in.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', [], DATA, ["in.jsonl:2: not UTF-8 at byte 11"]),
    ("B8", "in.csv", b"instruction,output\n1,x\x00\n", ALPACA, DATA, ["in.csv:2: holds a NUL byte"]),
    ("B8", "in.jsonl", b'{"text": "\x00"}\n', [], DATA, ["in.jsonl:1: holds a NUL byte"]),
    ("B9", "in.csv", "instruction,output\n1,2,3\n", ALPACA, DATA, ["in.csv:2: 3 values, the header has 2 columns"]),
    (
        "B10",
        "in.csv",
        'instruction,output\n1,"x\n2,3\n',
        ALPACA,
        DATA,
        ["in.csv:2: a quote opens here and never closes"],
    ),
    ("B11", "in.csv", "instruction,output\nq," + "x" * 200, [*ALPACA, "--max-field-bytes", "100"], DATA, ["in.csv:2"]),
    ("B12", "in.csv", "a,b;c\n1,2;3\n", ALPACA, DATA, ["fit equally", "--delimiter"]),
    ("B13", "in.csv", "a,a\n1,2\n", ALPACA, DATA, ["same name: a"]),
    ("B14", "in.csv", "a,b\n1,2\n", ALPACA, DATA, ["needs instruction and output; the rows have a, b", "--map"]),
    (
        "B15",
        "in.csv",
        "instruction,output\nq,\nr, \n",
        [*ALPACA, "-q"],
        DATA,
        ["0 rows left of 2", "2 times, lines 2, 3"],
    ),
    ("B16", "in.csv", "instruction,output\nq,nan\n", ALPACA, DATA, ["in.csv:2: the answer is 'nan', a missing value"]),
    ("B16", "in.jsonl", '{"instruction": "q", "output": null}', ALPACA, DATA, ["in.jsonl:1: 'output' is null"]),
    ("B16", "in.jsonl", jsonl(PAIR, {**PAIR, "completion": "NaN"}), [], DATA, ["in.jsonl:2: the answer is 'NaN'"]),
    ("B16", "in.jsonl", jsonl({"text": "a"}, {"text": " nan"}), [], DATA, ["in.jsonl:2: the answer is 'nan'"]),
    ("B16", "in.jsonl", jsonl({"text": "a", "label": "nan"}), [], DATA, ["in.jsonl:1: the answer is 'nan'"]),
    ("B16", "in.jsonl", jsonl({"text": "NULL", "label": "a"}), [], DATA, ["in.jsonl:1: the answer is 'NULL'"]),
    ("B16", "in.jsonl", chat(QUESTION, NAN), [], DATA, ["in.jsonl:2: turn 2: the answer is 'nan'"]),
    ("B16", "in.jsonl", jsonl(DPO, {**DPO, "rejected": "nan"}), [], DATA, ["in.jsonl:2: 'rejected': the answer is"]),
    (
        "B16",
        "in.jsonl",
        jsonl({**DPO, "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, NAN]}),
        [],
        DATA,
        ["in.jsonl:1: 'rejected': the answer is 'nan'"],
    ),
    ("B17", "in.jsonl", '{"text": "a",}\n', [], DATA, ["in.jsonl:1:13: not JSON: trailing comma"]),
    ("B18", "in.jsonl", '[{"text": "a"},\n', [], DATA, ["in.jsonl:1:16: ends inside the array"]),
    (
        "B19",
        "in.jsonl",
        '{"text": "a"}\n{"text": "b',
        [],
        DATA,
        ["in.jsonl:2: ends inside a JSON value (file cut off?)"],
    ),
    ("B20", "in.jsonl", '{"text": "a"} {"text": "b"}\n', [], DATA, ["in.jsonl:1:15: not JSON: unexpected content"]),
    ("B21", "in.jsonl", '{"text": "a", "text": "b"}\n', [], DATA, ["in.jsonl:1: key 'text' stands twice"]),
    ("B22", "in.jsonl", '{"text": NaN}\n', [], DATA, ["in.jsonl:1:10: not JSON: NaN and Infinity"]),
    ("B23", "in.jsonl", '{"text": "a", "n": 99999999999999999999999}\n', [], DATA, ["in.jsonl:1: 9999", "64 bits"]),
    (
        "B23",
        "in.jsonl",
        '{"text": ' + "[" * 300 + "]" * 300 + "}",
        [],
        DATA,
        ["in.jsonl:1: nested more than 200 levels"],
    ),
    ("B24", "in.jsonl", '{"text": "\\ud800"}\n', [], DATA, ["in.jsonl:1:11: not JSON"]),
    ("B25", "in.jsonl", '{"instruction": "q", "output": 5}', ALPACA, DATA, ["in.jsonl:1: 'output' is a number"]),
    ("B26", "in.jsonl", jsonl({"messages": "hello"}), CHATML, DATA, ["in.jsonl:1: 'messages' should be a list"]),
    ("B26", "in.jsonl", jsonl({"messages": []}), CHATML, DATA, ["at least one turn"]),
    (
        "B27",
        "in.jsonl",
        chat({"role": "robot", "content": "x"}),
        CHATML,
        DATA,
        ["in.jsonl:2: turn 1 has the unknown role"],
    ),
    (
        "B27",
        "in.jsonl",
        chat(QUESTION, QUESTION, ANSWER),
        CHATML,
        DATA,
        ["in.jsonl:2: turn 2: two user turns in a row"],
    ),
    ("B27", "in.jsonl", chat(QUESTION, ANSWER, QUESTION), CHATML, DATA, ["in.jsonl:2: ", "ends with a user turn"]),
    (
        "B27",
        "in.jsonl",
        chat(QUESTION, {"role": "system", "content": "s"}, ANSWER),
        CHATML,
        DATA,
        ["turn 2: the system"],
    ),
    ("B28", "in.jsonl", chat(QUESTION), CHATML, DATA, ["in.jsonl:2: no assistant turn"]),
    (
        "B29",
        "in.jsonl",
        chat({"role": "user", "content": [{"type": "image"}]}, ANSWER),
        CHATML,
        DATA,
        ["turn 1", "text only"],
    ),
    (
        "B30",
        "in.jsonl",
        chat(QUESTION, CALLS, {"role": "tool", "content": "4"}, ANSWER),
        CHATML,
        DATA,
        ["in.jsonl:2: turn 2 calls a tool", "chatml"],
    ),
    (
        "B31",
        "in.jsonl",
        jsonl({"prompt": "a", "completion": "b"}, {"text": "c"}),
        [],
        DATA,
        ["in.jsonl:2", "in.jsonl:1"],
    ),
    ("B31", "in.jsonl", jsonl(PAIR, {**PAIR, "label": False}), [], DATA, ["in.jsonl:2: has 'label'", "in.jsonl:1"]),
    (
        "B31",
        "in.jsonl",
        jsonl(PAIR, {**PAIR, "label": False}),
        ["--template", "completion"],
        DATA,
        ["in.jsonl:2: has 'label'"],
    ),
    ("B31", "in.jsonl", jsonl(*[PAIR] * 200, {**PAIR, "label": False}), ALPACA, DATA, ["in.jsonl:201: has 'label'"]),
    ("B31", "in.jsonl", jsonl(*[PAIR] * 200, {**PAIR, "label": False}), CHATML, DATA, ["in.jsonl:201: has 'label'"]),
    ("B31", "in.jsonl", jsonl(PAIR, {**PAIR, "tools": [{"name": "f"}]}), [], DATA, ["in.jsonl:2: has 'tools'"]),
    ("B31", "in.jsonl", jsonl({"text": "a"}, {"text": "a", "label": "x"}), [], DATA, ["in.jsonl:2: has 'label'"]),
    ("B31", "in.jsonl", jsonl(CHAT, {**CHAT, "label": False}), [], DATA, ["in.jsonl:2: has 'label'"]),
    ("B31", "in.jsonl", jsonl(CHAT, {**CHAT, "chosen": "a"}), CHATML, DATA, ["in.jsonl:2: has 'chosen'"]),
    ("B31", "in.jsonl", jsonl({**PAIR, "label": True}, DPO), [], DATA, ["in.jsonl:2: has 'chosen'"]),
    (
        "B31",
        "in.jsonl",
        jsonl(*[{**PAIR, "label": "x"}] * 200, {**PAIR, "label": False}),
        [],
        DATA,
        [":201: has 'label'"],
    ),
    ("B31", "in.jsonl", jsonl(DPO, {**PAIR, "label": True}), [], DATA, ["in.jsonl:2: has no 'chosen'"]),
    ("weight", "in.jsonl", jsonl(CHAT, {**CHAT, "weight": -1}), [], DATA, ["in.jsonl:2: 'weight' is -1"]),
    ("weight", "in.jsonl", jsonl(CHAT, {**CHAT, "weight": -1}), CHATML, DATA, ["in.jsonl:2: 'weight' is -1"]),
    ("weight", "in.jsonl", jsonl(DPO, {**DPO, "weight": 0}), [], DATA, ["in.jsonl:2: 'weight' is 0"]),
    (
        "tools",
        "in.jsonl",
        jsonl(CHAT, {**CHAT, "tools": [{}]}),
        [],
        DATA,
        ["in.jsonl:2: 'tools' should be a list of func"],
    ),
    ("tools", "in.jsonl", chat({**QUESTION, **CALLING}, ANSWER), [], DATA, ["in.jsonl:2: turn 1: only the assistant"]),
    (
        "tools",
        "in.jsonl",
        chat(QUESTION, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}),
        [],
        DATA,
        ["in.jsonl:2: turn 2: the arguments of a call are a list"],
    ),
    (
        "weight",
        "in.jsonl",
        jsonl({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}]}),
        [],
        DATA,
        ["in.jsonl:1: turn 2: 'weight' of a single turn"],
    ),
    ("B9", "in.txt", "Hello there.\nIt is cold, wet.\n", ["--format", "csv", *ALPACA], DATA, ["--documents paragraph"]),
    ("B9", "in.csv", "Title,x\n\n;a;b\n1;2;3\n4;5;6\n", ALPACA, DATA, ["in.csv:3: 1 value", "--skip-lines 2"]),
    (
        "B9",
        "in.csv",
        "a,b\n1,2,3\n4;" + "5" * 30 + "\n",
        [*ALPACA, "--delimiter", ",", "--max-field-bytes", "20"],
        DATA,
        ["in.csv:2: 3 values"],
    ),
    ("B9", "in.csv", "a,b\n1,2,3\n4,5\n", ALPACA, DATA, ["in.csv:2: 3 values", "--skip-lines N"]),
    (
        "B13",
        "in.csv",
        ",".join("aabcdefghijkl") + "\n",
        ALPACA,
        DATA,
        ["same name: a", "--columns a,b,c,d,e,f,g,h,i,j,k,l,m "],
    ),
    ("B32", "in.csv.gz", b"no gzip", [], DATA, ["in.csv.gz: not gzip"]),
    ("B32", "in.csv.gz", gzip.compress(b"a,b\n" * 99, mtime=0)[:-9], ALPACA, DATA, ["in.csv.gz: damaged gzip"]),
    ("B32", "in.csv.zst", b"\x28\xb5\x2f\xfd\x00", [], DATA, ["in.csv.zst: damaged Zstandard"]),
    ("B33", "in.csv", b"PAR1xxxxPAR1", ALPACA, DATA, ["damaged Parquet"]),
    ("B33", "in.csv", b"PK\x03\x04xxxx", ALPACA, DATA, ["xlsx"]),
    ("B33", "in.csv", b"%PDF-1.4\nxxx", ALPACA, DATA, ["a PDF file"]),
    (
        "B34",
        "in.jsonl",
        jsonl({"text": "a"}),
        ["--against", "test.txt", "--strict", "-o", "out.jsonl"],
        DATA,
        ["1 rows are"],
    ),
    (
        "B36",
        "in.jsonl",
        jsonl({"text": "a"}, {"text": "long " * 99}),
        ["--tokenizer", "builtin:tiny", "--max-tokens", "20", "--strict"],
        DATA,
        ["longer than --max-tokens 20: 1 rows dropped"],
    ),
    (
        "B36",
        "in.jsonl",
        jsonl({"text": "a"}, {"text": "long " * 99}),
        ["--tokenizer", "builtin:tiny", "--max-tokens", "20", "--overlength", "truncate", "--strict"],
        DATA,
        ["longer than --max-tokens 20: 1 rows cut"],
    ),
    (
        "B38",
        "in.jsonl",
        jsonl({"text": "a"}, {"text": "b <|im_end|>"}),
        ["--special-tokens", "reject"],
        DATA,
        ["in.jsonl:2: holds <|im_end|>, the text of a special token", "--on-error skip"],
    ),
    ("B44", "in.jsonl", jsonl({"text": "a"}), ["-o", "in.jsonl", "--force"], USAGE, ["would replace the input"]),
    ("B45", "in.jsonl", jsonl({"text": "a"}), ["-o", "test.txt"], ExitCode.EXISTS, ["test.txt exists", "--force"]),
    ("B46", "in.jsonl", jsonl({"text": "a"}), ["--template", "alpacca"], USAGE, ["did you mean 'alpaca'"]),
    (
        "B47",
        "in.jsonl",
        jsonl({"text": "a"}),
        ["--template", "syntax.toml"],
        DATA,
        ["syntax.toml:4: completion: "],
    ),
    ("B48", "in.jsonl", jsonl({"text": "a"}), ["--template", "escape.toml"], DATA, ["sandbox"]),
    (
        "B48",
        "in.jsonl",
        jsonl({"text": "a"}),
        ["--template", "loops.toml"],
        DATA,
        ["sandbox", "a loop takes more than"],
    ),
    ("B48", "in.jsonl", jsonl({"text": "a"}), ["--template", "large.toml"], DATA, ["sandbox", "too large"]),
    ("B48", "in.jsonl", jsonl({"text": "a"}), ["--template", "endless.toml"], DATA, ["in.jsonl:1: ", "calls itself"]),
    ("B47", "in.jsonl", jsonl({"text": "a"}), ["--template", "stop.toml"], DATA, ["stop.toml: 'stop' should be"]),
    (
        "B49",
        "in.jsonl",
        jsonl({"text": "a"}),
        ["--template", "missing.toml"],
        DATA,
        ["in.jsonl:1: ", "'foo' is undefined", 'required = ["text", "foo"]'],
    ),
]
TEMPLATES = {
    "syntax": '"""a\n{% if %}"""',
    "escape": '"{{ text.__class__.__mro__ }}"',
    "loops": '"{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}{{ text }}"',
    "large": '"{{ text * 999999999 }}"',
    "missing": '"{{ foo }}"',
    "deep": '"' + "a{% if text %}" * 80 + "{{ text }}" + "{% endif %}" * 80 + '"',
    "endless": '"{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(text) }}"',
    "stop": '"{{ text }}"\nstop = "### End"',
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with what the requests name."""
    from ftkit.io import template

    monkeypatch.setattr(template, "LONGEST_LOOP_SECONDS", 0.2)
    (tmp_path / "folder").mkdir()
    (tmp_path / "test.txt").write_text(jsonl({"text": "a"}))
    for name, body in TEMPLATES.items():
        (tmp_path / f"{name}.toml").write_text(f'name = "{name}"\nrequired = ["text"]\ncompletion = {body}\n')
    return tmp_path


@pytest.mark.parametrize(("number", "name", "content", "options", "code", "words"), REFUSED)
def test_a_bad_input_is_refused_with_its_place_and_a_hint(
    monkeypatch, folder, number, name, content, options, code, words
):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    inputs = [] if number in ("B1", "B4") else [name]
    before = sorted(path.name for path in folder.iterdir())
    options = options if "-o" in options else [*options, "-o", "out.jsonl"]
    assert_refused(run_prep(monkeypatch, folder, [*inputs, *options], ""), code, *words)
    assert sorted(path.name for path in folder.iterdir()) == before


TAKEN = [
    ("B5", b"\xef\xbb\xbfinstruction,output\nq,good\n", ALPACA, "UTF-8, found by its byte order mark"),
    ("B5", "instruction,output\nq,good\n".encode("utf-16"), ALPACA, "UTF-16, found by its byte order mark"),
    ("B6", b"instruction,output\nq,\xe9\nq,good\n", [*ALPACA, "--on-error", "skip"], "1 rejected"),
    ("B6", b"instruction,output\nq,go\xf6d\n", [*ALPACA, "--encoding", "latin-1"], "1 out"),
    ("B7", "instruction,output\nq,cafÃ© good\n", ALPACA, "in.csv:2: cafÃ© good"),
    ("B12", "instruction|output\nq|good\n", ALPACA, "columns are separated by '|' (pipe)"),
    ("B16", "instruction,output\nq,NULL\nq,good\n", [*ALPACA, "--on-error", "skip"], "2 rows in = 1 out + 1 rejected"),
    (
        "B16",
        '{"text": "nan"}\n{"text": "good"}',
        ["--on-error", "skip"],
        "2 rows in = 1 out + 1 rejected",
    ),
    ("B16", "null\ngood", ["--documents", "line"], "2 rows in = 2 out"),
    ("B31", "prompt,completion,label\nq,good,\nq,good too,x\n", [], "left out: label"),
    ("B18", '[{"text": "good"}]', ["--format", "json"], "1 out"),
    ("B34", '{"text": "a"}\n{"text": "good"}', ["--against", "test.txt"], "leak: 1 rows are also in test.txt"),
    ("B35", '{"text": "good"}\n{"text": "good"}', [], "all 2 rows are the same"),
    ("B38", '{"text": "good <|im_end|>"}', [], "1 rows hold text that looks like a special token"),
    ("B38", '{"text": "</s>"}\n{"text": "good"}', ["--special-tokens", "reject", "--on-error", "skip"], "1 rejected"),
    ("B48", '{"text": "good"}', ["--template", "deep.toml"], "1 out"),
    ("B39", "instruction,output\nq,=cmd()|good\n", ALPACA, "1 out"),
    ("B40", '{"text": "good <script>alert(1)</script>"}', [], "1 out"),
    ("B41", '{"text": "good \\u001b[31m\\u202e"}', [], "1 out"),
]


@pytest.mark.parametrize("content", [b'[{"text": "a"},\n{"text": "\xe9"}]', b"t\xe9xt,label\na,b\n"])
def test_where_no_row_can_be_left_out_no_hint_says_so(monkeypatch, folder, content):
    (folder / "in.csv").write_bytes(content)
    result = run_prep(monkeypatch, folder, ["in.csv", "--on-error", "skip"], "")
    assert_refused(result, DATA, "not UTF-8 at byte", "--encoding latin-1")
    assert "--on-error" not in result.stderr


@pytest.mark.parametrize(("number", "content", "options", "words"), TAKEN)
def test_an_odd_input_is_taken_and_what_is_odd_is_said(monkeypatch, folder, number, content, options, words):
    (folder / "in.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    result = run_prep(monkeypatch, folder, ["in.csv", *options], "")
    assert result.exit_code == 0 and words in result.stderr, result.stderr
    kept = [text for row in result.rows for text in row.values()]
    if number in ("B38", "B40", "B41") and "reject" not in options:
        assert kept == [json.loads(content)["text"]]
    if number == "B39":
        assert kept[1] == "=cmd()|good"


def test_b43_a_terminal_and_no_file_is_a_usage_error_and_no_hang(monkeypatch, tmp_path):
    monkeypatch.setattr(Piped, "isatty", lambda self: True)
    result = run_prep(monkeypatch, tmp_path, ["--template", "alpaca"], "")
    assert result.exit_code == ExitCode.USAGE and "nothing is piped in and no file is given" in result.stderr
