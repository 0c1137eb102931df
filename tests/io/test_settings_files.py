"""ftkit.toml and --config files: tables of commands, and the line of everything that is wrong in them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftkit.errors import ExitCode, UserError
from ftkit.io.settings_files import parse_toml, parse_yaml, read_command_table


@pytest.fixture
def file(tmp_path):
    """Write a settings file."""

    def write(text, name="x.toml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refusal(path, command="train"):
    """The usage error that reading it raises."""
    with pytest.raises(UserError) as refused:
        read_command_table(path, command)
    assert refused.value.exit_code == ExitCode.USAGE
    return refused.value


def test_a_command_reads_its_own_table_with_the_place_of_every_key(file):
    path = file("[prep]\nforce = true\n\n# a note\n[train]\nr = 8\n\nmax-length = 128\n'seed' = 1\n")
    values, places = read_command_table(path, "train")
    assert values == {"r": 8, "max_length": 128, "seed": 1}
    assert places == {"r": f"{path}:6", "max_length": f"{path}:8", "seed": f"{path}:9"}
    assert read_command_table(path, "prep")[0] == {"force": True}
    assert read_command_table(path, "eval") == ({}, {})


def test_yaml_says_the_same_as_toml(file):
    path = file("prep:\n  force: true\ntrain:\n  r: 8\n\n  max-length: 128\n  lr: 2e-4\n", "x.yaml")
    values, places = read_command_table(path, "train")
    assert values == {"r": 8, "max_length": 128, "lr": "2e-4"}  # YAML 1.1 reads that as text
    assert places == {"r": f"{path}:4", "max_length": f"{path}:6", "lr": f"{path}:7"}


def test_a_byte_order_mark_in_front_is_no_part_of_the_file(file):
    assert read_command_table(file(b"\xef\xbb\xbf[train]\nr = 8\n"), "train")[0] == {"r": 8}


def test_an_empty_file_sets_nothing(file):
    assert read_command_table(file(""), "train") == ({}, {})
    assert read_command_table(file("# nothing\n", "x.yml"), "train") == ({}, {})


@pytest.mark.parametrize(
    ("name", "text", "line", "words"),
    [
        ("x.toml", "\n[trian]\nr = 1\n", 2, "unknown table [trian]"),
        ("x.yaml", "\n\ntrian:\n  r: 1\n", 3, "unknown table [trian]"),
        ("x.toml", "# x\nlr = 1\n", 2, "'lr' stands outside of a table"),
        ("x.yaml", "lr: 1\n", 1, "'lr' stands outside of a table"),
        ("x.toml", "[prep]\nforce = true\n[[train]]\nr = 1\n", None, "[train] is not a table"),
        ("x.yaml", "train:\n  - r\n", 1, "[train] is not a table"),
        ("x.yaml", "train: 5\n", 1, "[train] is not a table"),
        ("x.yaml", "train:\n  r: 1\n  r: 2\n", 3, "'r' stands twice"),
        ("x.toml", "[train]\nmax_length = 1\nmax-length = 2\n", 3, "'max_length' is set twice"),
        ("x.yaml", "train:\n  r: [1\n", 3, "expected"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_line(file, name, text, line, words):
    path = file(text, name)
    error = refusal(path)
    assert error.message.startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert words in error.message


@pytest.mark.parametrize("text", ["[train\nr = 1\n", "[train]\nr = \n", "[train]\nr = 1\nr = 2\n"])
def test_broken_toml_names_the_line_that_the_parser_found(file, text):
    assert "line" in refusal(file(text)).message


def test_did_you_mean_and_the_tables_there_are(file):
    assert refusal(file("[trian]\nr = 1\n")).hint.startswith("did you mean 'train'? tables: prep, estimate-memory")


def test_what_cannot_be_read_is_a_usage_error_of_the_file(file, tmp_path):
    assert "no such file" in refusal(tmp_path / "nosuch.toml").message
    assert "Is a directory" in refusal(tmp_path).message
    assert "not UTF-8 at byte 2" in refusal(file(b"# \xff\n")).message
    assert "holds no tables" in refusal(file("- train\n", "x.yaml")).message
    assert "month must be in 1..12" in refusal(file("train: 2001-99-01\n", "x.yaml")).message


@pytest.mark.parametrize(("name", "text"), [("x.toml", "a = " + "[" * 9999), ("x.yaml", "a: " + "[" * 9999)])
def test_deep_nesting_is_refused_and_not_a_crash(file, name, text):
    refusal(file(text, name))


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.text("[]{}:=-\n \"'&*!|>%@a1#,.")))
def test_any_text_is_either_tables_or_a_usage_error(tmp_path_factory, text):
    for parse in (parse_toml, parse_yaml):
        try:
            tables, lines = parse(text, tmp_path_factory.getbasetemp() / "x")
        except UserError as error:
            assert error.exit_code == ExitCode.USAGE
        else:
            assert isinstance(tables, dict) and all(1 <= line <= len(text.splitlines()) for line in lines.values())
