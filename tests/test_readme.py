"""The README's commands run as they stand, in an empty folder, and the built-in model does what is promised of it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
MISSION = """
ftkit prep reddot.csv --template alpaca > train.jsonl
ftkit estimate-memory --qlora --r 8 --targets all-linear --gpu t4
ftkit train train.jsonl --qlora --r 8 --targets all-linear
ftkit eval
ftkit merge
ftkit chat
""".strip().splitlines()


def session_commands():
    """The lines behind `$ ` in the README's session."""
    session = re.search(r"## A session\n.*?```console\n(.*?)```", README, re.S)
    assert session, "the README shows a session"
    return [line[2:] for line in session.group(1).splitlines() if line.startswith("$ ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder with a reddot.csv."""
    folder = tmp_path_factory.mktemp("mission")
    command = [sys.executable, str(CHECKOUT / "scripts" / "make_products.py"), "reddot.csv"]
    subprocess.run(command, cwd=folder, check=True)
    return folder


def shell(line, folder, stdin=""):
    """Run a line as a user would type it; the checkout's ftkit is first on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=folder,
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
        timeout=600,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


def test_the_session_of_the_readme_is_the_mission():
    commands = session_commands()
    assert [line for line in commands if line in MISSION[:3]] == MISSION[:3]
    assert {"ftkit eval --baseline > predictions.jsonl", "ftkit merge"} <= set(commands)
    demo = (CHECKOUT / "scripts" / "demo.sh").read_text(encoding="utf-8")
    assert all(line.replace("head -n 1", "head -n 2") in demo for line in commands), (
        "the session is what make demo runs"
    )


@pytest.mark.slow
def test_the_missions_lines_run_in_an_empty_folder_and_the_tuned_model_is_clearly_better(folder):
    for line in MISSION[:3]:
        shell(line, folder)
    run = folder / "runs" / (folder / "runs" / "latest").read_text().strip()
    held_out = [json.loads(line) for line in (run / "valid.jsonl").open()]
    trained = [json.loads(line) for line in (folder / "train.jsonl").open()]
    names = {asked(row) for row in held_out}
    assert len(names) == len(held_out) and not names & {asked(row) for row in trained if row not in held_out}

    predictions = shell("ftkit eval", folder).stdout.splitlines()
    assert [json.loads(line)["prompt"] for line in predictions] == [row["prompt"] for row in held_out]
    scores = json.loads(shell("ftkit eval --baseline --json -o scored.jsonl", folder).stdout)
    better = {name for name, change in scores["difference"].items() if change["verdict"] == "better"}
    assert {"loss", "perplexity", "field_accuracy", "field.product", "field.category"} <= better
    assert scores["scores"]["field_accuracy"] > 0.6 > 0.2 > scores["baseline"]["field_accuracy"]
    assert scores["scores"]["stopped"] > 0.95

    merged = folder / shell("ftkit merge", folder).stdout.strip()
    assert json.loads((merged / "merge.json").read_text())["proof"]["proven"] is True
    answer = shell("ftkit chat", folder, stdin="Write the description. product: Veltano Arc; category: Table Lamp\n")
    assert "Veltano" in answer.stdout
    assert (
        shell("ftkit chat", folder, stdin="Write the description. product: Orbis; category: Kettle\n").stdout.count(
            "\n"
        )
        == 1
    )


def asked(row):
    """The product that a row asks for."""
    return re.search(r"product: (.*?);", row["prompt"]).group(1)


def test_the_built_in_model_is_small_and_its_readme_says_how_it_was_made():
    tiny = CHECKOUT / "src" / "ftkit" / "models" / "tiny"
    assert sum(path.stat().st_size for path in tiny.iterdir()) <= 8_000_000
    text = (tiny / "README.md").read_text(encoding="utf-8")
    assert "scripts/build_tiny_model.py" in text and "Loss on" in text
