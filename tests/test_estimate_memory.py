"""`ftkit estimate-memory`, end to end: configs in, tables, JSON and exit codes out."""

import json
import os
import shlex
from types import SimpleNamespace

import pytest
from conftest import assert_refused
from transformers import FalconConfig, GPT2Config, GPTNeoConfig, LlamaConfig, Qwen3MoeConfig

from ftkit.commands import estimate_search
from ftkit.commands.estimate_model import Model
from ftkit.core import real_steps
from ftkit.core.gpus import GPUS, find_gpu
from ftkit.errors import ExitCode, UserError

GIB = 2**30


@pytest.fixture
def estimate(run_here):
    """`ftkit estimate-memory ...` in this process."""
    return lambda *arguments: run_here("estimate-memory", *arguments)


@pytest.fixture
def as_json(estimate):
    """What --json says."""

    def run(*arguments):
        result = estimate(*arguments, "--json")
        assert result.exit_code == ExitCode.OK, result.stderr
        return json.loads(result.stdout)

    return run


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


# ---------------------------------------------------------------- one run
def test_the_report_adds_up(as_json, small):
    report = as_json("--model", small, "--qlora", "--r", 8, "--targets", "q_proj,v_proj", "--max-length", 256)
    assert report["schema"] == "ftkit.estimate/1"
    assert report["trained_parameters"] == 2 * 2 * 8 * (256 + 256)
    assert sum(report["parts_bytes"].values()) == report["allocated_bytes"] == max(report["phases_bytes"].values())
    assert report["allocated_bytes"] <= report["reserved_bytes"] == report["process_bytes"] - report["context_bytes"]
    assert 0 < report["phases_bytes"]["evaluation"] < report["allocated_bytes"]
    assert report["run"]["rows"] == 16 and report["run"]["micro_steps"] == 1
    assert report["gpu"] is None and report["way"] == "simulation"
    assert report["disk_bytes"]["trained"] == 4 * report["trained_parameters"]


def test_a_pack_is_what_training_makes_of_these_rows(as_json, small):
    """Packs of 8192 tokens for so small a model, or of so many as --micro-batch rows have; --micro-tokens is taken as it is."""
    options = ["--model", small, "--max-length", 256, "--batch", 64, "--fast"]
    runs = [
        as_json(*options, *more)["run"]
        for more in ([], ["--micro-batch", 4], ["--micro-tokens", 600], ["--pack", "off"], ["--micro-tokens", 9])
    ]
    assert [run["rows"] for run in runs] == [32, 4, 2, 16, 1]


def test_a_model_that_ignores_packs_is_estimated_on_padded_rows(as_json, tmp_path):
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
        assert packed["run"] == padded["run"] and "takes no packs" in packed["notes"][-1] and not padded["notes"]


def test_a_person_gets_tables_on_stdout_and_remarks_on_stderr(estimate, small):
    result = estimate("--model", small, "--max-length", 2048, "--gpu", "t4")
    assert result.exit_code == ExitCode.OK, result.stderr
    for words in ("frozen weights", "activations", "trained parameters", "allocated", "reserved", "141 MiB", "fits",
                  "largest --micro-batch", "disk"):  # fmt: skip
        assert words in result.stdout
    assert "512 tokens, as in training" in result.stderr
    assert "16 x 512 tokens" in result.stdout


def test_without_a_card_there_is_a_verdict_for_every_one(as_json, small):
    report = as_json("--model", small / "config.json", "--max-length", 64)
    assert [card["name"] for card in report["cards"]] == [gpu.name for gpu in GPUS.values()]
    assert {card["word"] for card in report["cards"]} == {"fits"}


def test_each_method_costs_what_it_is_known_for(as_json, small):
    report = as_json("--model", small, "--micro-batch", 1, "--max-length", 64, "--compare")
    full, lora, int8, qlora = report["methods"]
    weights = full["trained_parameters"]
    assert full["trained_parameters"] == full["total_parameters"]
    assert full["parts_bytes"]["trained weights"] == pytest.approx(4 * weights, rel=0.01)  # fp32, as training has it
    assert full["parts_bytes"]["optimizer"] == pytest.approx(8 * weights, rel=0.02)
    assert lora["parts_bytes"]["frozen weights"] == pytest.approx(2 * weights, rel=0.01)  # bf16
    frozen = [method["parts_bytes"]["frozen weights"] for method in (lora, int8, qlora)]
    assert frozen == sorted(frozen, reverse=True) and len(set(frozen)) == 3
    assert qlora["parts_bytes"]["quantisation constants"] > 0
    assert {method["smallest_card"] for method in report["methods"]} == {"NVIDIA T4"}


def test_the_table_of_methods_has_a_row_for_each(estimate, small):
    result = estimate("--model", small, "--compare", "--fast")
    assert [line.split()[0] for line in result.stdout.splitlines()[3:] if line.strip()] == [
        "full",
        "lora",
        "int8",
        "qlora",
    ]
    assert "expected error 3%" in result.stderr


def test_the_table_of_methods_says_which_of_them_a_card_holds(estimate, small, llama_7b):
    result = estimate("--model", llama_7b, "--compare", "--fast", "--gpu", "l4", "--dtype", "fp16")
    lines = [line.split() for line in result.stdout.splitlines()[3:] if line.split()[:1] in (["full"], ["qlora"])]
    assert [line[-1] for line in lines] == ["no", "fits"] and result.exit_code == ExitCode.OK
    assert "fp16 is too narrow" in result.stderr
    none = estimate("--model", llama_7b, "--compare", "--fast", "--gpu", "4GB")
    assert none.exit_code == ExitCode.MEMORY and "none of the methods fits" in none.stderr


def test_a_t4_computes_in_fp16_and_says_so_where_bf16_was_asked(as_json, small):
    assert as_json("--model", small, "--gpu", "t4", "--fast")["run"]["dtype"] == "fp16"
    assert as_json("--model", small, "--gpu", "l4", "--fast")["run"]["dtype"] == "bf16"
    asked = as_json("--model", small, "--gpu", "t4", "--dtype", "bf16", "--max-length", 64, "--fast")
    assert asked["run"]["dtype"] == "bf16"
    assert len(asked["warnings"]) == 1 and "bf16" in asked["warnings"][0]


def test_a_plain_script_needs_more_than_ours(as_json, small):
    """All logits at once, and embeddings in 32 bits."""
    options = ("--model", small, "--qlora", "--max-length", 256, "--gradient-checkpointing", "on")
    ours, plain = as_json(*options), as_json(*options, "--framework", "hf")
    assert plain["allocated_bytes"] > ours["allocated_bytes"]
    assert plain["trained_parameters"] == ours["trained_parameters"]
    assert plain["framework"] == "hf"


def test_the_file_of_a_run_says_what_was_trained(as_json, small, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(f'[train]\nmodel = "{small}"\nqlora = true\nr = 4\nlr = 0.1\nsteps = 7\nmax_length = 64\n')
    report = as_json("--config", path, "--fast")
    assert (report["run"]["method"], report["run"]["tokens"]) == ("qlora", 64)
    assert as_json("--config", path, "--fast", "--r", 8)["trained_parameters"] == 2 * report["trained_parameters"]


# ---------------------------------------------------------------- cards
def test_checkpointing_is_chosen_where_only_it_fits(as_json, llama_7b):
    options = ("--model", llama_7b, "--qlora", "--fast")
    small_card, large_card = (as_json(*options, "--gpu", gpu) for gpu in ("t4", "h100"))
    assert small_card["run"]["gradient_checkpointing"] is True and small_card["gpu"]["word"] == "fits"
    assert large_card["run"]["gradient_checkpointing"] is False and large_card["gpu"]["word"] == "fits"
    assert as_json(*options, "--gpu", "t4", "--gradient-checkpointing", "on")["run"] == small_card["run"]


def test_llama_7b_is_estimated_from_its_config_in_a_process_of_its_own(ftkit, llama_7b):
    before = processor_seconds()
    result = ftkit("estimate-memory", "--model", llama_7b, "--qlora", "--gpu", "t4", "--json", "-q")
    seconds = processor_seconds() - before
    assert result.exit_code == ExitCode.OK, result.stderr
    assert result.stderr == "", "libraries keep quiet"
    report = json.loads(result.stdout)
    assert report["gpu"]["word"] == "fits" and report["run"]["gradient_checkpointing"]
    assert 4 * GIB < report["allocated_bytes"] < 7 * GIB
    assert report["trained_parameters"] == 39_976_960
    assert report["largest"]["micro_batch"] >= 4 and report["largest"]["max_length"] == 4096
    assert seconds < 30, "of processor time with all imports, on a slow core that others use too"


def test_what_does_not_fit_exits_5_with_priced_changes_of_which_one_does(estimate, llama_7b):
    result = estimate("--model", llama_7b, "--lora", "--gpu", "t4", "--micro-batch", 1, "--fast")
    assert result.exit_code == ExitCode.MEMORY
    assert "does not fit" in result.stderr and "hint: --qlora" in result.stderr
    assert "what would help" in result.stdout and "rounded to 4 bits" in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_method_by_its_name_that_does_not_fit_is_told_what_would(estimate, llama_7b, method):
    result = estimate("--model", llama_7b, "--method", method, "--gpu", "t4", "--micro-batch", 1, "--fast")
    assert result.exit_code == ExitCode.MEMORY and "hint: --qlora" in result.stderr


def test_a_verdict_of_the_formula_near_the_limit_is_said_to_be_one(as_json, llama_7b):
    options = ("--model", llama_7b, "--fast", "--qlora", "--max-length", 1024, "--gradient-checkpointing", "on")
    assert any("near the limit" in warning for warning in as_json(*options, "--gpu", "8GB")["warnings"])
    assert not as_json(*options, "--gpu", "t4")["warnings"]


def test_json_is_whole_where_it_does_not_fit(estimate, small):
    result = estimate("--model", small, "--gpu", "400MB", "--json", "--max-length", 128)
    assert result.exit_code == ExitCode.MEMORY
    report = json.loads(result.stdout)
    assert report["gpu"]["word"] == "no" and report["largest"] is None
    saved = [each["saved_bytes"] for each in report["suggestions"]]
    assert saved == sorted(saved, reverse=True) and min(saved) > 0


def test_settings_that_fit_are_found_and_their_command_fits(as_json, llama_7b):
    found = as_json("--model", llama_7b, "--fit", "8GB", "--fast")
    words = shlex.split(found["command"])
    assert words[:3] == ["ftkit", "train", "train.jsonl"] and "--qlora" in words
    again = as_json(*words[3:], "--gpu", "8GB", "--fast")
    assert again["gpu"]["word"] == "fits" and again["run"] == found["run"]


def test_settings_that_fit_are_confirmed_by_the_simulation(as_json, small):
    found = as_json("--model", small, "--fit", "1200MB", "--max-length", 512)
    assert found["gpu"]["word"] == "fits" and found["way"] == "simulation"


def test_nothing_fits_a_card_of_one_gigabyte(estimate, llama_7b):
    assert_refused(estimate("--model", llama_7b, "--fit", "1GB", "--fast"), ExitCode.MEMORY, "nothing fits", "smaller")


def test_several_cards_share_the_states_by_their_way(as_json, llama_7b):
    options = ("--model", llama_7b, "--full", "--gradient-checkpointing", "on")
    one = as_json(*options, "--fast")
    ways = [as_json(*options, "--gpus", 8, "--parallel", way) for way in ("ddp", "zero1", "zero2", "zero3")]
    sizes = [each["allocated_bytes"] for each in ways]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4 and sizes[0] > one["allocated_bytes"]
    assert {each["expected_error"] for each in ways} == {0.1}
    assert {(each["run"]["rows"], each["run"]["micro_steps"]) for each in ways} == {(2, 1)}  # of 16, by 8 cards
    assert any("trains on one card" in note for note in ways[0]["notes"])
    assert ways[1]["parts_bytes"]["optimizer"] == pytest.approx(one["parts_bytes"]["optimizer"] / 8, rel=0.01)


# ---------------------------------------------------------------- the formula, rows, a real step
def processor_seconds():
    """Of all processes that this one has started and waited for."""
    times = os.times()
    return times.children_user + times.children_system


def test_the_formula_says_how_sure_it_is_and_takes_no_time(ftkit, llama_7b):
    started = processor_seconds()
    result = ftkit("estimate-memory", "--model", llama_7b, "--fast", "--gpu", "4090")
    assert processor_seconds() - started < 0.6, "three times what it takes, a third of what torch alone would"
    assert "expected error 3%" in result.stderr and "~" in result.stdout
    assert "frozen weights" in result.stdout


def test_the_formula_loads_neither_torch_nor_transformers(ftkit, llama_7b, tmp_path):
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    packed["bnb_4bit_use_double_quant"] = True
    config = json.loads((llama_7b / "config.json").read_text()) | {"quantization_config": packed}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was loaded')")
    (tmp_path / "transformers.py").write_text("raise SystemExit('transformers was loaded')")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    for arguments in (("--model", llama_7b, "--compare"), ("--model", tmp_path)):
        result = ftkit("estimate-memory", *arguments, "--fast", env={"PYTHONPATH": path})
        assert result.exit_code == ExitCode.OK, result.stderr


@pytest.fixture
def rows(tmp_path):
    """A file of rows of two lengths."""
    path = tmp_path / "train.jsonl"
    texts = [(f"say {n}", "yes") for n in range(10)] + [
        (f"say {n}" + "a long word " * 20, "no " * 30) for n in range(10)
    ]
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in texts))
    return path


def test_real_rows_give_real_lengths_steps_and_tokens(as_json, estimate, tiny_model, rows):
    options = ("--model", tiny_model, "--data", rows, "--batch", 8, "--micro-batch", 2)
    packed, padded = (as_json(*options, "--pack", way, "--share-prefix", "off") for way in ("on", "off"))
    facts = packed["data"]
    assert facts["rows"] + facts["held_out"] == 20 and facts["held_out"] > 0
    assert facts["steps"] == -(-facts["rows"] // 8) and facts["dropped"] == 0
    assert facts["counted"] < facts["tokens"] < facts["rows"] * facts["longest"]
    assert packed["run"]["tokens"] == facts["longest"] < 512
    assert facts["heaviest"] <= 2 * facts["longest"] and padded["data"]["heaviest"] == 2 * (facts["longest"] - 1)
    assumed = as_json("--model", tiny_model, "--max-length", 512, "--batch", 8, "--micro-batch", 2)
    assert packed["allocated_bytes"] < assumed["allocated_bytes"] and packed["assumed"] is None
    assert f"{facts['rows']} rows to train" in estimate(*options).stdout


def test_changes_are_priced_on_the_real_rows_too(estimate, tiny_model, rows):
    result = estimate("--model", tiny_model, "--data", rows, "--batch", 8, "--gpu", "330MB", "--json")
    assert result.exit_code == ExitCode.MEMORY, result.stderr
    changes = {each["change"]: each["saved_bytes"] for each in json.loads(result.stdout)["suggestions"]}
    assert changes["--micro-batch 1"] > 0 and any(change.startswith("--max-length") for change in changes)


def test_two_real_steps_take_what_was_predicted(estimate, tmp_path):
    """On the CPU, in this process: its memory grows by what the simulation says, and by the code of libraries."""
    LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=16384, max_position_embeddings=512, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    options = ("--model", tmp_path, "--measure", "--max-length", 128, "--batch", 4, "--micro-batch", 2, "--json")
    result = estimate(*options, "--full", "--dtype", "fp32")
    assert result.exit_code == ExitCode.OK, result.stderr
    report = json.loads(result.stdout)
    predicted, measured = report["predicted"]["allocated_bytes"], report["measured"]["resident_bytes"]
    assert predicted > GIB // 2
    assert predicted * 0.95 - 2**25 < measured < predicted * 1.05 + 2**27


def test_the_heaviest_pack_of_real_rows_is_measured_with_its_shared_prefixes(estimate, tmp_path, monkeypatch):
    """The very batch, with its own ids; in the same tolerance as other runs."""
    taken = []
    monkeypatch.setattr(
        real_steps, "take_steps", lambda *args, real=real_steps.take_steps: taken.append(args[3]) or real(*args)
    )
    rows = [
        {"prompt": f"{prompt} " + "a long story " * 50, "completion": f"ends {n} times"}
        for prompt in "ab"
        for n in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = estimate("--measure", "--data", "rows.jsonl", "--batch", 12, "--full", "--json")
    assert result.exit_code == ExitCode.OK, result.stderr
    report = json.loads(result.stdout)
    [batch] = taken
    assert batch.input_ids.numel() == report["data"]["heaviest"] < report["data"]["tokens"] / 3
    assert (0,) in batch.layout.ancestors and batch.input_ids.unique().numel() > 10
    assert f"{report['data']['heaviest']} positions of rows.jsonl" in report["title"]
    predicted, measured = report["predicted"]["allocated_bytes"], report["measured"]["resident_bytes"]
    assert predicted * 0.95 - 2**25 < measured < predicted * 1.05 + 2**27


@pytest.mark.parametrize("method", ["--qlora", "--load-in-8bit"])
def test_a_quantised_model_of_random_weights_can_be_measured(estimate, small, method):
    result = estimate("--model", small, "--measure", "--max-length", 64, "--batch", 4, "--micro-batch", 2, method)
    assert result.exit_code == ExitCode.OK, result.stderr
    assert "growth of the process" in result.stdout


# ---------------------------------------------------------------- what is refused, and what is not
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--gpu", "l40"), ExitCode.USAGE, "l40s"),
        (("--gpu", "a100"), ExitCode.USAGE, "a100-80"),
        (("--fit", "t5"), ExitCode.USAGE, "--fit t5"),
        (("--targets", "q_prj"), ExitCode.MODEL, "q_proj"),
        (("--targets", "q_prj", "--fast"), ExitCode.MODEL, "q_proj"),
        (("--r", 300), ExitCode.USAGE, "256"),
        (("--r", 300, "--fast"), ExitCode.USAGE, "256"),
        (("--lora", "--full"), ExitCode.USAGE, "contradict"),
        (("--full", "--dtype", "fp16"), ExitCode.USAGE, "too narrow"),
        (("--gpu", "t4", "--fit", "t4"), ExitCode.USAGE, "exclude"),
        (("--framework", "hf", "--fast"), ExitCode.USAGE, "simulated"),
        (("--gpus", 0), ExitCode.USAGE, "1 or more"),
        (("--gpus", 2, "--measure"), ExitCode.USAGE, "neither"),
        (("--gpus", 2, "--fit", "80GB"), ExitCode.USAGE, "one card"),
        (("--parallel", "zero3"), ExitCode.USAGE, "--gpus"),
        (("--template", "alpaca"), ExitCode.USAGE, "--data"),
        (("--compare", "--quantize", "fp4"), ExitCode.USAGE, "exclude"),
        (("--gpu", "t4", "--measure"), ExitCode.USAGE, "exclude"),
        (("--model", "./nowhere"), ExitCode.MODEL, "no such model folder"),
    ],
)
def test_mistakes_get_one_line_a_hint_and_their_exit_code(estimate, small, arguments, code, words):
    assert_refused(estimate(*(() if "--model" in arguments else ("--model", small)), *arguments), code, words)


def test_a_config_without_its_sizes_is_refused(estimate, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 100, "num_hidden_layers": 2}')
    for way in ((), ("--fast",)):
        assert_refused(estimate("--model", tmp_path, *way), ExitCode.MODEL, "hidden_size")


LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 100,
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_key_value_heads", value) for value in ("eight", 3, -2, 0, True, 4.0)]
    + [("head_dim", value) for value in ("x", -8)]
    + [("num_attention_heads", 128)]
    + [
        ("hidden_size", True),
        ("vocab_size", 100.0),
        ("max_position_embeddings", "long"),
        ("quantization_config", "nf4"),
    ],
)
def test_a_config_with_sizes_that_are_none_is_refused(estimate, tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {key: value}))
    for way, word in (((), "config.json"), (("--fast",), key)):
        assert_refused(estimate("--model", tmp_path, *way), ExitCode.MODEL, word)


def test_a_mistral_that_names_no_window_has_that_of_transformers(estimate, as_json, tmp_path):
    config = LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    options = ("--model", tmp_path, "--fast", "--max-length")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert as_json(*options, 4096)["run"]["tokens"] == 4096
    assert_refused(estimate(*options, 8192), ExitCode.ENVIRONMENT, "attention windows (4096 tokens")
    (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
    assert as_json(*options, 8192)["run"]["tokens"] == 8192


def test_experts_are_counted_wherever_the_config_names_them():
    for raw, count in (
        ({"ffn_config": {"moe_num_experts": 16}}, 16),
        ({"text_config": {"num_experts": 8}}, 8),
        ({}, 0),
    ):
        assert Model(None, raw, None, None).experts == count


def test_a_mixture_of_experts_is_simulated_and_said_to_be_one(estimate, as_json, tmp_path):
    Qwen3MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256, num_experts=4, num_experts_per_tok=2,
        architectures=["Qwen3MoeForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    options = ("--model", tmp_path, "--targets", "attention", "--max-length", 128)
    lora, qlora = as_json(*options), as_json(*options, "--qlora")
    experts = 2 * 4 * 3 * 64 * 32
    assert lora["total_parameters"] == qlora["total_parameters"] > experts
    assert qlora["parts_bytes"]["frozen weights"] > 2 * experts, "experts stay in 16 bits"
    assert any("mixture of 4 experts" in note for note in lora["warnings"])
    assert_refused(estimate(*options, "--fast"), ExitCode.ENVIRONMENT, "closed form", "qwen3_moe")


def test_gpt2_whose_names_and_layers_are_its_own_is_estimated(as_json, tmp_path):
    GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=256, n_positions=128, architectures=["GPT2LMHeadModel"]
    ).save_pretrained(tmp_path)
    report = as_json("--model", tmp_path, "--qlora", "--r", 4, "--gpu", "l4")
    assert report["run"]["tokens"] == 128
    assert report["trained_parameters"] == 2 * 4 * ((64 + 192) + (64 + 64) + (64 + 256) + (256 + 64))
    assert report["largest"]["max_length"] == 128


# ---------------------------------------------------------------- the table of cards
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


def test_the_computers_own_memory_and_the_disk_are_told(as_json, estimate, llama_7b):
    options = ("--model", llama_7b, "--fast", "--gradient-checkpointing", "on")
    qlora, bf16, full = (
        as_json(*options, *more)["computer_bytes"] for more in (("--qlora",), ("--dtype", "bf16"), ("--full",))
    )
    assert qlora["loading"] == 2 * 32000 * 4096, "one tensor at a time"
    assert bf16["loading"] > 2 * 6.7e9, "the config does not say the format of the files: all of it may have to be cast"
    assert full["saving"] == 3 * 4 * 6_738_415_616 and full["needed"] > full["saving"]
    told = estimate(*options, "--qlora").stdout
    assert "CPU memory" in told and "2 checkpoints of" in told


def test_weights_already_in_the_runs_format_are_not_copied(as_json, llama_7b, tmp_path):
    config = json.loads((llama_7b / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    same, other = (
        as_json("--model", tmp_path, "--fast", "--dtype", each)["computer_bytes"] for each in ("bf16", "fp16")
    )
    assert other["loading"] - same["loading"] == 2 * 6_738_415_616


def test_paged_states_are_on_the_disk_too(as_json, llama_7b):
    found = [as_json("--model", llama_7b, "--fast", "--optimizer", each) for each in ("adamw-8bit", "paged-adamw-8bit")]
    assert found[0]["disk_bytes"] == found[1]["disk_bytes"]
    assert found[1]["computer_bytes"]["waiting"] == 2 * found[1]["trained_parameters"]


def test_the_settings_of_a_run_from_scratch_are_estimated_as_such(as_json, estimate, small, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(f'[train]\ninit = "{small}"\nqlora = false\nmax_length = 64\n')
    found, full = as_json("--config", config), as_json("--model", small, "--full", "--max-length", 64)
    assert found["run"]["method"] == "full" and found["allocated_bytes"] == full["allocated_bytes"]
    config.write_text('[train]\nobjective = "classify"\n')
    assert_refused(estimate("--config", config), ExitCode.ENVIRONMENT, f"{config}:2", "--dry-run")


def test_the_largest_batch_is_found_where_guesses_are_refused(monkeypatch):
    """Every guess along the line is too large; one row is not."""
    taken = {count: 10 if count == 1 else 1000 for count in range(100)}
    monkeypatch.setattr(estimate_search, "process_bytes", lambda estimate, gpu: estimate)
    monkeypatch.setattr(estimate_search, "guessed", lambda *_: lambda count: count)
    estimates = SimpleNamespace(is_described=lambda *_: False, exact=lambda count, gpu: taken[count])
    gpu = SimpleNamespace(usable_bytes=60, margin_bytes=10)
    assert estimate_search.most(estimates, lambda count: count, 64, gpu) == 1
