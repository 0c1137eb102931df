"""JSON lines and arrays: rows with their lines, and one exact error for what is no row."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftkit.errors import ExitCode, UserError
from ftkit.io.inputs import ReadOptions, open_input
from ftkit.io.json_array import array_elements
from ftkit.io.jsonl import parse_lines, parse_row, read_rows, rows_output
from ftkit.io.tables import Fault

PLAIN_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def error_of(line):
    with pytest.raises(UserError) as caught:
        parse_row(line if isinstance(line, bytes) else line.encode(), "rows.jsonl:7")
    assert caught.value.exit_code == ExitCode.DATA and caught.value.message.startswith("rows.jsonl:7")
    return caught.value.message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"a": 1,}\n', "7:8: not JSON: trailing comma"),
        ('{"a": 1} {"b": 2}\n', "7:10: not JSON: unexpected content after document"),
        ('{"a": "x', "ends inside a JSON value (file cut off?)"),
        ('{"a": [1, 2', "ends inside a JSON value (file cut off?)"),
        ('{"a": 1, "b": 2, "a": 3}\n', "key 'a' stands twice"),
        ('{"a" :1, "a"\t: 3}\n', "key 'a' stands twice"),
        ('{"m": [{"role": "user", "role": "tool"}]}\n', "key 'role' stands twice"),
        ('{"a": NaN}\n', "NaN and Infinity are no JSON values"),
        ('{"a": -Infinity}\n', "not JSON"),
        ('{"a": 18446744073709551616}\n', "does not fit in 64 bits"),
        ('{"a": -9223372036854775809}\n', "does not fit in 64 bits"),
        ('{"a": ' + "[" * 201 + "]" * 201 + "}\n", "200 levels deep"),
        ('{"a": ' + "[" * 5000 + "]" * 5000 + "}\n", "not JSON"),
        ('{"a": "\\ud800"}\n', "surrogate"),
        ('{"a": "x\x00y"}\n', "holds a NUL byte"),
        (b'{"a": "\xff"}\n', "not UTF-8 at byte 8"),
        ('["a"]\n', "not a JSON object"),
        ("[\n", "a JSON array, not JSONL"),
        ("hello\n", "not JSON"),
    ],
)
def test_what_is_no_row_gets_one_exact_error(line, words):
    assert words in error_of(line)


def test_what_looks_like_a_repeated_key_or_a_large_integer_but_is_not_passes():
    for line in (
        rb'{"a": "say \"a\": and \"a\":"}',
        b'{"a": 1e300}',
        b'{"a": 18446744073709551615}',
        b'{"a": {"a": 1}}',
    ):
        assert parse_row(line, "x:1") == json.loads(line)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(), PLAIN_JSON, max_size=4))
def test_every_json_object_is_read_as_it_was_written(row):
    text = json.dumps(row, ensure_ascii=False)
    try:
        data = text.encode()
    except UnicodeEncodeError:  # a lone surrogate: refused, see above
        return
    assert parse_row(data, "x:1") == row


def test_rows_carry_their_line_and_blank_lines_and_a_byte_order_mark_are_passed_over():
    lines = [b'\xef\xbb\xbf{"a":1}\n', b"\n", b'{"a":"x\xc2\x85y"}']
    assert list(parse_lines(lines, "f")) == [(1, {"a": 1}), (3, {"a": "x\u0085y"})]


def test_a_missing_file_is_an_error_that_names_the_nearest(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(UserError) as caught:
        list(read_rows(str(tmp_path / "trian.jsonl")))
    assert caught.value.exit_code == ExitCode.DATA and "no such file" in caught.value.message
    assert "train.jsonl" in (caught.value.hint or "")
    with pytest.raises(UserError, match="is a directory"):
        list(read_rows(str(tmp_path)))


def test_an_output_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    with pytest.raises(RuntimeError), rows_output(str(path)) as write:
        write({"a": 1})
        raise RuntimeError
    assert not path.exists() and not list(path.parent.iterdir())
    with rows_output(str(path)) as write:
        write({"a": "é"})
    assert path.read_bytes() == '{"a":"é"}\n'.encode()
    with pytest.raises(UserError) as caught, rows_output(str(path)) as write:
        write({"a": 2})
    assert caught.value.exit_code == ExitCode.EXISTS
    with rows_output(str(path), force=True) as write:
        write({"a": 3})
    assert path.read_bytes() == b'{"a":3}\n'


def test_the_elements_of_an_array_carry_the_line_they_start_on():
    text = '[\n {"a": 1},\n\n {"a":\n "]"}, {"b": [2]}\n]\n'
    assert [(line, json.loads(element)) for line, element in array_elements(text, "f")] == [
        (2, {"a": 1}),
        (4, {"a": "]"}),
        (5, {"b": [2]}),
    ]
    assert list(array_elements(" [ ] ", "f")) == []


@settings(max_examples=100, deadline=None)
@given(st.lists(PLAIN_JSON, max_size=5), st.sampled_from([None, 1]))
def test_the_elements_of_any_array_are_those_that_json_reads(values, indent):
    elements = [json.loads(element) for _, element in array_elements(json.dumps(values, indent=indent), "f")]
    assert elements == values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"a": 1},\n]', "f:2:1: a comma stands before the closing ]"),
        ('[{"a": 1}\n {"a": 2}]', "f:2:2: a comma or ] is missing"),
        ('[{"a": 1},\n {"a": ', "file cut off"),
        ('[{"a": 1}', "file cut off"),
        ('[{"a": 1}]\n{}', "f:2:1: more text after the end"),
        ('[{"a": tru}]', "f:1:8: not JSON"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_a_broken_array_is_named_by_line_and_column(text, words):
    with pytest.raises(UserError) as caught:
        list(array_elements(text, "f"))
    assert words in caught.value.message and caught.value.exit_code == ExitCode.DATA


def read_file(path, **options):
    with open_input(str(path), ReadOptions(**options)) as opened:
        return opened.format, list(opened.records)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.txt", "rows"])
def test_the_format_is_found_from_the_content(tmp_path, name):
    path = tmp_path / name
    path.write_text('[\n{"a": "x"},\n{"a": "y"}]')
    assert read_file(path)[0] == "json" and [record.line for record in read_file(path)[1]] == [2, 3]
    path.write_text('{"a": "x"}\n{"a": "y"}\n')
    assert read_file(path)[0] == "jsonl" and [record.line for record in read_file(path)[1]] == [1, 2]


def test_a_bad_element_is_a_fault_and_the_others_are_read(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1},\n 5,\n {"a": NaN},\n {"a": 2}]')
    first, number, nan, last = read_file(path)[1]
    assert isinstance(number, Fault) and number.error.message.endswith("rows.json:2: not a JSON object")
    assert isinstance(nan, Fault) and nan.line == 3 and nan.raw == '{"a": NaN}'
    assert (first.values, last.values) == ({"a": 1}, {"a": 2})


def test_utf16_json_lines_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"a": "é"}\r\n{"a": "y"}\r\n'.encode("utf-16"))
    assert [record.values["a"] for record in read_file(path)[1]] == ["é", "y"]


def test_one_object_over_many_lines_is_explained(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"data": [{"a": 1}]}, indent=2))
    with pytest.raises(UserError, match="one JSON object over several lines") as caught:
        read_file(path)
    assert "--records data" in (caught.value.hint or "")


@pytest.mark.parametrize("content", ["", "\n \n", "[]", "[ ]\n"])
def test_an_input_without_rows_is_an_error(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(UserError, match="0 rows"):
        read_file(path)
