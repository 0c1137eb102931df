"""What chat takes from an artefact: the system message and how answers are made, from a run as from its merged folder."""

import json
import shutil

import pytest
from conftest import assert_refused

from ftkit.commands.train import shared_system
from ftkit.errors import ExitCode

SYSTEM = "You sell lamps."


def conversation(question, system=SYSTEM):
    start = [{"role": "system", "content": system}] if system else []
    return {"messages": [*start, {"role": "user", "content": question}, {"role": "assistant", "content": "Yes."}]}


def asked(question, system=None):
    return json.dumps({"messages": conversation(question, system)["messages"][:-1]}) + "\n"


def test_a_system_message_is_shared_by_all_conversations_or_by_none():
    assert shared_system([conversation("a"), conversation("b")]) == SYSTEM
    assert shared_system([conversation("a"), conversation("b", "Other.")]) is None
    assert shared_system([conversation("a"), conversation("b", None)]) is None
    assert shared_system([conversation("a", None), conversation("b")]) is None
    assert shared_system([{"prompt": "a", "completion": "b"}]) is None


@pytest.fixture(scope="module")
def workplace(tiny_model, tmp_path_factory):
    """A folder with rows of conversations, a project file and the run that they gave, and its merged model."""
    import contextlib

    from train_shell import QUICK, run_train

    from ftkit.cli import main

    folder = tmp_path_factory.mktemp("workplace")
    rows = [conversation(f"Is lamp {number} red?") for number in range(10)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "ftkit.toml").write_text("[chat]\nmax-new = 7\ntemperature = 0.8\ntop-p = 0.9\nseed = 5\n")
    with contextlib.chdir(folder), pytest.raises(SystemExit) as ended:
        main(["prep", "rows.jsonl", "--template", "chatml", "-o", "train.jsonl", "-q"])
    assert ended.value.code == 0
    done = run_train("train.jsonl", "--model", tiny_model, *QUICK, "--run", "run", cwd=folder)
    assert done.exit_code == 0, done.stderr
    assert f"system message of all rows, recorded for chat: {SYSTEM}" in done.stderr
    with contextlib.chdir(folder), pytest.raises(SystemExit) as ended:
        main(["merge", "run", "-q"])
    assert ended.value.code == 0
    return folder


def test_training_records_what_rows_share_and_what_the_project_file_says_for_chat(workplace):
    card = json.loads((workplace / "run" / "adapter" / "ftkit.json").read_text())
    assert card["system"] == SYSTEM
    assert card["generation"] == {"max_new": 7, "temperature": 0.8, "top_p": 0.9}


def test_a_merged_folder_takes_it_along_for_chat_and_for_others(workplace):
    from transformers import GenerationConfig

    merged = workplace / "run" / "merged"
    card = json.loads((merged / "ftkit.json").read_text())
    assert (card["system"], card["generation"]["max_new"]) == (SYSTEM, 7)
    config = GenerationConfig.from_pretrained(merged)
    assert (config.do_sample, config.temperature, config.top_p, config.max_new_tokens) == (True, 0.8, 0.9, 7)
    assert config.eos_token_id == 0, "what the base's makers say stays"
    modelfile = (merged / "Modelfile").read_text()
    assert f'SYSTEM """{SYSTEM}"""' in modelfile and "PARAMETER num_predict 7\nPARAMETER temperature 0.8" in modelfile


def test_a_run_of_all_weights_takes_it_along_too(workplace, tiny_model):
    from train_shell import run_train
    from transformers import GenerationConfig

    options = ("--full", "--steps", 1, "--batch", 2, "--dtype", "fp32", "--run", "full")
    done = run_train("train.jsonl", "--model", tiny_model, *options, cwd=workplace)
    assert done.exit_code == 0, done.stderr
    model = workplace / "full" / "model"
    config = GenerationConfig.from_pretrained(model)
    assert (config.do_sample, config.temperature, config.max_new_tokens, config.eos_token_id) == (True, 0.8, 7, 0)
    assert json.loads((model / "ftkit.json").read_text())["system"] == SYSTEM


@pytest.mark.parametrize("what", ["run", "run/adapter", "run/merged", "full"])
def test_chat_says_and_does_what_was_recorded_wherever_the_folder_goes(workplace, run_here, tmp_path, what):
    options = ("chat", workplace / what, "--json")
    found = run_here(*options, "-p", "Is it red?")
    assert found.exit_code == 0, found.stderr
    assert f"system message, as in training (/system, --system): {SYSTEM}" in found.stderr
    assert "as ftkit.json says: max-new 7, temperature 0.8, top-p 0.9" in found.stderr
    named = ("--max-new", 7, "--temperature", 0.8, "--top-p", 0.9, "--system", SYSTEM, "--top-k", 0)
    assert run_here(*options, *named, "-p", "Is it red?").stdout == found.stdout
    rows = run_here(*options, stdin=asked("Is it red?", SYSTEM) + asked("Is it red?")).stdout.splitlines()
    assert json.loads(rows[0])["answer"] == json.loads(rows[1])["answer"] == json.loads(found.stdout)["answer"]


def test_flags_are_stronger_than_the_artefact(workplace, run_here):
    options = ("chat", workplace / "run", "--json", "-p", "Is it red?")
    cold = run_here(*options, "--temperature", 0, "--max-new", 3, "--system", "")
    assert "as ftkit.json says" not in cold.stderr and "as in training" not in cold.stderr
    assert json.loads(cold.stdout)["tokens"] <= 3
    other = run_here(*options, "--temperature", 0, "--max-new", 12, "--system", "Be brief.")
    assert other.stdout != run_here(*options, "--temperature", 0, "--max-new", 12).stdout


def test_a_run_of_the_tokenizers_own_chat_template_refuses_rows_of_another(workplace, tmp_path, run_here):
    model = shutil.copytree(workplace / "run" / "merged", tmp_path / "model")
    (model / "manifest.json").unlink(missing_ok=True)
    card = json.loads((model / "ftkit.json").read_text())
    (model / "ftkit.json").write_text(json.dumps(card | {"template_text": None, "template_fingerprint": None}))
    row = json.dumps({"prompt": "x", "completion": "y", "template": "alpaca@0123456789ab"})
    refused = run_here("chat", model, stdin=row)
    assert refused.exit_code == ExitCode.DATA and refused.stdout == ""
    words = "<stdin>:1: the row was made with template alpaca@0123456789ab, prompts here are made with"
    assert f"{words} the tokenizer's chat template" in refused.stderr
    other = run_here("chat", model, "--template", "chatml", "-p", "x")
    assert other.exit_code == 0 and "was trained with the tokenizer's chat template, --template is" in other.stderr


def test_eval_says_where_rows_lack_the_message_of_training(workplace, run_here, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(conversation("Is it red?", None)) + "\n")
    found = run_here("eval", "rows.jsonl", "--run", workplace / "run", "--metrics", "loss")
    assert found.exit_code == 0, found.stderr
    assert "1 of 1 conversations have no system message" in found.stderr and SYSTEM in found.stderr
    assert "no system message" not in run_here("eval", "--run", workplace / "run", "--metrics", "loss").stderr


def test_a_model_of_others_says_it_in_generation_config(tiny_model, tmp_path, run_here):
    model = shutil.copytree(tiny_model, tmp_path / "theirs")
    config = {"do_sample": True, "temperature": 0.7, "top_k": 20, "max_new_tokens": 9, "repetition_penalty": 1.1}
    (model / "generation_config.json").write_text(json.dumps(config))
    options = ("chat", model, "-p", "Once upon a time", "--json")
    found = run_here(*options)
    assert "as generation_config.json says: max-new 9, temperature 0.7, top-k 20" in found.stderr
    assert f"generation_config.json of {model}: passed over: repetition_penalty" in found.stderr
    assert json.loads(found.stdout)["tokens"] <= 9
    plain = tmp_path / "plain"
    shutil.copytree(tiny_model, plain)
    said = ("--max-new", 9, "--temperature", 0.7, "--top-k", 20)
    assert run_here("chat", plain, *options[2:], *said).stdout == found.stdout


def test_a_card_with_settings_that_no_training_writes_is_refused(workplace, tmp_path, run_here):
    model = shutil.copytree(workplace / "run" / "merged", tmp_path / "model")
    (model / "manifest.json").unlink(missing_ok=True)
    for wrong in ({"temperature": -1}, {"warmth": 1}):
        card = json.loads((model / "ftkit.json").read_text())
        (model / "ftkit.json").write_text(json.dumps(card | {"generation": wrong}))
        assert_refused_after_loading(run_here("chat", model, "-p", "x"), f"generation: {next(iter(wrong))}")


def assert_refused_after_loading(result, words):
    lines = [line for line in result.stderr.splitlines() if line.startswith(("ftkit: ", "  hint"))]
    assert_refused(type(result)(result.exit_code, result.stdout, "\n".join(lines)), ExitCode.MODEL, words)
