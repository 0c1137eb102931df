"""Files and folders that appear whole or not at all."""

import json
import os
import signal
import subprocess
import sys

import pytest

from ftkit.errors import ExitCode, UserError
from ftkit.io.atomic import atomic_file, atomic_folder, check_manifest, read_manifest, sha256_of_file


def test_a_file_appears_when_the_block_ends_well(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_file(path) as file:
        file.write("whole\n")
        assert not path.exists()
    assert path.read_text() == "whole\n" and os.listdir(path.parent) == ["a.txt"]


def test_after_an_error_the_old_file_stands_and_nothing_is_left(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_appears_with_a_manifest_of_all_its_files(tmp_path):
    path = tmp_path / "out"
    with atomic_folder(path, extra={"rows": 3}) as staged:
        (staged / "deep").mkdir()
        (staged / "deep" / "b.txt").write_text("bytes")
        assert not path.exists()
    manifest = read_manifest(path)
    assert manifest is not None and manifest["rows"] == 3
    assert manifest["files"] == {"deep/b.txt": {"bytes": 5, "sha256": sha256_of_file(path / "deep" / "b.txt")}}
    check_manifest(path)


def test_a_folder_is_replaced_only_on_demand_and_only_by_a_whole_one(tmp_path):
    path = tmp_path / "out"
    with atomic_folder(path) as staged:
        (staged / "old.txt").write_text("old")
    with pytest.raises(UserError) as caught, atomic_folder(path):
        pass
    assert caught.value.exit_code == ExitCode.EXISTS
    with pytest.raises(RuntimeError), atomic_folder(path, replace=True):
        raise RuntimeError
    assert (path / "old.txt").read_text() == "old" and os.listdir(tmp_path) == ["out"]
    with atomic_folder(path, replace=True) as staged:
        (staged / "new.txt").write_text("new")
    assert sorted(os.listdir(path)) == ["manifest.json", "new.txt"] and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "a").unlink(), "missing"),
        (lambda folder: (folder / "a").write_text("abc"), "3 bytes, should have 5"),
        (lambda folder: (folder / "a").write_text("abcdX"), "damaged"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "damaged"),
        (
            lambda folder: (folder / "manifest.json").write_text(
                json.dumps({"files": {"../a": {"bytes": 1, "sha256": ""}}})
            ),
            "leaves the folder",
        ),
    ],
)
def test_a_damaged_folder_is_found_out(tmp_path, damage, words):
    path = tmp_path / "out"
    with atomic_folder(path) as staged:
        (staged / "a").write_text("abcde")
    damage(path)
    with pytest.raises(UserError, match=words) as caught:
        check_manifest(path)
    assert caught.value.exit_code == ExitCode.MODEL


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from ftkit.io.atomic import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as staged:\n"
        "    (staged / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", code, str(path)])
    assert killed.returncode == -signal.SIGKILL
    assert not path.exists() and len(os.listdir(tmp_path)) == 1
    with atomic_folder(path) as staged:
        (staged / "whole").write_text("x")
    assert os.listdir(tmp_path) == ["out"]
