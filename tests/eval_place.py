"""What tests of eval share: a folder with rows and a trained run, and the command in this process."""

import json
import os
import subprocess
import sys

NAMES = ["Arc", "Bolo", "Cira", "Dune", "Ekko", "Fjord", "Gala"]
KINDS = ["Lamp", "Chair", "Clock"]


def make_place(folder, tiny_model):
    """Rows made by prep and a complete run on them (LoRA, 25 steps)."""
    lines = [f"{name},{kind},The {name} is a {kind.lower()}." for name in NAMES for kind in KINDS]
    (folder / "t.csv").write_text("product,category,description\n" + "\n".join(lines) + "\n")
    (folder / "train.jsonl").write_bytes(shell(folder, "prep", "t.csv", "--template", "alpaca"))
    options = ["--steps", "25", "--lr", "0.01", "--dtype", "fp32", "--valid", "0.3"]
    shell(folder, "train", "train.jsonl", "--model", tiny_model, *options)
    return folder


def shell(folder, *arguments):
    """The program in a process of its own; its stdout."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ftkit", *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True
    ).stdout


def lines_of(output):
    """The objects of JSONL."""
    return [json.loads(line) for line in output.splitlines()]
