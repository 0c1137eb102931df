"""Bases that are quantised on disk already: trained as their files hold them, like the same base quantised by ftkit."""

import json
import shutil

import pytest
import torch
from conftest import assert_refused
from safetensors.torch import load_file
from train_shell import run_train, without_lora, write_rows
from transformers import AutoConfig

from ftkit import faults
from ftkit.errors import ExitCode
from ftkit.io.base_model import find_base, load_weights
from ftkit.io.quantization import quantization_config
from ftkit.io.stored_quantization import kind_of_stored

RUN = ["train.jsonl", "--steps", 6, "--batch", 8, "--r", 4, "--lr", 0.01, "--run", "run"]
KINDS = {
    "nf4-dq": ["--qlora"],
    "nf4": ["--quantize", "nf4", "--double-quant", "off"],
    "fp4-dq": ["--quantize", "fp4"],
    "int8": ["--load-in-8bit"],
}


@pytest.fixture(scope="module")
def packed(tiny_model, tmp_path_factory):
    """kind -> the folder of a base that transformers saved with its weights packed so, each made once."""
    known = {}

    def made(kind):
        if kind not in known:
            folder = tmp_path_factory.mktemp("packed") / kind
            dtype = torch.float16 if kind == "int8" else torch.bfloat16
            asked = quantization_config(kind, dtype)
            load_weights(find_base(str(tiny_model)), dtype=dtype, device="cpu", quantization=asked).save_pretrained(
                folder
            )
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(tiny_model / file, folder)
            known[kind] = folder
        return known[kind]

    return made


def trained(place, model, *options):
    place.mkdir(exist_ok=True)
    write_rows(place / "train.jsonl")
    faults.forget()
    run = without_lora(RUN) if "--full" in options else RUN
    return run_train(*run, *options, "--model", model, cwd=place)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_trained_as_the_same_base_that_is_quantised_while_loading(kind, packed, tiny_model, tmp_path, run_here):
    dtype = ["--dtype", "fp16" if kind == "int8" else "bf16"]
    ours = trained(tmp_path / "packed", packed(kind), *dtype)
    assert ours.exit_code == 0 and f"quantised already, {kind}" in ours.stderr, ours.stderr
    theirs = trained(tmp_path / "loaded", tiny_model, *dtype, *KINDS[kind])
    assert theirs.exit_code == 0, theirs.stderr
    files = [tmp_path / place / "run" / "adapter" / "adapter_model.safetensors" for place in ("packed", "loaded")]
    adapters = [load_file(file) for file in files]
    for name, value in adapters[0].items():
        assert torch.equal(value, adapters[1][name])
    info = json.loads((tmp_path / "packed" / "run" / "run.json").read_text())
    scores = run_here(
        "eval", "--run", "run", "--baseline", "--metrics", "loss", "--json", "-o", "p", cwd=tmp_path / "packed"
    )
    found = json.loads(scores.stdout)
    assert found["scores"]["loss"] == pytest.approx(info["valid_loss"], rel=2e-2)
    assert found["baseline"]["loss"] == pytest.approx(info["valid_loss_before"], rel=2e-2)
    answer = run_here("chat", "run", "-p", "Tell me of Lily.\n", "--max-new", 2, cwd=tmp_path / "packed")
    assert answer.exit_code == 0 and answer.stdout


@pytest.mark.parametrize("kind", ["nf4-dq", "int8"])
def test_it_is_merged_onto_the_numbers_that_its_files_stand_for(kind, packed, tmp_path, run_here):
    trained(tmp_path, packed(kind))
    assert_refused(run_here("merge", "run"), ExitCode.MODEL, "quantised on disk", "--dequantise")
    result = run_here("merge", "run", "--dequantise")
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "run" / "merged" / "merge.json").read_text())["proof"]["proven"]


@pytest.mark.parametrize("kind", ["nf4-dq", "int8"])
def test_its_memory_is_foretold_as_that_of_the_same_base_quantised_while_loading(kind, packed, tiny_model, run_here):
    options = ["--r", 4, "--batch", 8, "--json"]
    ours = json.loads(run_here("estimate-memory", "--model", packed(kind), *options).stdout)
    theirs = json.loads(run_here("estimate-memory", "--model", tiny_model, *KINDS[kind], *options).stdout)
    different = {key for key in ours if ours[key] != theirs[key]}
    assert different <= {"model"}


def test_a_run_that_was_stopped_goes_on(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("FTKIT_FAULT", "step:term:3")
    assert trained(tmp_path, packed("nf4-dq")).exit_code == ExitCode.STOPPED
    monkeypatch.setenv("FTKIT_FAULT", "")
    result = trained(tmp_path, packed("nf4-dq"))
    assert result.exit_code == 0 and "going on after step 3 of 6" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--load-in-8bit"], ["is quantised already (nf4-dq), and int8 is asked for"]),
        (["--full"], ["full trains the weights themselves"]),
        (["--lora-init", "pissa"], ["quantised"]),
        (["--qlora", "--lora-init", "loftq"], ["what rounding lost", "16-bit"]),
        (["--qlora", "--keep-16bit", "q_proj"], ["--keep-16bit: its files decide that"]),
    ],
)
def test_what_such_a_base_cannot_do_is_refused(options, words, packed, tmp_path):
    assert_refused(trained(tmp_path, packed("nf4-dq"), *options), ExitCode.USAGE, *words)


def test_asking_for_what_it_is_anyway_changes_nothing(packed, tmp_path):
    assert trained(tmp_path, packed("nf4-dq"), "--qlora", "--dry-run").exit_code == 0


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_other_packings_are_refused_by_every_command_that_would_load_them(method, tiny_model, tmp_path, run_here):
    folder = tmp_path / "base"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    write_rows(tmp_path / "train.jsonl")
    for arguments in (
        ["train", "train.jsonl", "--model", "base"],
        ["estimate-memory", "--model", "base"],
        ["chat", "base", "-p", "a"],
    ):
        assert_refused(run_here(*arguments), ExitCode.MODEL, f"is quantised already by {method}", "--qlora")


def test_the_kind_is_read_off_the_config_that_transformers_writes(packed):
    for kind in KINDS:
        stored = AutoConfig.from_pretrained(packed(kind)).quantization_config
        assert kind_of_stored(stored if isinstance(stored, dict) else stored.to_dict(), "base") == kind
