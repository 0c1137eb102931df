"""ftkit prep --jobs: the bytes, the counts and the errors of one process, whatever the input; rows of slow programs."""

import csv
import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prep_shell import jsonl, rows_of, run_prep

from ftkit.commands import prep_jobs
from ftkit.errors import ExitCode
from ftkit.io import pieces, text_input

SMALL_PIECES = {"PIECE_BYTES": 40, "PIECE_RECORDS": 3, "LONGEST_PIECE_BYTES": 400}
QUIET_FIXTURES = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture
def small(monkeypatch):
    """Pieces of a few records, so that small inputs are shared; the rows of most fit into the memory between processes."""
    for name, value in SMALL_PIECES.items():
        monkeypatch.setattr(pieces, name, value)
    monkeypatch.setattr(text_input, "BLOCK_BYTES", 16)
    monkeypatch.setattr(prep_jobs, "SLOT_BYTES", 700)


def all_of(monkeypatch, folder, arguments, stdin=""):
    """What a run prints, ends with and leaves in its output files."""
    for name in ("bad.jsonl", "split/a.jsonl", "split/b.jsonl"):
        (folder / name).unlink(missing_ok=True)
    result = run_prep(monkeypatch, folder, [*arguments, "--force"], stdin)
    left = {str(path): path.read_bytes() for path in sorted(folder.rglob("*.jsonl")) if path.name != "in.jsonl"}
    return result, left


def assert_same_for_any_number_of_jobs(monkeypatch, folder, arguments, stdin=""):
    one = all_of(monkeypatch, folder, [*arguments, "--jobs", 1], stdin)
    for jobs in (2, 3):
        result, left = all_of(monkeypatch, folder, [*arguments, "--jobs", jobs], stdin)
        told = [line for line in result.stderr.splitlines(keepends=True) if "one process reads it" not in line]
        assert (replace(result, stderr="".join(told)), left) == one
    assert "internal error" not in one[0].stderr
    return one[0]


VALUES = st.one_of(
    st.sampled_from(["", "nan", "same", "cafÃ©", "<|im_end|>", "long " * 30, None, 5, "a\u2028b", 'q"q']),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
OBJECTS = st.fixed_dictionaries({"instruction": VALUES, "output": VALUES}, optional={"input": VALUES, "lang": VALUES})
LINES = st.one_of(OBJECTS.map(json.dumps), st.sampled_from(["", "  ", "{broken", "[1]", '{"output": "x"}', "\r"]))
REQUESTS = [
    [],
    ["--on-error", "skip", "--rejects", "bad.jsonl"],
    ["--on-error", "skip", "--dedupe", "none", "--where", "output", "--min-chars", 170, "--max-chars", 300],
    ["--on-error", "skip", "--split", "a=0.5,b=0.5", "-o", "split", "--stratify", "output", "--stats"],
    ["--on-error", "skip", "--augment", "twice.py:rows", "--sample", "0.7", "--shuffle", "--plain"],
    ["--on-error", "skip", "--json", "--stats", "--against", "against.txt"],
    ["--on-error", "skip", "--dedupe", "near", "--near", "0.5", "--augment", "twice.py:rows", "--shuffle", "--stats"],
]
AUGMENT = "def rows(row): return [row, {**row, 'instruction': str(row.get('instruction')).upper()}][: len(row) - 1]\n"


@QUIET_FIXTURES
@given(st.lists(LINES, min_size=1, max_size=20), st.sampled_from(REQUESTS))
def test_lines_of_json_give_the_same_for_any_number_of_jobs(small, monkeypatch, tmp_path, lines, request):
    (tmp_path / "twice.py").write_text(AUGMENT)
    (tmp_path / "against.txt").write_text(jsonl({"prompt": "a", "completion": "b"}))
    (tmp_path / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert_same_for_any_number_of_jobs(monkeypatch, tmp_path, ["in.jsonl", "--template", "alpaca", *request])


CELLS = st.one_of(
    st.sampled_from(["", "nan", "same", 'a "quoted" word', "line\nline", "\r\nx\n", "\x00", '5" nail', "a,b"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
RAW_LINES = st.text('a,"\n\r', max_size=12)


@QUIET_FIXTURES
@given(
    st.lists(st.one_of(st.lists(CELLS, min_size=2, max_size=3), RAW_LINES), min_size=1, max_size=25),
    st.sampled_from(REQUESTS[:4]),
    st.sampled_from(["standard", "none"]),
)
def test_tables_give_the_same_for_any_number_of_jobs(small, monkeypatch, tmp_path, rows, request, quoting):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    text.write("instruction,output\n")
    for row in rows:
        if isinstance(row, str):
            text.write(row + "\n")  # quotes wherever they fall
        else:
            writer.writerow(row)
    (tmp_path / "in.csv").write_bytes(text.getvalue().encode())
    arguments = ["in.csv", "--template", "alpaca", "--quoting", quoting, "--delimiter", ",", *request]
    assert_same_for_any_number_of_jobs(monkeypatch, tmp_path, arguments)


def test_quotes_where_none_belong_make_one_process_go_on_alone(small, monkeypatch, tmp_path):
    rows = "".join(f'five inch {number} 5" nail,"an answer of two\nlines {number}"\n' for number in range(60))
    (tmp_path / "in.csv").write_text("instruction,output\n" + rows)
    result = assert_same_for_any_number_of_jobs(monkeypatch, tmp_path, ["in.csv", "--template", "alpaca"])
    assert "60 rows in = 60 out" in result.stderr


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_numbers_stay_true_in_every_piece(small, monkeypatch, tmp_path, end):
    lines = ["instruction,output", *(f'q {number},"answer{end}of {number}"' for number in range(40)), "q,a,b"]
    (tmp_path / "in.csv").write_text(end.join(lines), newline="")
    result = assert_same_for_any_number_of_jobs(monkeypatch, tmp_path, ["in.csv", "--template", "alpaca"])
    assert result.exit_code == ExitCode.DATA and "in.csv:82: 3 values" in result.stderr


def test_an_unclosed_quote_is_named_by_its_line_though_it_swallows_many_pieces(small, monkeypatch, tmp_path):
    lines = ["instruction,output", *(f"q {number},answer {number}" for number in range(30)), 'q,"open']
    lines += [f"q {number},a {number}" for number in range(100)]
    (tmp_path / "in.csv").write_text("\n".join(lines))
    result = assert_same_for_any_number_of_jobs(monkeypatch, tmp_path, ["in.csv", "--template", "alpaca"])
    assert result.exit_code == ExitCode.DATA and "in.csv:32: a quote opens here and never closes" in result.stderr


@pytest.mark.parametrize("name", ["in.json", "in.csv.gz", "in.parquet", "utf16.csv", "-"])
def test_every_other_form_is_shared_by_its_records(small, monkeypatch, tmp_path, name):
    import gzip

    import pyarrow
    import pyarrow.parquet

    rows = [{"instruction": f"q {number % 40}", "output": f"ä {number % 30}"} for number in range(90)]
    table = "instruction,output\n" + "".join(f"{row['instruction']},{row['output']}\n" for row in rows)
    (tmp_path / "in.json").write_text(json.dumps(rows))
    (tmp_path / "in.csv.gz").write_bytes(gzip.compress(table.encode()))
    (tmp_path / "utf16.csv").write_bytes(table.encode("utf-16"))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    arguments = [name, "--template", "alpaca"]
    result = assert_same_for_any_number_of_jobs(monkeypatch, tmp_path, arguments, table if name == "-" else "")
    assert result.exit_code == 0 and len(result.rows) == 90


@pytest.mark.parametrize(
    ("name", "has_bad_row"),
    [("in.jsonl.gz", True), ("in.csv.gz", False), ("in.json", False), ("in.json", True), ("utf16.csv", False)],
)
def test_an_input_that_breaks_off_gives_the_rows_before_it_and_the_first_error(
    small, monkeypatch, tmp_path, name, has_bad_row
):
    import gzip
    import random

    monkeypatch.setattr(text_input, "BLOCK_BYTES", 65_536)  # how much comes before the damage depends on it
    draw = random.Random(5)
    rows = [{"instruction": f"q {draw.random()}", "output": f"ä {draw.random()}"} for _ in range(3000)]
    if has_bad_row:
        rows[1400]["output"] = "" if name.endswith("csv") else 5
    table = "instruction,output\n" + "".join(f"{row['instruction']},{row['output']}\n" for row in rows)
    content = {
        "in.jsonl.gz": gzip.compress(jsonl(*rows).encode())[:-500],
        "in.csv.gz": gzip.compress(table.encode())[:-500],
        "in.json": json.dumps(rows).encode()[:-1],
        "utf16.csv": table.encode("utf-16") + b"x",
    }
    (tmp_path / name).write_bytes(content[name])
    result = assert_same_for_any_number_of_jobs(monkeypatch, tmp_path, [name, "--template", "alpaca"])
    assert result.exit_code == ExitCode.DATA and len(result.rows) > 1000


@pytest.mark.parametrize(("encoding", "bad"), [("latin-1", ""), ("big5", "\udcff"), ("cp1252", "\udc81")])
def test_a_table_in_another_encoding_is_shared_with_what_is_no_text_in_it(small, monkeypatch, tmp_path, encoding, bad):
    rows = [f'q {number},"an answer\n{"é" if encoding != "big5" else "的"} {number}"\n' for number in range(900)]
    rows[700] = rows[700].replace("answer", f"ans{bad}wer")
    (tmp_path / "in.csv").write_bytes(("instruction,output\n" + "".join(rows)).encode(encoding, "surrogateescape"))
    arguments = ["in.csv", "--template", "alpaca", "--encoding", encoding]
    stopped = assert_same_for_any_number_of_jobs(monkeypatch, tmp_path, arguments)
    skipped = assert_same_for_any_number_of_jobs(monkeypatch, tmp_path, [*arguments, "--on-error", "skip"])
    assert len(skipped.rows) == 900 - bool(bad) and (stopped.exit_code == ExitCode.DATA) == bool(bad)


def test_several_inputs_and_weights_give_the_same_for_any_number_of_jobs(small, monkeypatch, tmp_path):
    for name in "ab":
        rows = [{"text": f"{name} {number % 70} <|im_end|>"} for number in range(100)]
        (tmp_path / f"{name}.txt").write_text(jsonl(*rows, {"text": ""}))
    assert_same_for_any_number_of_jobs(monkeypatch, tmp_path, ["a.txt", "b.txt", "--on-error", "skip"])
    assert_same_for_any_number_of_jobs(monkeypatch, tmp_path, ["a.txt=0.7", "b.txt=0.3", "--on-error", "skip"])


def test_tokens_are_counted_by_every_process(small, monkeypatch, tmp_path, tiny_model):
    rows = [{"prompt": f"q{number}", "completion": "long " * (number % 9 + 1)} for number in range(40)]
    (tmp_path / "in.jsonl").write_text(jsonl(*rows))
    arguments = ["in.jsonl", "--tokenizer", tiny_model, "--max-tokens", 20, "--overlength", "truncate", "--show", 2]
    result = assert_same_for_any_number_of_jobs(monkeypatch, tmp_path, arguments)
    assert "answer tokens lost" in result.stderr


def test_what_is_nearly_equal_is_found_across_pieces(small, monkeypatch, tmp_path):
    pytest.importorskip("datasketch")
    words = [f"word{number}" for number in range(40)]
    rows = [{"text": " ".join([f"start{number % 9}", *words[number % 9 :]])} for number in range(40)]
    (tmp_path / "in.jsonl").write_text(jsonl(*rows))
    result = assert_same_for_any_number_of_jobs(monkeypatch, tmp_path, ["in.jsonl", "--dedupe", "near"])
    assert "near" in result.stderr


def test_no_process_outlives_a_prep_that_was_killed(tmp_path):
    slow = "import time\ndef rows(row):\n    time.sleep(0.05)\n    return [row]\n"
    (tmp_path / "slow.py").write_text(slow)
    (tmp_path / "in.jsonl").write_text(jsonl(*({"text": f"{number} " + "x" * 2000} for number in range(2000))))
    arguments = ["prep", "in.jsonl", "--augment", "slow.py:rows", "--jobs", "2", "-o", "out.jsonl"]
    started = subprocess.Popen([sys.executable, "-m", "ftkit", *arguments], cwd=tmp_path, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
    if not children.exists():
        pytest.skip("needs Linux's /proc")
    wait_until(lambda: len(children.read_text().split()) == 2)
    pids = children.read_text().split()
    started.kill()
    started.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert not (tmp_path / "out.jsonl").exists()


def test_a_killed_process_of_jobs_is_an_error_and_no_hang(monkeypatch, small, tmp_path):
    (tmp_path / "die.py").write_text(
        "import os, signal\ndef rows(row):\n    if row['text'] == 'die':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n    return [row]\n"
    )
    (tmp_path / "in.jsonl").write_text(jsonl(*({"text": f"row {number}"} for number in range(50)), {"text": "die"}))
    arguments = ["in.jsonl", "--augment", "die.py:rows", "--jobs", 2, "-o", "out.jsonl"]
    result = run_prep(monkeypatch, tmp_path, arguments, "")
    assert result.exit_code == ExitCode.MEMORY and "a process of --jobs was killed" in result.stderr
    assert not (tmp_path / "out.jsonl").exists()


def wait_until(holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def read_line(stream, seconds=60):
    """The next line, or a failure where none comes although its row was written long ago."""
    line = b""
    while not line.endswith(b"\n"):
        assert select.select([stream], [], [], seconds)[0], f"no row came; so far {line!r}"
        found = os.read(stream.fileno(), 65536)
        assert found, "the program ended"
        line += found
    return line


FLOWING = [
    (jsonl({"prompt": "größe", "completion": "b"}), [], jsonl({"prompt": "c", "completion": "d"})),
    (jsonl({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}), ["chatml"], ""),
    (jsonl({"instruction": "a", "output": "b"}), ["alpaca"], jsonl({"instruction": "a", "input": "x", "output": "c"})),
    ("instruction;output\nask;an answer\n", ["alpaca"], "again;another answer\n"),
    ("question,answer\nask,an answer\n", ["alpaca", "--map", "instruction=question", "--map", "output=answer"], ""),
]


@pytest.mark.parametrize(("first", "template", "second"), FLOWING)
def test_rows_of_a_slow_program_come_as_they_are_made_and_end_whole(tmp_path, first, template, second):
    arguments = ["--template", *template] if template else []
    started = subprocess.Popen(
        [sys.executable, "-m", "ftkit", "prep", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    )
    started.stdin.write(first.encode())
    started.stdin.flush()
    found = read_line(started.stdout)  # nothing more has been written, and stdin is open
    started.stdin.write(second.encode())
    started.stdin.flush()
    if second:
        found += read_line(started.stdout)
        assert rows_of(found.decode())[-1] != rows_of(found.decode())[0]
    rest, words = started.communicate(b'{"half')
    assert rest == b"" and started.returncode in (0, ExitCode.DATA), words
    together = subprocess.run(
        [sys.executable, "-m", "ftkit", "prep", *arguments], input=(first + second).encode(), capture_output=True
    )
    assert together.returncode == 0 and together.stdout == found


def test_a_stopped_prep_ends_with_a_whole_row(tmp_path):
    rows = jsonl(*({"text": f"row {number} " + "x" * 5000} for number in range(3000)))
    for number in (signal.SIGINT, signal.SIGTERM):
        with subprocess.Popen(
            [sys.executable, "-m", "ftkit", "prep"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path
        ) as started:
            started.stdin.write(rows[: len(rows) // 1000].encode())
            started.stdin.flush()
            found = b""
            while found.count(b"\n") < 2:
                found += read_line(started.stdout)
            started.send_signal(number)
            found += started.communicate()[0]
            assert started.returncode != 0 and found.endswith(b"\n")
            assert rows_of(found.decode())
