"""report.html of a run: what it says, and that it asks for nothing."""

import json
import re
from html.parser import HTMLParser

import pytest
from train_shell import jsonl, run_train, write_rows

from ftkit.commands.train_report import curve

OPTIONS = ["--dtype", "fp32", "--steps", 6, "--batch", 8, "--r", 4, "--lr", 0.01, "--early-stop", 5, "--save-every", 2]


class Reader(HTMLParser):
    """Texts and elements of a page."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.tags, self.points = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "polyline":
            self.points.append(len(dict(attrs)["points"].split()))
        assert not {"src", "onload", "onclick"} & {name for name, _ in attrs}

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def reported(tiny_model, tmp_path_factory):
    place = tmp_path_factory.mktemp("reported")
    name = "<b>rows & more.jsonl"
    write_rows(place / name)
    result = run_train(name, "--model", tiny_model, *OPTIONS, cwd=place)
    assert result.exit_code == 0, result.stderr
    run = place / result.stdout.strip()
    return run, (run / "report.html").read_text(), json.loads((run / "run.json").read_text())


def test_the_page_says_what_the_run_says(reported):
    _, page, info = reported
    text = " ".join(Reader(page).texts)
    for value in (f"{info['first_loss']:.3f} → {info['last_loss']:.3f}", f"{info['valid_loss_before']:.3f}",
                  f"{info['trainable']:,} of {info['parameters']:,}", f"step {info['best_step']} of 6", info["data"]["sha256"],
                  info["versions"]["torch"], "ftkit train --config"):  # fmt: skip
        assert value in text, value


def test_each_curve_has_a_point_for_each_step(reported):
    run, page, _ = reported
    lines = jsonl(run / "metrics.jsonl")
    steps, held_out = sum("loss" in line for line in lines), sum("valid_loss" in line for line in lines)
    assert Reader(page).points == [steps, held_out, steps, steps, steps, steps]
    assert all(line["peak_memory_bytes"] > 1e7 for line in lines if "loss" in line)


def test_answers_to_held_out_prompts_are_shown_step_by_step(reported):
    run, page, _ = reported
    told = [line for line in jsonl(run / "metrics.jsonl") if "valid_loss" in line]
    assert [line["step"] for line in told] == [0, 2, 4, 6] and all(len(line["samples"]) == 3 for line in told)
    assert told[0]["samples"] != told[-1]["samples"]
    texts = Reader(page).texts
    assert all(answer in texts for line in told for answer in line["samples"] if answer)


def test_the_last_sample_is_what_the_saved_adapter_answers(reported, tiny_model, run_here):
    """So the attention of packs was out of the way."""
    run, _, info = reported
    assert info["best_step"] == 6
    [*_, last] = (line for line in jsonl(run / "metrics.jsonl") if "valid_loss" in line)
    row = jsonl(run / "valid.jsonl")[0]
    asked = run_here("chat", run, "-p", row["prompt"], "--max-new", 64, "--json", cwd=run.parents[1])
    assert json.loads(asked.stdout)["answer"] == last["samples"][0]


def test_names_of_the_data_are_text_and_nothing_is_asked_for(reported):
    _, page, _ = reported
    reader = Reader(page)
    assert "<b>rows & more.jsonl" in reader.texts and "script" not in reader.tags
    assert not re.search(r"https?://(?!www\.w3\.org)", page)


def test_a_run_that_was_stopped_says_so_and_events_are_shown(tiny_model, tmp_path, monkeypatch):
    from ftkit import faults

    write_rows(tmp_path / "train.jsonl")
    for fault in ("step:term:2", "pass:memory:2"):
        faults.forget()
        monkeypatch.setenv("FTKIT_FAULT", fault)
        run_train("train.jsonl", "--model", tiny_model, *OPTIONS, "--run", "run", cwd=tmp_path)
    text = " ".join(Reader((tmp_path / "run" / "report.html").read_text()).texts)
    assert "gone on with after step 2" in text and "out of memory: it goes on with" in text


def test_steps_that_float16s_scaler_skipped_are_no_points_of_the_curve():
    steps = [{"step": 1, "grad_norm": None}, {"step": 2, "grad_norm": 1.0}, {"step": 3, "grad_norm": 2.0}]
    assert Reader(str(curve(steps, "grad_norm", "norm"))).points == [2]
