"""`ftkit train` in this process, where libraries load once, and small rows for it."""

import contextlib
import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers.utils.logging import disable_progress_bar

from ftkit.cli import main

THINGS = ["ball", "cat", "dog", "tree", "hat", "car", "cup", "bed"]
NAMES = ["Lily", "Tom", "Ben", "Sue", "Max"]
ROWS = [
    {
        "prompt": f"Tell me of {name} and the {thing}.\n",
        "completion": f"{name} had a big {thing}. {name} was very happy.",
    }
    for name in NAMES
    for thing in THINGS
]
QUICK = ["--steps", 4, "--batch", 4, "--r", 4, "--lr", 0.01, "--dtype", "fp32"]


def run_train(*arguments, cwd, stdin=""):
    """`ftkit train` in this process: the libraries are loaded once for all tests."""
    torch.set_num_threads(1)
    disable_progress_bar()  # a process of its own does so before it loads them
    out, err, before = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()))
    try:
        with (
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as caught,
        ):
            main(["train", *map(str, arguments)])
    finally:
        sys.stdin = before
    return SimpleNamespace(exit_code=int(caught.value.code or 0), stdout=out.getvalue(), stderr=err.getvalue())


def without_lora(options):
    """The options of a command without LoRA's rank and dropout, for a method that has none."""
    of_lora = [at for at, option in enumerate(options) if option in ("--r", "--dropout")]
    return [option for at, option in enumerate(options) if at not in of_lora and at - 1 not in of_lora]


def write_rows(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def files_in(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
