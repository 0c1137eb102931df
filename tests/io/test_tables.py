"""Tables: delimiter, encoding, line numbers, and what is wrong with a row."""

import io

import pytest

from ftkit.errors import ExitCode, UserError
from ftkit.io.inputs import ReadOptions, open_input
from ftkit.io.tables import Fault, Record, TableOptions, find_delimiter, read_table
from ftkit.io.text_input import open_text


def text_of(content, encoding=None, name="t.csv"):
    return open_text(io.BytesIO(content if isinstance(content, bytes) else content.encode()), name, encoding)


def read(content, delimiter=",", longest=1000, encoding=None):
    return list(read_table(text_of(content, encoding), TableOptions(delimiter, longest)))


def error_of(content, **options):
    with pytest.raises(UserError) as caught:
        read(content, **options)
    assert caught.value.exit_code == ExitCode.DATA
    return caught.value


def read_file(path, **options):
    with open_input(str(path), ReadOptions(**options)) as opened:
        return list(opened.records), opened.notes


def test_rows_carry_the_line_they_start_on_also_after_line_ends_inside_quotes_and_blank_lines():
    records = read('a,b\n1,"x\ny"\n\n2,z\n')
    assert records == [Record(2, {"a": "1", "b": "x\ny"}), Record(5, {"a": "2", "b": "z"})]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_kind_of_line_end_is_understood(end):
    assert read(end.join(["a,b", "1,2", "3,4"])) == [Record(2, {"a": "1", "b": "2"}), Record(3, {"a": "3", "b": "4"})]


def test_only_line_ends_end_a_line_not_what_unicode_calls_one():
    assert read("a,b\none\u0085two,three\u2028four\n") == [Record(2, {"a": "one\u0085two", "b": "three\u2028four"})]


def test_spaces_in_values_stay_and_spaces_around_column_names_go():
    assert read("a, b\nx,    y\n") == [Record(2, {"a": "x", "b": "    y"})]


def test_a_ragged_row_is_named_and_the_rows_after_it_are_read():
    _, fault, after = read("a,b\n1,2\n1,2,3\n4,5\n")
    assert isinstance(fault, Fault) and fault.line == 3 and fault.raw == "1,2,3\n"
    assert fault.error.message == "t.csv:3: 3 values, the header has 2 columns"
    assert after == Record(4, {"a": "4", "b": "5"})


def test_a_ragged_first_row_casts_doubt_on_the_header():
    (fault,) = read("Table 1\n1,2\n")
    assert "header" in (fault.error.hint or "")


def test_text_after_a_closing_quote_is_not_repaired():
    fault, after = read('a,b\n"x"y,2\n3,4\n')
    assert "text after a closing quote" in fault.error.message
    assert after.values == {"a": "3", "b": "4"}


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ('a,b\n1,2\n3,"x\n4,5\n6,7\n', 3),
        ('a,b\n"x\ny","z\n', 3),  # the first quote of the record closes, the second does not
        ('a,b\n"x ""quoted"" y\nz,2\n', 2),
        ('a,b\n6" pipe,"open\n', 2),  # a quote inside an unquoted value opens nothing
    ],
)
def test_an_unclosed_quote_is_named_by_the_line_it_opens_on(table, line):
    assert error_of(table).message == f"t.csv:{line}: a quote opens here and never closes"


def test_a_value_beyond_the_limit_names_the_limit_and_the_open_quote():
    error = error_of('a,b\n1,2\n3,"' + "x\n" * 50, longest=20)
    assert "t.csv:3" in error.message and "longer than 20 bytes" in error.message and "opens on line 3" in error.message
    assert "--max-field-bytes" in (error.hint or "")


def test_columns_of_the_same_name_are_an_error():
    assert "same name: b, a" in error_of("b,a,b,a,c\n1,2,3,4,5\n").message


def test_a_column_without_a_name_gets_its_number():
    assert read(",a\n0,x\n") == [Record(2, {"column 1": "0", "a": "x"})]


def test_a_header_without_rows_and_nothing_at_all_are_errors():
    assert "header but no rows" in error_of("a,b\n").message
    assert "0 rows" in error_of("\n\n").message


def test_a_nul_byte_is_named_by_its_line():
    (fault,) = read("a,b\n1,x\x00y\n")
    assert fault.error.message == "t.csv:2: holds a NUL byte"


def test_a_byte_that_is_not_utf8_is_named_by_line_and_place_and_the_other_rows_are_read():
    before, fault, after = read(b"a,b\n1,2\n\xc3\xa9,\xe9\n3,4\n")
    assert (before.line, after.line) == (2, 4)
    assert fault.error.message == "t.csv:3: not UTF-8 at byte 4 of the line"
    assert "--encoding" in (fault.error.hint or "")


def test_a_named_encoding_is_used_and_a_byte_outside_it_is_found():
    assert read("a,b\n1,é\n".encode("latin-1"), encoding="latin-1")[0].values["b"] == "é"
    (fault,) = read(b"a,b\n1,\xff\xff\n", encoding="big5")
    assert "not big5" in fault.error.message


@pytest.mark.parametrize(("encoding", "called"), [("utf-8-sig", "UTF-8"), ("utf-16", "UTF-16"), ("utf-32", "UTF-32")])
def test_a_byte_order_mark_names_the_encoding_and_is_no_text(tmp_path, encoding, called):
    path = tmp_path / "t.csv"
    path.write_bytes("a,b\n1,é\n".encode(encoding))
    records, notes = read_file(path)
    assert records == [Record(2, {"a": "1", "b": "é"})]
    assert called in notes[0]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_is_not_guessed_but_named(encoding):
    with pytest.raises(UserError) as caught:
        text_of("product,description\nlamp,bright\n".encode(encoding))
    assert caught.value.hint == f"--encoding {encoding}"
    assert read("a,b\n1,é\n".encode(encoding), encoding=encoding)[0].values == {"a": "1", "b": "é"}


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found_though_values_hold_the_others(delimiter):
    rows = [["product", "text"], ["lamp", 'a; b, "c" | d'], ["kettle", "x, y; z | w"]]
    table = "".join(delimiter.join('"' + cell.replace('"', '""') + '"' for cell in row) + "\n" for row in rows)
    assert find_delimiter(text_of(table)) == delimiter


def test_two_delimiters_that_fit_equally_are_an_error_unless_the_name_decides():
    table = "a,b;c\n1,2;3\n"
    with pytest.raises(UserError) as caught:
        find_delimiter(text_of(table))
    assert "comma and semicolon fit equally" in caught.value.message and "--delimiter" in (caught.value.hint or "")
    assert find_delimiter(text_of(table, name="t.ssv")) == ";"


def test_a_long_table_is_read_whole_beyond_the_part_that_is_looked_at(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text("a,b\n" + "".join(f'{i},"line\n{i}"\n' for i in range(20_000)))
    records, _ = read_file(path)
    assert len(records) == 20_000 and records[-1] == Record(2 + 2 * 19_999, {"a": "19999", "b": "line\n19999"})


@pytest.mark.parametrize(
    ("head", "called"), [(b"PAR1", "Parquet"), (b"PK\x03\x04", "zip"), (b"%PDF-1.7", "PDF"), (b"BZh9", "bzip2")]
)
def test_what_is_no_text_is_named_by_its_type(head, called):
    with pytest.raises(UserError, match=called) as caught:
        text_of(head + b"rest")
    assert caught.value.exit_code == ExitCode.DATA


def test_the_messy_tables_are_read_or_get_one_exact_error(shared):
    messy = shared / "data" / "messy"
    for name, rows in {"simple.ssv": 6, "simple.psv": 28, "example.tsv": 140, "skip_initials.csv": 2}.items():
        records, _ = read_file(messy / name)
        assert [type(record) for record in records] == [Record] * rows, name
    assert len(read_file(messy / "utf-16le_encoded.csv")[0]) == 327
    assert read_file(messy / "characters.csv", encoding="big5")[0]
    assert read_file(messy / "spanish_chars.csv", encoding="latin-1")[0][0].values["Gasto total 2011"] == "229,932.50"
    for name, words in {
        "null.csv": "same name",
        "utf8bom.csv": "header but no rows",
        "spanish_chars.csv": "not UTF-8",
    }.items():
        with pytest.raises(UserError, match=words):
            read_file(messy / name)
