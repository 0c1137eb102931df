"""`ftkit estimate-memory`, end to end: configs in, tables, JSON and exit codes out."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import pytest
from transformers import FalconConfig, GPT2Config, GPTNeoConfig, LlamaConfig, Qwen3MoeConfig

from ftkit.cli import main
from ftkit.core.gpus import GPUS, find_gpu
from ftkit.errors import ExitCode, UserError

GIB = 2**30


@dataclass(frozen=True)
class Result:
    """What a shell would see."""

    returncode: int
    stdout: str
    stderr: str


def estimate(*arguments: object) -> Result:
    """Run the command in this process: libraries load once."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main(["estimate-memory", *map(str, arguments)])
    return Result(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def as_json(*arguments: object) -> dict:
    result = estimate(*arguments, "--json")
    assert result.returncode == ExitCode.OK, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with nothing but the config.json of a small Llama."""
    folder = tmp_path_factory.mktemp("small")
    LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=1024,
        max_position_embeddings=512, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def llama_7b(tmp_path_factory):
    """A folder with nothing but a config.json of Llama-2-7B's sizes."""
    folder = tmp_path_factory.mktemp("llama-7b")
    LlamaConfig(max_position_embeddings=4096, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return folder


def test_the_report_adds_up(small):
    report = as_json("--model", small, "--qlora", "--r", 8, "--targets", "q_proj,v_proj", "--max-length", 256)
    assert report["schema"] == "ftkit.estimate/1"
    assert report["trained_parameters"] == 2 * 2 * 8 * (256 + 256)
    assert sum(report["parts_bytes"].values()) == report["allocated_bytes"] == max(report["phases_bytes"].values())
    assert report["allocated_bytes"] <= report["reserved_bytes"] == report["process_bytes"] - report["context_bytes"]
    assert report["run"]["rows"] == 16 and report["run"]["micro_steps"] == 1
    assert report["gpu"] is None


def test_a_pack_is_what_training_makes_of_these_rows(small):
    """Packs of 4096 tokens, or of so many as --micro-batch rows have; --micro-tokens is taken as it is."""
    options = ["--model", small, "--max-length", 256, "--batch", 64]
    runs = [
        as_json(*options, *more)["run"]
        for more in ([], ["--micro-batch", 4], ["--micro-tokens", 600], ["--pack", "off"], ["--micro-tokens", 9])
    ]
    assert [run["rows"] for run in runs] == [16, 4, 2, 16, 1]
    packed, padded = (as_json(*options, "--pack", way)["allocated_bytes"] for way in ("on", "off"))
    assert 0.9 < packed / padded < 1.1  # the same tokens


def test_a_model_that_ignores_packs_is_estimated_on_padded_rows(tmp_path):
    for name, config in (
        ("neo", GPTNeoConfig(hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]])),
        ("falcon", FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)),
    ):
        config.vocab_size, config.architectures = 512, [type(config).__name__.replace("Config", "ForCausalLM")]
        config.save_pretrained(tmp_path / name)
        packed, padded = (
            as_json("--model", tmp_path / name, "--max-length", 64, "--pack", way) for way in ("on", "off")
        )
        assert packed["allocated_bytes"] == padded["allocated_bytes"] > 0


def test_a_person_gets_a_table_on_stdout_and_remarks_on_stderr(small):
    result = estimate("--model", small, "--max-length", 2048, "--gpu", "t4")
    assert result.returncode == ExitCode.OK, result.stderr
    for words in ("frozen weights", "activations", "trained parameters", "allocated", "reserved", "141 MiB", "fits"):
        assert words in result.stdout
    assert "512 tokens, as in training" in result.stderr
    assert "8 x 512 tokens" in result.stdout


def test_a_config_file_is_as_good_as_its_folder(small):
    assert as_json("--model", small / "config.json")["allocated_bytes"] == as_json("--model", small)["allocated_bytes"]


def test_each_method_costs_what_it_is_known_for(small):
    common = ("--model", small, "--micro-batch", 1, "--max-length", 64)
    full, lora, int8, qlora = (as_json(*common, flag) for flag in ("--full", "--lora", "--load-in-8bit", "--qlora"))
    weights = full["trained_parameters"]
    assert full["trained_parameters"] == full["total_parameters"]
    assert full["parts_bytes"]["trained weights"] == pytest.approx(4 * weights, rel=0.01)  # fp32, as training has it
    assert full["parts_bytes"]["optimizer"] == pytest.approx(8 * weights, rel=0.02)
    assert lora["parts_bytes"]["frozen weights"] == pytest.approx(2 * weights, rel=0.01)  # bf16
    assert (
        lora["parts_bytes"]["frozen weights"]
        > int8["parts_bytes"]["frozen weights"]
        > qlora["parts_bytes"]["frozen weights"]
    )
    assert qlora["parts_bytes"]["quantisation constants"] > 0


def test_a_t4_computes_in_fp16_and_says_so_where_bf16_was_asked(small):
    assert as_json("--model", small, "--gpu", "t4")["run"]["dtype"] == "fp16"
    assert as_json("--model", small, "--gpu", "l4")["run"]["dtype"] == "bf16"
    asked = as_json("--model", small, "--gpu", "t4", "--dtype", "bf16", "--max-length", 64)
    assert asked["run"]["dtype"] == "bf16"
    assert len(asked["warnings"]) == 1 and "bf16" in asked["warnings"][0]


def test_llama_7b_is_estimated_from_its_config_in_seconds_in_a_process_of_its_own(llama_7b):
    arguments = ["--qlora", "--gradient-checkpointing", "on", "--micro-batch", "1", "--gpu", "t4", "--json", "-q"]
    command = [sys.executable, "-m", "ftkit", "estimate-memory", "--model", str(llama_7b), *arguments]
    before = os.times()
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    after = os.times()
    assert result.returncode == ExitCode.OK, result.stderr
    assert result.stderr == "", "libraries keep quiet"
    report = json.loads(result.stdout)
    assert report["gpu"]["word"] == "fits"
    assert 4 * GIB < report["allocated_bytes"] < 7 * GIB
    assert report["trained_parameters"] == 39_976_960
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert seconds < 20, "of processor time with all imports, on a slow core"


def test_what_does_not_fit_exits_5_with_a_change_that_does(llama_7b):
    result = estimate("--model", llama_7b, "--qlora", "--gpu", "t4", "--micro-batch", 1, "--max-length", 4096)
    assert result.returncode == ExitCode.MEMORY
    assert "does not fit" in result.stderr and "--gradient-checkpointing on" in result.stderr
    assert "what would help" in result.stdout
    assert "Traceback" not in result.stderr


def test_json_is_whole_where_it_does_not_fit(small):
    result = estimate("--model", small, "--gpu", "400MB", "--json")
    assert result.returncode == ExitCode.MEMORY
    report = json.loads(result.stdout)
    assert report["gpu"]["word"] == "no" and report["suggestions"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--gpu", "l40"), ExitCode.USAGE, "l40s"),
        (("--gpu", "a100"), ExitCode.USAGE, "a100-80"),
        (("--targets", "q_prj"), ExitCode.MODEL, "q_proj"),
        (("--r", 300), ExitCode.USAGE, "256"),
        (("--lora", "--full"), ExitCode.USAGE, "contradict"),
        (("--model", "./nowhere"), ExitCode.MODEL, "no such model folder"),
    ],
)
def test_mistakes_get_one_line_a_hint_and_their_exit_code(small, arguments, code, words):
    result = estimate(*(() if "--model" in arguments else ("--model", small)), *arguments)
    assert result.returncode == code, result.stderr
    assert words in result.stderr and "hint:" in result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr


def test_a_config_without_its_sizes_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 100, "num_hidden_layers": 2}')
    result = estimate("--model", tmp_path)
    assert result.returncode == ExitCode.MODEL
    assert "hidden_size" in result.stderr


def test_a_mixture_of_experts_is_exit_6_never_a_wrong_number(tmp_path):
    Qwen3MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256, num_experts=4, num_experts_per_tok=2,
        architectures=["Qwen3MoeForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    result = estimate("--model", tmp_path, "--targets", "attention")
    assert result.returncode == ExitCode.ENVIRONMENT, result.stdout
    assert "mixture of 4 experts" in result.stderr and result.stdout == ""


def test_gpt2_whose_names_and_layers_are_its_own_is_estimated(tmp_path):
    GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=256, n_positions=128, architectures=["GPT2LMHeadModel"]
    ).save_pretrained(tmp_path)
    report = as_json("--model", tmp_path, "--qlora", "--r", 4)
    assert report["run"]["tokens"] == 128
    assert report["trained_parameters"] == 2 * 4 * ((64 + 192) + (64 + 64) + (64 + 256) + (256 + 64))


# ---------------------------------------------------------------- cards
@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("t4", "NVIDIA T4"),
        ("RTX 4090", "GeForce RTX 4090"),
        ("A100-80GB", "NVIDIA A100 80GB"),
        ("H100", "NVIDIA H100 80GB"),
    ],
)
def test_cards_are_found_as_people_write_them(text, name):
    assert find_gpu(text).name == name


def test_sizes_are_what_their_units_say():
    assert find_gpu("24GB").usable_bytes == 24 * 10**9
    assert find_gpu("24GiB").usable_bytes == 24 * GIB
    assert find_gpu("512 MiB").usable_bytes == GIB // 2
    with pytest.raises(UserError) as caught:
        find_gpu("0GB")
    assert caught.value.exit_code == ExitCode.USAGE


def test_only_turing_lacks_bf16_and_flash_attention():
    assert [key for key, gpu in GPUS.items() if not gpu.has_bf16] == ["t4"]
    assert [key for key, gpu in GPUS.items() if not gpu.has_flash_attention] == ["t4"]
    assert all(gpu.usable_bytes < 180 * GIB and gpu.margin_bytes >= 300 * 2**20 for gpu in GPUS.values())
