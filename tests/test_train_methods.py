"""`ftkit train --method ...` end to end: what each method saves, and what eval, chat and merge make of it."""

import json
import math

import pytest
import torch
from conftest import assert_refused
from peft import PeftModel
from safetensors.torch import load_file
from test_resume import made
from train_shell import run_train, without_lora, write_rows
from transformers import AutoModelForCausalLM

from ftkit import faults
from ftkit.errors import ExitCode
from ftkit.io.card import read_card
from ftkit.io.trained import CHANGED, load_trained, open_trained, without_adapter

RUN = ["train.jsonl", "--steps", 8, "--batch", 8, "--r", 4, "--run", "run"]
WAYS = {
    "dora": ["--dora"],
    "rslora, dropout": ["--rslora", "--dropout", 0.2],
    "pissa": ["--lora-init", "pissa"],
    "loftq": ["--qlora", "--lora-init", "loftq"],
    "lora+, ranks": ["--lora-plus", 4, "--rank-pattern", "q_proj=2,down_proj=8"],
    "ia3": ["--method", "ia3", "--lr", 0.05],
    "ia3 in 4 bits": ["--method", "ia3", "--quantize", "fp4", "--double-quant", "off", "--lr", 0.05],
    "ln": ["--method", "ln", "--lr", 0.05],
    "prompt": ["--method", "prompt", "--lr", 0.05],
    "prefix": ["--method", "prefix", "--lr", 0.05],
    "last block": ["--train-layers", "last:1"],
    "all but embeddings": ["--freeze", "embed"],
    "all but embeddings, whole": ["--freeze", "embed", "--save", "full"],
    "full, changed": ["--full", "--save", "changed"],
    "nf4, a layer left out": ["--quantize", "nf4", "--double-quant", "off", "--keep-16bit", "down_proj"],
}
NOT_MERGED = {"prompt", "prefix"}
PEFTS = {"dora", "rslora, dropout", "pissa", "lora+, ranks", "ia3", "ln", "prompt", "prefix"}


def command(way):
    """The options of a way, with a learning rate at which so few steps show something."""
    options = WAYS[way] if "--lr" in WAYS[way] else [*WAYS[way], "--lr", 0.01]
    is_lora = not {"--method", "--train-layers", "--freeze", "--full"} & set(options)
    return [*(RUN if is_lora else without_lora(RUN)), *options]


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    """name of a way -> (folder of a run that went well, what the shell saw), each made once."""
    known = {}

    def run(way):
        if way not in known:
            place = tmp_path_factory.mktemp("way")
            write_rows(place / "train.jsonl")
            faults.forget()
            known[way] = place / "run", run_train(*command(way), "--model", tiny_model, cwd=place)
        folder, result = known[way]
        assert result.exit_code == 0, result.stderr
        return folder, result

    return run


def info_of(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize("way", WAYS)
def test_it_learns_and_a_stopped_run_ends_with_the_same_bytes(way, runs, tiny_model, tmp_path, monkeypatch):
    folder, _ = runs(way)
    info = info_of(folder)
    assert info["valid_loss"] < info["valid_loss_before"] and math.isfinite(info["last_loss"])
    write_rows(tmp_path / "train.jsonl")
    faults.forget()
    monkeypatch.setenv("FTKIT_FAULT", "step:term:3")
    stopped = run_train(*command(way), "--model", tiny_model, cwd=tmp_path)
    assert stopped.exit_code == ExitCode.STOPPED, stopped.stderr
    faults.forget()
    monkeypatch.setenv("FTKIT_FAULT", "")
    again = run_train(*command(way), "--model", tiny_model, cwd=tmp_path)
    assert again.exit_code == 0 and "going on after step 3 of 8" in again.stderr, again.stderr
    assert made(tmp_path / "run") == made(folder)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_opened_again_has_the_loss_that_training_measured(way, runs, run_here):
    """Tuned and, where the adapter is taken off, untuned; PiSSA's base is a part of the base, LoftQ's start is an update."""
    folder, _ = runs(way)
    info = info_of(folder)
    options = ["--run", "run", "--metrics", "loss", "--baseline", "--json", "-o", "p.jsonl", "--force"]
    result = run_here("eval", *options, cwd=folder.parent)
    assert result.exit_code == 0, result.stderr
    scores = json.loads(result.stdout)
    tolerance = 2e-2 if info["dtype"] == "bf16" else 1e-4
    assert scores["scores"]["loss"] == pytest.approx(info["valid_loss"], rel=tolerance)
    if way not in ("loftq", "prompt", "prefix"):
        assert scores["baseline"]["loss"] == pytest.approx(info["valid_loss_before"], rel=tolerance)
    assert scores["baseline"]["loss"] > scores["scores"]["loss"]


@pytest.mark.parametrize("way", sorted(PEFTS))
def test_peft_opens_it_and_gives_the_same_logits(way, runs, tiny_model):
    folder, _ = runs(way)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, folder / "adapter").eval()
    ours = load_trained(open_trained(str(folder)), "cpu", dtype="fp32").model
    ids = torch.tensor([[5, 80, 200, 300, 7]])
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_changed_tensors_are_saved_alone_and_taken_off_again(runs, tiny_model):
    folder, _ = runs("last block")
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert tensors and all(".layers.1." in name or name.startswith(("model.norm", "lm_head")) for name in tensors)
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["peft_type"] == CHANGED
    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder / "adapter")
    untouched = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).state_dict()
    model = load_trained(open_trained(str(folder)), "cpu").model
    tuned = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert {name for name, p in tuned.items() if not torch.equal(p, untouched[name])} == set(tensors)
    with without_adapter(model):
        assert all(torch.equal(p, untouched[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, tuned[name]) for name, p in model.named_parameters())


def test_a_layer_left_out_of_the_quantisation_stays_as_it_is(runs):
    folder, _ = runs("nf4, a layer left out")
    card = read_card(folder / "adapter")
    assert card.method == "lora/nf4" and card.kept_16bit == ["down_proj"]
    assert len(card.quantized_sha256) == 2 * 6 and not any("down_proj" in name for name in card.quantized_sha256)


@pytest.mark.parametrize("way", WAYS)
def test_merge_proves_it_or_says_why_it_cannot(way, runs, run_here):
    folder, _ = runs(way)
    result = run_here("merge", "run", cwd=folder.parent)
    if way in NOT_MERGED:
        assert_refused(result, ExitCode.MODEL, "does not merge")
    elif "whole" in way:
        assert result.stdout == "run/model\n"
    else:
        assert result.exit_code == 0, result.stderr
        assert json.loads((folder / "merged" / "merge.json").read_text())["proof"]


@pytest.mark.parametrize("way", ["ia3", "prompt", "last block", "full, changed", "nf4, a layer left out"])
def test_what_a_run_wrote_down_repeats_it_and_serves_another_method(way, runs):
    """Of options that the method does not have, nothing is in the file; beside another method its own are no request."""
    folder, _ = runs(way)
    config = (folder / "config.toml").read_text()
    assert ("\nr = " in config) == ("16bit" in config) == (way == "nf4, a layer left out")
    again = run_train("train.jsonl", "--config", "run/config.toml", "--run", "run", cwd=folder.parent)
    assert again.exit_code == 0 and "already trained" in again.stderr, again.stderr
    other = "lora" if "full" in way else "full"
    plan = run_train("train.jsonl", "--config", "run/config.toml", f"--{other}", "--dry-run", cwd=folder.parent)
    assert plan.exit_code == 0 and f"method: {other}, " in plan.stderr, plan.stderr


@pytest.mark.parametrize("way", ["prompt", "prefix"])
def test_rows_behind_virtual_tokens_are_padded_and_it_is_said(way, runs):
    folder, result = runs(way)
    assert "rows are padded, not packed: virtual tokens" in result.stderr and info_of(folder)["plan"]["pack"] is False


def test_what_a_method_takes_by_itself_is_printed(runs):
    _, result = runs("ln")
    assert "method: ln, fp32" in result.stderr
    assert "targets: input_layernorm, norm, post_attention_layernorm" in result.stderr


@pytest.mark.parametrize("way", ["prompt", "ia3", "last block"])
def test_chat_answers_with_it(way, runs, run_here):
    folder, _ = runs(way)
    result = run_here("chat", "run", "-p", "Tell me of Lily and the ball.\n", "--max-new", 8, cwd=folder.parent)
    assert result.exit_code == 0 and result.stdout, result.stderr


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--method", "bitfit"], ExitCode.MODEL, ["has no biases", "--method ln"]),
        (
            ["--qlora", "--keep-16bit", "down_prj"],
            ExitCode.MODEL,
            ["no linear layer is called 'down_prj'", "down_proj"],
        ),
        (["--method", "prompt", "--virtual-tokens", 511], ExitCode.USAGE, ["the model reads 512 tokens"]),
        (["--warmup", 8], ExitCode.USAGE, ["all of the 8 steps"]),
        (["--offload-activations"], ExitCode.USAGE, ["--gradient-checkpointing on --offload-activations"]),
        (
            ["--offload-activations", "--gradient-checkpointing", "on", "--device", "cpu"],
            ExitCode.ENVIRONMENT,
            ["needs a CUDA GPU"],
        ),
        (["--optimizer", "paged-lion-8bit"], ExitCode.ENVIRONMENT, ["needs a CUDA GPU", "--optimizer lion-8bit"]),
    ],
)
def test_what_cannot_be_trained_is_refused_before_weights_are_loaded(options, status, words, tiny_model, tmp_path):
    write_rows(tmp_path / "train.jsonl")
    run = without_lora(RUN) if "--method" in options else RUN
    assert_refused(run_train(*run, "--dry-run", *options, "--model", tiny_model, cwd=tmp_path), status, *words)


@pytest.mark.parametrize("optimizer", ["adafactor", "lion", "lion-8bit"])
def test_a_run_with_another_optimizer_goes_on_to_the_same_bytes(optimizer, tiny_model, tmp_path, monkeypatch):
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    for place in folders:
        place.mkdir()
        write_rows(place / "train.jsonl")
    options = [*RUN, "--optimizer", optimizer, "--lr", 0.003, "--warmup", 2, "--schedule", "wsd", "--model", tiny_model]
    for place, fault in ((folders[0], ""), (folders[1], "step:term:3"), (folders[1], "")):
        faults.forget()
        monkeypatch.setenv("FTKIT_FAULT", fault)
        result = run_train(*options, cwd=place)
    assert result.exit_code == 0 and "going on after step 3" in result.stderr, result.stderr
    assert made(folders[0] / "run") == made(folders[1] / "run")
    assert info_of(folders[0] / "run")["valid_loss"] < info_of(folders[0] / "run")["valid_loss_before"]


@pytest.mark.parametrize("way", ["dora", "pissa", "ia3 in 4 bits", "ln", "prompt", "prefix", "last block"])
def test_estimate_memory_simulates_the_same_model(way, runs, tiny_model, run_here):
    folder, _ = runs(way)
    info = info_of(folder)
    rank = ["--r", 4] if "--r" in command(way) else []
    options = [*rank, *(word for word in WAYS[way] if word not in ("--lr", 0.05))]
    result = run_here("estimate-memory", "--model", tiny_model, "--batch", 8, "--max-length", 64, "--json", *options)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["trained_parameters"], found["total_parameters"]) == (info["trainable"], info["parameters"])
    assert found["allocated_bytes"] > found["total_parameters"]


def test_estimate_memory_refuses_an_option_that_the_method_does_not_have(tiny_model, run_here):
    result = run_here("estimate-memory", "--model", tiny_model, "--method", "ia3", "--alpha", 32)
    assert_refused(result, ExitCode.USAGE, "--alpha is an option of LoRA, the method is ia3", "another method: --lora")


def test_the_closed_form_says_what_it_does_not_describe(tiny_model, run_here):
    result = run_here("estimate-memory", "--model", tiny_model, "--fast", "--method", "ia3")
    assert_refused(result, ExitCode.ENVIRONMENT, "the closed form describes LoRA", "leave out --fast")
