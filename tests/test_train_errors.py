"""What `ftkit train` refuses: each mistake has its exit status, one line and a hint, and leaves nothing behind.

Every mistake that can be seen before training is seen by --dry-run too, in the same words.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import assert_refused

from ftkit.errors import ExitCode
from ftkit.io.run_folder import COMPLETE, RunFolder
from ftkit.io.template_files import load_template

ALPACA = load_template("alpaca").fingerprint
MY_TEMPLATE = 'name = "mine"\nrequired = ["q", "a"]\ntyped = "q"\nprompt = "Q {{ q }}\\n"\ncompletion = "{{ a }}"\n'


def row(number, **extra):
    return {"prompt": f"Say {number}:", "completion": f" number {number}", **extra}


def as_text(rows):
    return "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in rows)


@pytest.fixture
def workplace(tmp_path):
    """A folder with twelve good rows in train.jsonl."""
    (tmp_path / "train.jsonl").write_text(as_text(row(n) for n in range(12)))
    return tmp_path


@pytest.fixture(params=[False, True], ids=["real", "dry"])
def train(run_here, workplace, tiny_model, request):
    """Train one step on train.jsonl, or on other rows; as a real run, and as a dry one."""

    def run(*options, data="train.jsonl", rows=None, model=tiny_model, **how):
        if rows is not None:
            (workplace / "rows.jsonl").write_text(rows if isinstance(rows, str) else as_text(rows))
            data = "rows.jsonl"
        dry = ["--dry-run"] if request.param else []
        arguments = [
            "train",
            *([data] if data else []),
            "--model",
            model,
            "--steps",
            1,
            "--valid",
            0,
            "--device",
            "cpu",
        ]
        return run_here(*arguments, *dry, *options, **how)

    return run


def changed_model(tiny_model, folder, **changes):
    """A copy of the tiny model with another config."""
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path):
    yield
    if not (tmp_path / "runs-are-fine").exists():
        assert not (tmp_path / "runs").is_dir()


# rows


def test_a_terminal_as_stdin_is_a_usage_error_and_does_not_wait(train):
    reader, writer = os.openpty()
    with open(writer) as terminal:
        assert_refused(
            train(data=None, stdin=terminal), ExitCode.USAGE, "stdin is a terminal", "ftkit train rows.jsonl"
        )
    os.close(reader)


def test_a_missing_file_names_the_nearest(train):
    assert_refused(train(data="tain.jsonl"), ExitCode.DATA, "tain.jsonl: no such file", "did you mean 'train.jsonl'?")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--across"], ["--across joins documents", "rows of text"]),
        (["--class-weights", "balanced"], ["--class-weights is for rows with a label", "'weight'"]),
        (["--train-turns", "last"], ["--train-turns last is about turns of conversations", "rows of messages"]),
        (["--objective", "classify"], ["are for sft", "classify text and label"]),
    ],
)
def test_options_for_other_rows_are_refused(train, options, words):
    assert_refused(train(*options), ExitCode.DATA, *words)


def test_a_folder_is_no_file(train, workplace):
    assert_refused(train(data=str(workplace)), ExitCode.DATA, "is a directory")


@pytest.mark.parametrize("how", [{"rows": ""}, {"rows": "\n\n"}, {"data": "-", "stdin": ""}, {"data": None}])
def test_no_rows_are_an_error(train, how):
    assert_refused(train(**how), ExitCode.DATA, "0 rows", "ftkit prep")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a", "completion": "b",}\n', "rows.jsonl:3"),
        ('{"prompt": "a"\n', "rows.jsonl:3"),
        ("[1]\n", "rows.jsonl:3: not a JSON object"),
        (row(0, completion=" "), "rows.jsonl:3: no answer"),
        ({"question": "a"}, "rows.jsonl:3: not a training row (it has question)"),
        (row(0, completion=5), "rows.jsonl:3: 'completion' is a number, should be text"),
        ({"messages": []}, "rows.jsonl:3"),
        (
            {"text": "kind of another"},
            "rows of 2 kinds in one file: prompt_completion at rows.jsonl:1; text at rows.jsonl:3",
        ),
        (row(0, template=ALPACA), f"rows.jsonl:3: template {ALPACA}, the rows before it have None"),
    ],
)
def test_a_bad_row_stops_with_file_and_line(train, line, words):
    result = train(rows=[row(1), row(2), line, row(3)])
    assert result.exit_code == ExitCode.DATA and result.stdout == ""
    assert words in result.stderr and result.stderr.count("ftkit: error: ") == 1


def test_rows_from_a_pipe_have_lines_too(train):
    assert "<stdin>:2: " in train(data="-", stdin=as_text([row(1), "{\n"])).stderr


def test_rows_that_are_all_the_same_are_trained_with_a_warning(train, workplace):
    (workplace / "runs-are-fine").touch()
    result = train(rows=[row(1)] * 8)
    assert result.exit_code == 0 and "warning: all 8 rows are the same" in result.stderr


def test_prompts_that_fill_the_length_leave_nothing_to_learn(train):
    result = train("--max-length", 16, rows=[row(n, prompt="word " * 60) for n in range(3)])
    assert result.exit_code == ExitCode.DATA and result.stdout == ""
    assert "of 3 rows, beyond 16 tokens: 3 dropped" in result.stderr
    assert "no row fits into 16 tokens with something to learn" in result.stderr and "--max-length" in result.stderr


def test_asking_for_an_objective_that_the_rows_are_not_for_is_refused(train):
    assert_refused(train("--objective", "text"), ExitCode.DATA, "the rows of train.jsonl are for sft")


@pytest.mark.parametrize(
    ("valid", "status", "words"),
    [
        ("1.5", ExitCode.USAGE, "--valid 1.5 is out of range"),
        ("nan", ExitCode.USAGE, "--valid nan is out of range"),
        ("tain.jsonl", ExitCode.DATA, "did you mean 'train.jsonl'?"),
        ("empty.jsonl", ExitCode.DATA, "empty.jsonl: 0 rows"),
        ("other.jsonl", ExitCode.DATA, f"other.jsonl:1: template {ALPACA}, the training rows have None"),
    ],
)
def test_held_out_rows_are_checked_like_the_others(train, workplace, valid, status, words):
    (workplace / "empty.jsonl").touch()
    (workplace / "other.jsonl").write_text(as_text([row(1, template=ALPACA)]))
    assert_refused(train("--valid", valid), status, words)


# templates


def test_rows_of_a_template_of_ones_own_need_it_once_more_and_the_same_one(train, workplace):
    (workplace / "runs-are-fine").touch()
    (workplace / "mine.toml").write_text(MY_TEMPLATE)
    (workplace / "other.toml").write_text(MY_TEMPLATE.replace("Q ", "Question "))
    rows = [row(n, template=load_template(str(workplace / "mine.toml")).fingerprint) for n in range(9)]
    assert_refused(train(rows=rows), ExitCode.DATA, "a template of your own (mine@", "--template mine.toml")
    assert_refused(train("--template", "other.toml", rows=rows), ExitCode.DATA, "--template is mine@")
    assert_refused(train("--template", "gone.toml", rows=rows), ExitCode.USAGE, "gone.toml: no such file")
    assert train("--template", "mine.toml", rows=rows).exit_code == 0


def test_a_shipped_template_that_changed_since_prep_is_refused(train):
    rows = [row(n, template="alpaca@000000000000") for n in range(9)]
    assert_refused(train(rows=rows), ExitCode.DATA, "alpaca@000000000000", ALPACA, "run ftkit prep again")


def test_conversations_without_a_chat_template_say_how_to_get_one(train):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    result = train(rows=[{"messages": turns}] * 2)
    assert (
        result.exit_code == ExitCode.MODEL
        and "no chat template" in result.stderr
        and "--template chatml" in result.stderr
    )


# options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--r", "0"], "--r 0 is out of range"),
        (["--alpha", "0"], "--alpha"),
        (["--dropout", "1"], "--dropout"),
        (["--lr", "0"], "--lr"),
        (["--lr", "2e4"], "--lr"),
        (["--epochs", "0"], "--epochs"),
        (["--epochs", "inf"], "--epochs"),
        (["--steps", "0"], "--steps"),
        (["--qlora", "--full"], "--qlora and --full contradict each other"),
        (["--init", "x", "--qlora"], "--init trains every weight from scratch"),
        (["--full", "--dtype", "fp16"], "--dtype fp16"),
        (["--r", "33"], "--r 33 is more than"),
    ],
)
def test_values_that_cannot_be_are_usage_errors(train, options, words):
    assert_refused(train(*options), ExitCode.USAGE, words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--targets", "q_porj"], ["no linear layer is called 'q_porj'", "did you mean 'q_proj'?", "gate_proj"]),
        (["--targets", ""], ["--targets"]),
    ],
)
def test_targets_that_match_nothing_name_the_layers_there_are(train, options, words):
    assert_refused(train(*options), ExitCode.MODEL, *words)


def test_an_adapter_on_a_tied_output_head_is_refused_with_the_reason(train, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    tied = changed_model(tiny_model, tmp_path / "tied", tie_word_embeddings=True)
    AutoModelForCausalLM.from_pretrained(tied).save_pretrained(tied)
    result = train("--targets", "all-linear,lm_head", model=tied)
    assert_refused(result, ExitCode.MODEL, "shares its weight with the input embedding", "--targets all-linear")


# models


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./tinny", "no such model folder"),
        ("x.gguf", "GGUF"),
        ("train.jsonl", "a file, not a model folder"),
        (".", "has no config.json"),
    ],
)
def test_what_is_no_model_is_refused_by_name(train, name, words):
    assert_refused(train(model=name), ExitCode.MODEL, words)


@pytest.mark.parametrize("option", ["--model", "--init"])
@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoModelForCausalLM": "m.M"}},
        {"architectures": ["BertModel"], "model_type": "bert"},
        {"num_attention_heads": 5},
        {"num_attention_heads": 0},
        {"vocab_size": 300},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_config_that_cannot_be_trained_is_refused_also_from_scratch(train, tiny_model, tmp_path, option, changes):
    result = train(option, changed_model(tiny_model, tmp_path / "other", **changes))
    assert_refused(result, ExitCode.MODEL)


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 3}, {"intermediate_size": 60}], ids=lambda c: next(iter(c)))
def test_weights_that_do_not_fill_the_model_are_refused_before_they_are_loaded(train, tiny_model, tmp_path, changes):
    result = train(model=changed_model(tiny_model, tmp_path / "other", **changes))
    assert_refused(result, ExitCode.MODEL, "model.layers.")


# surroundings: found before a single row is read


NEVER_READ = "this is no JSON\n"


def test_a_device_that_is_not_here_is_told_before_rows_are_read(train):
    import torch

    absent = "cuda" if torch.backends.mps.is_available() else "mps"
    result = train("--device", absent, data="-", stdin=NEVER_READ)
    assert_refused(result, ExitCode.ENVIRONMENT, f"--device {absent}: none is here", "cpu")


def test_an_optimizer_that_cannot_run_here_is_told_before_rows_are_read(train):
    result = train("--optimizer", "paged-adamw-8bit", data="-", stdin=NEVER_READ)
    assert_refused(result, ExitCode.ENVIRONMENT, "needs a CUDA GPU", "--optimizer adamw-8bit")


@pytest.mark.parametrize("options", [["--qlora"], ["--load-in-8bit"], ["--optimizer", "adamw-8bit"]])
def test_a_missing_library_is_told_before_rows_are_read(train, monkeypatch, options):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    result = train(*options, data="-", stdin=NEVER_READ)
    assert_refused(result, ExitCode.ENVIRONMENT, "needs bitsandbytes", "pip install bitsandbytes")


def test_several_processes_are_refused_and_one_is_not(train, workplace):
    refused = train(data="-", stdin=NEVER_READ, env={"WORLD_SIZE": "2"})
    assert_refused(refused, ExitCode.ENVIRONMENT, "WORLD_SIZE is 2", "without a launcher")
    (workplace / "runs-are-fine").touch()
    assert train(env={"WORLD_SIZE": "1"}).exit_code == 0


# folders


def test_a_folder_that_is_no_run_is_never_written_into(train, workplace):
    (workplace / "mine").mkdir()
    (workplace / "mine" / "notes.txt").write_text("keep me")
    result = train("--run", "mine", data="-", stdin=NEVER_READ)
    assert_refused(result, ExitCode.EXISTS, "mine exists and is no run")
    assert [path.name for path in (workplace / "mine").iterdir()] == ["notes.txt"]


def test_an_unfinished_run_of_something_else_is_not_overwritten(train, workplace):
    run = RunFolder(workplace / "mine")
    run.path.mkdir()
    run.write_info({"status": "running"})
    assert_refused(train("--run", "mine"), ExitCode.MODEL, "mine holds another run", "rows")
    assert run.read_info()["status"] == "running"


def test_a_run_of_other_settings_or_rows_lists_what_differs(run_here, train, workplace, tiny_model):
    base = ["--model", tiny_model, "--steps", 1, "--valid", 0, "--device", "cpu", "--run", "mine", "--r", 4]
    first = run_here("train", "train.jsonl", *base, "-q")
    assert (first.exit_code, first.stdout) == (0, "mine\n")
    again = run_here("train", "train.jsonl", *base)
    assert (again.exit_code, again.stdout) == (0, "mine\n") and "already trained" in again.stderr
    (workplace / "runs-are-fine").touch()  # runs/latest names it
    before = {path: path.stat().st_mtime_ns for path in (workplace / "mine").rglob("*")}
    result = train("--run", "mine", "--r", 8, "--lr", "1e-3", rows=[row(n) for n in range(5)])
    assert_refused(result, ExitCode.MODEL, "r 4 -> 8", "lr 0.0002 -> 0.001", "rows")
    assert {path: path.stat().st_mtime_ns for path in (workplace / "mine").rglob("*")} == before


def test_a_base_that_was_trained_in_the_meantime_is_another_base(run_here, workplace, tiny_model):
    import torch
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(tiny_model, workplace / "base")
    arguments = ["train", "train.jsonl", "--model", "base", "--steps", 1, "--valid", 0, "--device", "cpu", "-q"]
    (workplace / "runs-are-fine").touch()
    first, again = run_here(*arguments), run_here(*arguments)
    assert first.stdout == again.stdout != ""
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor + torch.tensor(0.01) for name, tensor in tensors.items()}, base / "model.safetensors")
    assert run_here(*arguments).stdout not in ("", first.stdout)


def test_a_runs_folder_that_cannot_be_made_is_an_io_error(run_here, workplace, tiny_model):
    (workplace / "runs").touch()
    result = run_here("train", "train.jsonl", "--model", tiny_model, "--steps", 1, "--valid", 0)
    assert result.exit_code == ExitCode.IO and result.stdout == ""
    assert "ftkit: error: runs" in result.stderr and "Traceback" not in result.stderr


def test_a_full_disk_behind_stdout_is_74_and_the_run_is_still_whole(workplace, tiny_model):
    (workplace / "runs-are-fine").touch()
    command = [sys.executable, "-m", "ftkit", "train", "train.jsonl", "--model", tiny_model, "--steps", "1", "-q"]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*map(str, command)], stdout=full, stderr=subprocess.PIPE, cwd=workplace, text=True)
    assert done.returncode == ExitCode.IO
    assert done.stderr == "ftkit: error: No space left on device\n"
    [info] = (workplace / "runs").glob("*/run.json")
    assert json.loads(info.read_text())["status"] == COMPLETE
