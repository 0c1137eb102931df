"""The experiments of two articles run from the files that ftkit ships, on the built-in model, in small form."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import CHECKOUT

EXAMPLES = CHECKOUT / "templates" / "examples"


@pytest.fixture
def products(tmp_path):
    """reddot.csv with 60 products."""
    script = CHECKOUT / "scripts" / "make_products.py"
    subprocess.run([sys.executable, script, "all.csv"], cwd=tmp_path, check=True, capture_output=True)
    lines = (tmp_path / "all.csv").read_text(encoding="utf-8").splitlines()[:61]
    (tmp_path / "reddot.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_one_file_is_read_by_every_command_of_ludwigs_run(run_here, tmp_path):
    shutil.copy(EXAMPLES / "ludwig.toml", tmp_path)
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(200)]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    small = {
        "train": ["--model", "builtin:tiny", "--steps", 1, "--batch", 2],
        "eval": ["--max-new", 4],
        "chat": ["-p", "Say 5."],
    }
    done = {}
    for command in ("prep", "train", "eval", "chat"):
        done[command] = run_here(command, "--config", "ludwig.toml", *small.get(command, []))
        assert done[command].exit_code == 0, done[command].stderr
    assert sorted(path.stem for path in (tmp_path / "rows").glob("*.jsonl")) == ["test", "train", "valid"]
    info = json.loads((tmp_path / "runs" / "ludwig" / "run.json").read_text())
    settings = info["settings"]
    assert (settings["lr"], settings["warmup"], settings["micro_batch"], settings["qlora"]) == (4e-4, 0.03, "1", True)
    assert (
        info["held_out"]
        if "held_out" in info
        else info["data"]["held_out"] == len((tmp_path / "rows" / "valid.jsonl").read_text().splitlines())
    )
    assert "difference" in done["eval"].stderr and done["eval"].stdout.count("\n") == len(
        (tmp_path / "rows" / "test.jsonl").read_text().splitlines()
    )
    shown = run_here("chat", "--config", "ludwig.toml", "--print-config").stdout
    assert "temperature = 0.1" in shown and "max_new = 512" in shown
    shown = run_here("train", "--config", "ludwig.toml", "--print-config").stdout
    assert "batch = 16" in shown and 'model = "meta-llama/Llama-2-7b-hf"' in shown


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_the_four_runs_of_databricks_end_in_one_table(run_here, tmp_path, products):
    """The commands that make would run, in this process, where libraries load once."""
    small = ["MODEL=builtin:tiny", "ROWS=60", "TRAIN=--steps 1 --batch 2", "EVAL=--max-new 4"]
    made = subprocess.run(
        ["make", "-n", "-f", EXAMPLES / "databricks.mk", *small],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))},
        capture_output=True,
        text=True,
        check=True,
    )
    commands = [shlex.split(line) for line in made.stdout.replace("\\\n", " ").splitlines()]
    assert [command[:2] for command in commands] == [["ftkit", "prep"], *[["ftkit", "train"]] * 4, ["ftkit", "eval"]]
    for _, *command in commands:
        result = run_here(*command)
        assert result.exit_code == 0, result.stderr
    runs = [json.loads(line) for line in (tmp_path / "comparison.jsonl").read_text().splitlines()]
    assert [(run["r"], run["targets"], run["bits"]) for run in runs] == [
        (8, "q_proj,v_proj", 4), (16, "q_proj,v_proj", 4), (8, "all-linear", 4), (8, "all-linear", 8),
    ]  # fmt: skip
    assert (tmp_path / "comparison.html").is_file()
    assert all(run["run"].rpartition("/")[2] in result.stderr.replace("…", "") for run in runs)
    row = json.loads((tmp_path / "rows" / "train.jsonl").read_text().splitlines()[0])
    assert "Create a detailed description for the following product: " in row["prompt"]
