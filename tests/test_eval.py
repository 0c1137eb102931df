import io
import json
import re
import shutil
import sys

import pytest
from eval_place import lines_of, make_place, shell

from ftkit.core.eval_settings import EvalSettings
from ftkit.errors import ExitCode, UserError


@pytest.fixture(scope="module")
def workplace(tiny_model, tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("eval"), tiny_model)


@pytest.fixture
def here(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    return workplace


def evaluate(capfdbinary, **options):
    """The command in this process: (stdout, stderr)."""
    from ftkit.commands import eval as command

    if "data" in options:
        options["data"] = [options["data"]]
    settings = EvalSettings(**options)
    settings.check()
    command.run(settings)
    sys.stdout.flush()
    captured = capfdbinary.readouterr()
    return captured.out, captured.err.decode()


def test_without_data_the_held_out_rows_are_scored_beside_the_base(here, ftkit):
    result = ftkit("eval", "--baseline", "--max-new", "24", cwd=here)
    assert result.exit_code == ExitCode.OK, result.stderr
    predictions = lines_of(result.stdout)
    run = here / "runs" / (here / "runs" / "latest").read_text().strip()
    held_out = lines_of((run / "valid.jsonl").read_text())
    assert [row["prompt"] for row in predictions] == [row["prompt"] for row in held_out]
    assert [row["reference"] for row in predictions] == [row["completion"] for row in held_out]
    for row in predictions:
        assert {"prediction", "finish", "scores", "base_prediction", "base_finish", "base_scores"} <= set(row)
        assert row["scores"]["loss"] < row["base_scores"]["loss"]
        assert set(row["scores"]) >= {
            "tokens",
            "exact_match",
            "f1",
            "rouge1",
            "rougeL",
            "field_accuracy",
            "field.product",
            "stopped",
        }
    assert "95 % interval" in result.stderr and "better than the base: loss" in result.stderr


def test_the_json_summary_holds_both_models_their_difference_and_the_interval(here, capfdbinary):
    output, _ = evaluate(capfdbinary, baseline=True, json=True, max_new=8, output=str(here / "both.jsonl"))
    summary = json.loads(output)
    assert summary["schema"] == "ftkit.eval/1"
    rows = lines_of((here / "both.jsonl").read_text())
    assert summary["rows"] == len(rows) and summary["left_out"] == 0
    for side, key in (("scores", "scores"), ("baseline", "base_scores")):
        nats = sum(row[key]["loss"] * row[key]["tokens"] for row in rows)
        assert summary[side]["loss"] == pytest.approx(nats / summary["tokens"])
    loss = summary["difference"]["loss"]
    assert loss["value"] == pytest.approx(summary["scores"]["loss"] - summary["baseline"]["loss"])
    assert loss["low"] <= loss["value"] <= loss["high"] < 0
    assert (loss["won"], loss["lost"], loss["tied"], loss["verdict"]) == (len(rows), 0, 0, "better")


def test_the_baseline_of_a_run_is_the_base_model(here, tiny_model, capfdbinary):
    compared, _ = evaluate(capfdbinary, data="train.jsonl", baseline=True, json=True, max_new=1)
    alone, _ = evaluate(capfdbinary, data="train.jsonl", model=str(tiny_model), json=True, max_new=1)
    assert json.loads(compared)["baseline"]["loss"] == pytest.approx(json.loads(alone)["scores"]["loss"], rel=1e-3)


def test_a_fully_trained_run_is_compared_with_the_base_it_came_from(here, tiny_model, tmp_path, capfdbinary):
    shell(
        tmp_path,
        "train",
        here / "train.jsonl",
        "--model",
        tiny_model,
        "--full",
        "--steps",
        "2",
        "--lr",
        "0.003",
        "--run",
        "full",
    )
    full, _ = evaluate(capfdbinary, data="train.jsonl", run=str(tmp_path / "full"), baseline=True, json=True, max_new=1)
    alone, _ = evaluate(capfdbinary, data="train.jsonl", model=str(tiny_model), json=True, max_new=1)
    summary = json.loads(full)
    assert summary["scores"]["loss"] < summary["baseline"]["loss"]
    assert summary["baseline"]["loss"] == pytest.approx(json.loads(alone)["scores"]["loss"], rel=1e-3)


def test_the_same_rows_and_seed_give_the_same_bytes_whatever_the_batch(here, capfdbinary):
    one, _ = evaluate(capfdbinary, max_new=8, batch=1)
    many, _ = evaluate(capfdbinary, max_new=8, batch=16)
    again, _ = evaluate(capfdbinary, max_new=8, batch=16)
    assert many == again
    assert [row["prediction"] for row in lines_of(one)] == [row["prediction"] for row in lines_of(many)]


def test_rows_come_from_stdin_too_and_text_rows_are_scored_by_loss_alone(here, tiny_model, capfdbinary, monkeypatch):
    long = "Below is an instruction. " * 300  # longer than the model's context: read in windows
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ("Below is a task.", long))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(rows.encode())))
    output, said = evaluate(capfdbinary, data="-", model=str(tiny_model))
    short_row, long_row = lines_of(output)
    assert set(short_row) == {"text", "scores"} and set(short_row["scores"]) == {"loss", "tokens"}
    assert long_row["scores"]["tokens"] > 512
    assert "perplexity" in said and "exact match" not in said


def test_rows_of_messages_are_scored_on_their_last_answer(here, tiny_model, capfdbinary):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    row = {"messages": [*turns, {"role": "user", "content": "More"}, {"role": "assistant", "content": "No"}]}
    (here / "chat.jsonl").write_text(json.dumps(row) + "\n")
    output, _ = evaluate(capfdbinary, data="chat.jsonl", model=str(tiny_model), template="chatml", max_new=4)
    [prediction] = lines_of(output)
    assert prediction["messages"] == row["messages"][:-1] and prediction["reference"] == "No"


def test_rows_longer_than_the_context_are_left_out_and_said(here, capfdbinary):
    row = {"prompt": "Below " * 900, "completion": "yes"}
    fits = {"prompt": "Below", "completion": "yes"}
    (here / "long.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(fits) + "\n")
    output, said = evaluate(capfdbinary, data="long.jsonl", max_new=4)
    left_out, scored = lines_of(output)
    assert "left_out" in left_out and "prediction" not in left_out and "prediction" in scored
    assert "1 of 2 rows left out: longer than the model's context of 512 tokens" in said


def test_references_without_latin_letters_get_no_rouge(here, capfdbinary):
    (here / "zh.jsonl").write_text(json.dumps({"prompt": "Below", "completion": "你好"}, ensure_ascii=False) + "\n")
    output, said = evaluate(capfdbinary, data="zh.jsonl", max_new=4)
    assert "rouge1" not in lines_of(output)[0]["scores"] and "ROUGE left out" in said


def test_the_stop_string_of_a_template_is_no_part_of_reference_or_answer(here, tiny_model, capfdbinary):
    rows = shell(here, "prep", "t.csv", "--template", "alpaca-end")
    (here / "end.jsonl").write_bytes(rows)
    output, _ = evaluate(capfdbinary, data="end.jsonl", model=str(tiny_model), max_new=4)
    assert lines_of(output)[0]["reference"].strip() == "The Arc is a lamp."


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"run": "nowhere"}, ExitCode.MODEL, "nowhere: no such run folder"),
        ({"data": "trian.jsonl"}, ExitCode.DATA, "trian.jsonl: no such file"),
        ({"data": "empty.jsonl"}, ExitCode.DATA, "empty.jsonl: 0 rows"),
        ({"data": "bad.jsonl"}, ExitCode.DATA, "bad.jsonl:2: no answer"),
        ({"data": "mixed.jsonl"}, ExitCode.DATA, "2 kinds"),
        ({"data": "other.jsonl"}, ExitCode.DATA, "was trained with alpaca@"),
        ({"data": "train.jsonl", "template": "alpaca-end"}, ExitCode.DATA, "--template is alpaca-end@"),
        ({"model": "builtin:tiny"}, ExitCode.USAGE, "no rows"),
        ({"model": "x", "baseline": True}, ExitCode.USAGE, "--baseline"),
        ({"model": "x", "run": "y"}, ExitCode.USAGE, "contradict"),
        ({"data": "train.jsonl", "output": "train.jsonl"}, ExitCode.USAGE, "--output is the input file"),
        ({"data": "train.jsonl", "output": "t.csv"}, ExitCode.EXISTS, "t.csv"),
    ],
)
def test_mistakes_are_refused_with_their_exit_code(here, options, code, says, capfdbinary):
    answer = {"prompt": "a", "completion": "b"}
    (here / "empty.jsonl").write_text("\n")
    (here / "bad.jsonl").write_text(json.dumps(answer) + "\n" + json.dumps({**answer, "completion": " "}) + "\n")
    (here / "mixed.jsonl").write_text(json.dumps(answer) + "\n" + json.dumps({"text": "a"}) + "\n")
    (here / "other.jsonl").write_text(json.dumps({**answer, "template": "alpaca-end@000000000000"}) + "\n")
    with pytest.raises(UserError) as error:
        evaluate(capfdbinary, **options)
    assert error.value.exit_code == code
    assert says in error.value.message
    assert error.value.hint or code == ExitCode.EXISTS


def test_without_a_run_the_train_command_is_named(ftkit, tmp_path):
    result = ftkit("eval", "--baseline")
    assert result.exit_code == ExitCode.MODEL
    assert "ftkit train" in result.stderr and "Traceback" not in result.stderr and result.stdout == ""


def test_other_runs_are_compared_on_the_same_rows(here, tiny_model, capfdbinary):
    run = str(next((here / "runs").glob("*/run.json")).parent)
    output, said = evaluate(
        capfdbinary, against=[run, str(tiny_model)], max_new=8, output=str(here / "a.jsonl"), json=True
    )
    summary = json.loads(output)
    itself, base = summary["against"][run], summary["against"][str(tiny_model)]
    assert all(found["value"] == 0 and found["verdict"] == "unclear" for found in itself["difference"].values())
    assert base["difference"]["loss"]["verdict"] == "better"
    assert "no clear difference from" in said and f"better than {tiny_model}" in said
    row = lines_of((here / "a.jsonl").read_text())[0]
    assert row["against"][run]["prediction"] == row["prediction"] != row["against"][str(tiny_model)]["prediction"]


def test_a_run_that_is_clearly_worse_than_another_fails_the_gate(here, tiny_model, capfdbinary):
    run = str(next((here / "runs").glob("*/run.json")).parent)
    options = dict(data="train.jsonl", metrics="loss", fail_if_worse=True)
    evaluate(capfdbinary, baseline=True, **options)  # better: no gate fails
    with pytest.raises(UserError) as error:
        evaluate(capfdbinary, model=str(tiny_model), against=[run], **options)
    assert error.value.exit_code == ExitCode.GATE
    assert error.value.message == f"gate failed: clearly worse than {run} in loss, perplexity, bits_per_byte"


GENERAL = ["Below is an instruction that describes a task.", "Write a response, please. " * 8]


def plain_forgetting(tokenizer, before, after):
    """(before, after, KL) in nats a token, and the tokens, by a loop over the rows with both models beside each other."""
    import torch
    import torch.nn.functional as F

    nats, divergence, tokens = [0.0, 0.0], 0.0, 0
    for text in GENERAL:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            log_p = [F.log_softmax(model(ids).double(), -1) for model in (before, after)]
        for side in (0, 1):
            nats[side] -= float(log_p[side].gather(1, ids[0, 1:, None]).sum())
        divergence += float((log_p[0].exp() * (log_p[0] - log_p[1])).sum())
        tokens += ids.shape[1] - 1
    return nats[0] / tokens, nats[1] / tokens, divergence / tokens, tokens


def assert_forgetting_is(found, expected):
    before, after, divergence, tokens = expected
    assert found["tokens"] == tokens
    assert found["before"] == pytest.approx(before, rel=1e-5) and found["after"] == pytest.approx(after, rel=1e-5)
    assert found["rise"] == pytest.approx(found["after"] - found["before"])
    assert found["divergence"] == pytest.approx(divergence, rel=1e-4)


def write_general_text(folder):
    (folder / "general.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in GENERAL))


def test_forgetting_is_the_loss_on_general_text_before_and_after(here, tiny_model, capfdbinary):
    """Beside a plain loop over both models with transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_general_text(here)
    options = dict(forgetting="general.jsonl", metrics="loss", json=True, fail_under=["forgetting=1000"])
    output, said = evaluate(capfdbinary, **options)
    found = json.loads(output)["forgetting"]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), next((here / "runs").glob("*/adapter"))
    ).eval()

    def base(ids):
        with model.disable_adapter():
            return model(ids).logits[0, :-1]

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert_forgetting_is(found, plain_forgetting(tokenizer, base, lambda ids: model(ids).logits[0, :-1]))
    assert ("the model has forgotten" in said) == found["too_much"]


def test_forgetting_of_a_fully_trained_model_is_that_of_both_models_beside_each_other(
    here, tiny_model, ftkit, tmp_path
):
    """Though ftkit loads them one after the other."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_general_text(tmp_path)
    made = ("train", str(here / "train.jsonl"), "--model", str(tiny_model), "--full", "--steps", "3", "--lr", "0.02")
    assert ftkit(*made, "--run", "whole", cwd=tmp_path).exit_code == ExitCode.OK
    result = ftkit(
        "eval", "--run", "whole", "--forgetting", "general.jsonl", "--metrics", "loss", "--json", cwd=tmp_path
    )
    assert result.exit_code == ExitCode.OK, result.stderr
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (tiny_model, tmp_path / "whole" / "model")]
    sides = [lambda ids, model=model: model(ids).logits[0, :-1] for model in models]
    expected = plain_forgetting(AutoTokenizer.from_pretrained(tiny_model), *sides)
    assert_forgetting_is(json.loads(result.stdout)["forgetting"], expected)
    assert "divergence left out" not in result.stderr


def test_a_text_to_measure_forgetting_comes_with_ftkit(here, capfdbinary):
    output, said = evaluate(capfdbinary, forgetting="default", metrics="loss", json=True)
    assert json.loads(output)["forgetting"]["rows"] == 24 and "general text (default): loss" in said
    with pytest.raises(UserError) as error:
        evaluate(capfdbinary, forgetting="train.jsonl")
    assert error.value.exit_code == ExitCode.DATA and "--forgetting needs rows of text" in error.value.message


EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def report(workplace, tmp_path_factory):
    """A page with everything on it, from rows that hold markup: path of the file."""
    rows = [json.loads(line) for line in (workplace / "train.jsonl").open()][:6]
    rows[0]["completion"] += EVIL
    (workplace / "evil.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = tmp_path_factory.mktemp("report") / "report.html"
    options = ("--baseline", "--forgetting", "default", "--metrics", "labels,chrf,f1,loss,fields", "--max-new", "12")
    two = json.dumps(
        {"prompt": rows[1]["prompt"], "completion": rows[1]["completion"], "template": rows[1]["template"]}
    )
    with (workplace / "evil.jsonl").open("a") as file:
        file.write(f"{two}\n" * 8)  # few different answers: they are labels
    shell(workplace, "eval", "evil.jsonl", *options, "--report", page)
    return page


def test_the_page_answers_the_questions_in_one_file(report, workplace):
    html = report.read_text(encoding="utf-8")
    for title in (
        "In short",
        "Beside the untuned base",
        "What it forgot",
        "Classes",
        "Lengths",
        "Rows, the worst first",
    ):
        assert f"<h2>{title}</h2>" in html
    assert "Nothing here speaks against shipping" in html and "speaks against shipping: 0" not in html
    assert html.count("<article>") == 14 and "<del>" in html
    assert EVIL not in html and "&lt;script&gt;alert" in html
    run = next((workplace / "runs").glob("*/run.json")).parent.relative_to(workplace)
    assert (
        f"ftkit eval evil.jsonl --run {run} --baseline --forgetting default --metrics labels,chrf,f1,loss,fields"
        in html
    )
    assert "--max-new 12" in html and "--report" not in html


def test_the_first_sentence_says_whether_to_ship():
    """Gates first, then what is worse or forgotten; a gain only where nothing speaks against it."""
    from ftkit.commands.eval_report import answer
    from ftkit.core.bootstrap import Interval
    from ftkit.core.comparison import Comparison
    from ftkit.core.forgetting import Forgetting

    def compared(*verdicts):
        return [{str(n): Comparison(Interval(0, 0, 0), 0, 0, 0, verdict) for n, verdict in enumerate(verdicts)}]

    kept, forgot = (
        Forgetting("general", 1, 1, 1.0, 1.0 + rise, Interval(rise, rise, rise), None) for rise in (0.0, 0.3)
    )
    assert answer(compared("better"), kept, ["f1 is 0.1, under 0.7"]) == (
        "worse", "Do not ship: a gate failed (f1 is 0.1, under 0.7)."
    )  # fmt: skip
    kind, words = answer(compared("better", "worse"), kept, [])
    assert kind == "worse" and words == "Look before you ship: 1 score clearly better, 1 clearly worse, 0 unclear."
    kind, words = answer(compared("better", "better"), forgot, [])
    assert kind == "worse" and words.endswith("and it has forgotten more general text than the limit.")
    assert answer(compared("better", "unclear"), kept, [])[0] == "better"
    assert answer(compared("unclear"), None, [])[1].startswith("No clear gain")
    assert answer([], None, [])[1].startswith("Nothing to compare with: add --baseline")


def test_the_page_is_readable_in_a_browser(report):
    """In Chromium: no message on the console, nothing wider than the window, text that stands out, light and dark."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        backgrounds = set()
        for width, scheme in ((400, "light"), (1400, "light"), (1400, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            said, asked = [], []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(report.as_uri())
            assert said == [] and asked == [report.as_uri()]
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("Math.min(...[...document.querySelectorAll('svg text')].map(t => "
                                 "t.getBoundingClientRect().height))") >= 9  # fmt: skip
            style = page.evaluate(
                "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
            )
            assert contrast(*style) > 7
            backgrounds.add(style[1])
        browser.close()
    assert len(backgrounds) == 2


def contrast(*colours):
    """Of two CSS colours, 1 to 21 (WCAG 2, relative luminance)."""

    def luminance(colour):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


def test_runs_are_compared_in_one_line_each(here, tiny_model, tmp_path, run_here):
    first = next((here / "runs").glob("*/run.json")).parent
    options = (
        "--model",
        tiny_model,
        "--steps",
        "2",
        "--r",
        "2",
        "--targets",
        "q_proj",
        "--run",
        tmp_path / "runs" / "small",
    )
    shell(tmp_path, "train", here / "train.jsonl", *options)
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "run.json").write_text('{"status": "failed"}')
    command = ("--compare-runs", first, *sorted((tmp_path / "runs").iterdir()), "--max-new", "4")
    result = run_here("eval", here / "train.jsonl", *command, "--report", "runs.html", cwd=tmp_path)
    assert result.exit_code == ExitCode.OK, result.stderr
    assert "broken left out: the run is not complete (status: failed)" in result.stderr
    big, small = lines_of(result.stdout)
    assert (big["r"], big["targets"], big["bits"], big["method"]) == (16, "all-linear", 32, "lora")
    assert (small["r"], small["targets"], small["steps"]) == (2, "q_proj", 2)
    assert small["parameters"] == 2 * 2 * (32 + 32)  # two layers, rank 2, 32 in and out
    assert big["scores"]["loss"] < small["scores"]["loss"] and big["scored_rows"] == small["scored_rows"] == 21
    assert small["minutes"] >= 0 and "all-linear" in result.stderr
    html = (tmp_path / "runs.html").read_text()
    assert "2 runs" in html and html.count("<figure") >= 5 and "--compare-runs" in html
    own = run_here("eval", *command, "--metrics", "loss", "--json", cwd=tmp_path)
    assert "the runs held out different rows" in own.stderr
    assert [run["data"] for run in json.loads(own.stdout)["runs"]] == [
        str(first / "valid.jsonl"), str(tmp_path / "runs" / "small" / "valid.jsonl")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--compare-runs"], ExitCode.USAGE, ["--compare-runs needs run folders", "runs/*"]),
        (["--compare-runs", "t.csv", "train.jsonl"], ExitCode.USAGE, ["t.csv and train.jsonl: one file of rows"]),
        (["--compare-runs", "train.jsonl"], ExitCode.MODEL, ["no complete run among these"]),
        (["--compare-runs", "runs", "--baseline"], ExitCode.USAGE, ["--compare-runs and --baseline contradict"]),
        (["--compare-runs", "runs"], ExitCode.MODEL, ["runs: no run.json"]),
        (["--run", "half"], ExitCode.MODEL, ["half: the run is not complete (status: running)"]),
        (["--against", "half"], ExitCode.MODEL, ["half: the run is not complete"]),
        (["train.jsonl", "t.csv"], ExitCode.USAGE, ["one file of rows at a time, not 2"]),
        (["--report", "t.csv"], ExitCode.EXISTS, ["t.csv exists"]),
        (["train.jsonl", "--report", "train.jsonl", "--force"], ExitCode.USAGE, ["--report is the input file"]),
    ],
)
def test_runs_and_pages_that_cannot_be(here, arguments, code, words, run_here):
    (here / "half").mkdir(exist_ok=True)
    (here / "half" / "run.json").write_text('{"status": "running"}')
    result = run_here("eval", *arguments, cwd=here)
    assert result.exit_code == code and result.stdout == "", result
    assert all(word in result.stderr for word in words), result.stderr
