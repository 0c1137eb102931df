"""Rows are encoded once: the next run over the same rows reads the ids of the last."""

import json

import pytest
from train_shell import QUICK, ROWS, files_in, run_train, write_rows

from ftkit.commands import train_tokens
from ftkit.io.token_file import TOKENS


@pytest.fixture
def train(tiny_model, tmp_path, monkeypatch):
    """`ftkit train` for which a handful of tokens is many; (what it said, the run's folder)."""
    monkeypatch.setattr(train_tokens, "MANY", 100)
    write_rows(tmp_path / "train.jsonl", [{**row, "weight": 1 + number % 3} for number, row in enumerate(ROWS)])

    def run(*more):
        done = run_train("train.jsonl", "--model", tiny_model, *QUICK, *more, cwd=tmp_path)
        assert done.exit_code == 0, done.stderr
        return done.stderr, tmp_path / done.stdout.strip()

    return run


READ = "the ids of 40 rows are those of"


def test_a_run_over_the_same_rows_reads_the_ids_and_is_the_same_run(train):
    said, first = train("--valid", 0.2)
    assert READ not in said
    said, second = train("--valid", 0.2, "--resume", "never")
    assert f"{READ} {first.relative_to(first.parents[1])}" in said
    ours, theirs = (files_in(run / "adapter") for run in (first, second))
    assert ours["adapter_model.safetensors"] == theirs["adapter_model.safetensors"]
    assert (first / TOKENS).read_bytes() == (second / TOKENS).read_bytes()


@pytest.mark.parametrize("other", [("--max-length", 200), ("--template", "alpaca"), ("--overlength", "truncate")])
def test_what_would_give_other_ids_encodes_them_anew(train, other):
    train()
    assert READ not in train(*other)[0]


def test_other_rows_are_encoded_anew(train, tmp_path):
    train()
    write_rows(tmp_path / "train.jsonl", ROWS[:-1])
    assert "the ids of" not in train()[0]


def test_a_run_that_is_named_looks_beside_itself(train):
    train("--run", "a")
    assert f"{READ} b" not in train("--run", "b")[0]
    assert f"{READ} " in train("--run", "c", "--lr", 0.02)[0]


def test_a_damaged_file_is_no_obstacle(train):
    _, run = train("--valid", 0)
    data = bytearray((run / TOKENS).read_bytes())
    data[-3] ^= 1
    (run / TOKENS).write_bytes(data)
    assert READ not in train("--valid", 0, "--seed", 1)[0]
    (run / TOKENS).write_bytes(b"short")
    for other in run.parent.glob(f"*/{TOKENS}"):
        other.write_bytes(b"short")
    assert READ not in train("--valid", 0, "--seed", 2)[0]


def test_few_rows_leave_no_file(train, monkeypatch):
    monkeypatch.setattr(train_tokens, "MANY", 10**6)
    _, run = train()
    assert not (run / TOKENS).exists() and json.loads((run / "run.json").read_text())["status"] == "complete"


def test_a_disk_without_room_for_them_is_said_and_stops_nothing(train, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_tokens, "write_tokens", full)
    said, run = train()
    assert "No space left on device; the next run encodes its rows again" in said and not (run / TOKENS).exists()
