"""runs/: folders of their own for every run, runs/latest, and what is refused or passed over when one is damaged."""

import json
import os
import re

import pytest

from ftkit.errors import ExitCode, UserError
from ftkit.io.run_folder import (
    COMPLETE,
    LATEST,
    RunFolder,
    find_run,
    latest_run,
    mark_latest,
    new_run,
    open_run,
    require_latest,
    unfinished_runs,
)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_run(identity="abcd1234", status=COMPLETE):
    """A run as train leaves it."""
    run = new_run("tiny", identity)
    run.write_info({"status": status, "identity": identity})
    run.adapter.mkdir()
    return run


def refused(work, *arguments):
    with pytest.raises(UserError) as error:
        work(*arguments)
    assert error.value.exit_code == ExitCode.MODEL and error.value.hint
    return error.value


def test_a_new_run_is_a_folder_named_by_time_model_and_identity():
    run = new_run("Qwen3-0.6B", "abcd1234")
    assert re.fullmatch(r"runs/\d{8}-\d{6}-Qwen3-0.6B-abcd", str(run.path)) and run.path.is_dir()


def test_two_runs_in_one_second_get_two_folders():
    assert len({new_run("tiny", "abcd1234").path for _ in range(5)}) == 5


def test_what_is_written_of_a_run_reads_back():
    run = make_run()
    assert run.read_info() == {"schema": "ftkit.run/1", "status": COMPLETE, "identity": "abcd1234"}
    run.log({"step": 1, "loss": 0.5})
    run.log({"step": 2, "loss": 0.25})
    assert [json.loads(line) for line in (run.path / "metrics.jsonl").open()] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.25},
    ]
    run.write_rows("valid.jsonl", [{"text": "ü\n"}])
    assert run.valid.read_text() == '{"text":"ü\\n"}\n'


def test_what_training_made_is_the_model_where_there_is_one():
    run = make_run()
    assert run.trained == run.adapter
    run.model.mkdir()
    assert run.trained == run.model


def test_latest_is_a_text_file_that_names_the_run_completed_last():
    first, second = make_run(), make_run()
    mark_latest(first)
    assert LATEST.read_text() == f"{first.path.name}\n" and latest_run() == first == require_latest()
    mark_latest(second)
    assert latest_run() == second


def test_latest_knows_a_run_that_lies_elsewhere(tmp_path):
    run = RunFolder(tmp_path / "elsewhere")
    run.path.mkdir()
    run.write_info({"status": COMPLETE})
    mark_latest(run)
    assert LATEST.read_text() == f"{run.path}\n" and latest_run().path == run.path


@pytest.mark.parametrize("named", [None, "", "gone\n"])
def test_without_a_latest_run_the_command_to_type_is_told(named):
    if named is not None:
        LATEST.parent.mkdir()
        LATEST.write_text(named)
    assert latest_run() is None
    assert refused(require_latest).hint.startswith("ftkit train ")


def test_a_complete_run_of_the_same_identity_is_found_again():
    make_run("other000")
    make_run("abcd1234", status="failed")
    assert find_run("abcd1234", complete=True) is None
    run = make_run()
    assert find_run("abcd1234", complete=True) == run


def test_an_unfinished_run_of_the_same_identity_is_found_to_be_gone_on_with():
    make_run()
    assert find_run("abcd1234", complete=False) is None
    begun = make_run(status="stopped")
    assert find_run("abcd1234", complete=False) == begun
    assert [run for run, _ in unfinished_runs()] == [begun]


def test_a_run_whose_adapter_is_gone_is_not_complete():
    make_run().adapter.rmdir()
    assert find_run("abcd1234", complete=True) is None


def test_a_damaged_run_beside_it_does_not_keep_a_run_from_being_found():
    run, damaged = make_run(), make_run("ffff0000")
    (damaged.path / "run.json").write_text("{")
    assert find_run("abcd1234", complete=True) == run


def test_a_run_opens_only_when_it_is_complete():
    assert open_run(str(make_run().path)).read_info()["status"] == COMPLETE
    for status in ("running", "failed", "interrupted"):
        assert f"status: {status}" in refused(open_run, str(make_run(status=status).path)).message


def test_a_folder_that_is_no_run_and_one_that_is_not_there_are_told_apart(tmp_path):
    assert "no run.json" in refused(open_run, str(tmp_path)).message
    run = make_run()
    error = refused(open_run, str(run.path)[:-1])
    assert "no such run folder" in error.message and f"did you mean '{run.path}'?" == error.hint


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000])
def test_a_damaged_run_json_is_refused(content):
    run = make_run()
    (run.path / "run.json").write_text(content)
    assert "run.json: damaged" in refused(open_run, str(run.path)).message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_an_io_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        new_run("tiny", "abcd1234")
