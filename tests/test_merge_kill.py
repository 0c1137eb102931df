"""Killed at any moment, merge leaves nothing that looks finished; the next run makes what an uninterrupted one makes."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from test_merge import make_adapter, merge, one_thread  # noqa: F401 (a fixture that is used by itself)

from ftkit.errors import ExitCode
from ftkit.io.atomic import check_manifest

DRIVER = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from ftkit.commands import merge
from ftkit.core.merge_settings import MergeSettings
from ftkit import console
import peft, transformers.models.llama.modeling_llama

WATCHED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


def merge_in_child(kill_at):
    # the child kills itself right before its file operation number `kill_at` in this test's folder
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)
    seen = 0

    def watch(event, arguments):
        nonlocal seen
        if event in WATCHED and str(arguments[0]).startswith(folder):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    code = 1
    try:
        sys.addaudithook(watch)
        merge.run(MergeSettings(run=adapter, output=out, check=1, force=forced, shard_size="0.02MB"))
        code = 0
    finally:
        os._exit(code)


folder, adapter, out, forced, step = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "force", int(sys.argv[5])
at = 1
while merge_in_child(at) == signal.SIGKILL:
    whole = os.path.exists(out + "/manifest.json") and os.path.exists(out + "/merge.json")
    left = sorted(name for name in os.listdir(os.path.dirname(out)) if not name.startswith("."))
    print(at, "whole" if whole else "absent" if not os.path.exists(out) else "HALF", *left, file=sys.stderr)
    at += step
print(at)
"""


@pytest.mark.parametrize("forced", ["fresh", "force"])
def test_killed_before_any_file_operation_nothing_half_made_is_left(tiny_model, tmp_path, forced):
    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    out, clean = tmp_path / "place" / "out", tmp_path / "clean"
    merge(adapter, clean, check=1, shard_size="0.02MB")
    out.parent.mkdir()
    if forced == "force":
        shutil.copytree(clean, out)
    driven = [sys.executable, "-c", DRIVER, tmp_path, adapter, out, forced, "11"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, driven)], capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 60, "the sweep passes through the whole merge"
    states = [line.split() for line in done.stderr.splitlines() if line[:1].isdigit()]
    assert states and all(state[1] in ("whole", "absent") and set(state[2:]) <= {"out"} for state in states), states
    check_manifest(out)
    assert [path.name for path in out.parent.iterdir()] == ["out"], "the last run cleared what the dead ones left"
    shards = [file.name for file in sorted(clean.glob("*.safetensors"))]
    assert len(shards) > 3
    for name in (*shards, "model.safetensors.index.json", "config.json"):
        assert (out / name).read_bytes() == (clean / name).read_bytes()


def test_killed_from_outside_nothing_half_made_is_left(tiny_model, tmp_path):
    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    command = [sys.executable, "-m", "ftkit", "merge", adapter, "-o", out]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None and not any(out.parent.iterdir()):
        time.sleep(0.01)
    running.kill()
    assert running.wait(60) == -signal.SIGKILL, "it was at work"
    assert all(path.name.startswith(".tmp-") for path in out.parent.iterdir())


def test_a_full_disk_is_said_and_leaves_nothing(tiny_model, tmp_path):
    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); "
        "from ftkit.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", limited, "merge", str(adapter), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == ExitCode.IO, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert list(out.parent.iterdir()) == []
