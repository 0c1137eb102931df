"""`ftkit train` end to end: rows in, a run folder out that PEFT and transformers take as it is."""

import contextlib
import hashlib
import io
import json
import shutil
import tomllib

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from train_shell import NAMES, QUICK, ROWS, THINGS, files_in, jsonl, run_train, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoConfig, GPTNeoForCausalLM

from ftkit.commands.train import load
from ftkit.commands.train_plan import prepare
from ftkit.core.loss import summed_loss
from ftkit.core.optimizers import make_optimizer
from ftkit.core.packed_attention import packed_attention
from ftkit.core.train_settings import TrainSettings
from ftkit.core.training import begin_training, train_steps
from ftkit.errors import ExitCode
from ftkit.io.atomic import check_manifest, sha256_of_file
from ftkit.io.card import read_card
from ftkit.io.template_files import load_template


@pytest.fixture
def train(tmp_path):
    """run_train in tmp_path, which holds train.jsonl."""
    write_rows(tmp_path / "train.jsonl")
    return lambda *arguments, cwd=tmp_path, stdin="": run_train(*arguments, cwd=cwd, stdin=stdin)


@pytest.fixture
def trained(train, tmp_path):
    """A run that went well: its folder, and what run.json says."""

    def run(*arguments):
        result = train(*arguments)
        assert result.exit_code == 0, result.stderr
        folder = tmp_path / result.stdout.strip()
        return folder, json.loads((folder / "run.json").read_text())

    return run


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """(working folder, what the shell saw) of one LoRA run; tests only look at it."""
    place = tmp_path_factory.mktemp("finished")
    write_rows(place / "train.jsonl")
    return place, run_train("train.jsonl", "--model", tiny_model, *QUICK, cwd=place)


@pytest.fixture(scope="module")
def run_folder(finished):
    place, result = finished
    assert result.exit_code == 0, result.stderr
    return place / result.stdout.strip()


# ---------------------------------------------------------------- what a run leaves behind
def test_stdout_is_the_path_of_the_run_and_nothing_else(finished):
    place, result = finished
    assert (
        result.stdout.count("\n") == 1
        and result.stdout.startswith("runs/")
        and (place / result.stdout.strip()).is_dir()
    )
    assert sorted(path.name for path in place.iterdir()) == ["runs", "train.jsonl"]
    assert (place / "runs" / "latest").read_text().strip() == result.stdout.strip().removeprefix("runs/")


def test_the_plan_and_a_marked_example_are_shown_before_the_first_step(finished):
    _, result = finished
    assert (
        "rows: 32 to train, 8 held out" in result.stderr
        and "4 steps of 4 rows (packs of 8,192 tokens)" in result.stderr
    )
    assert "trains 4,096 of 55,456 parameters" in result.stderr
    prompt, _, rest = result.stderr.partition("first example, trained tokens marked:\n")[2].partition("⟦")
    answer = rest.partition("⟧")[0]
    assert prompt.startswith("Tell me of") and answer.endswith("was very happy.<|endoftext|>")


def test_run_json_says_all_that_decided_the_run(run_folder, tiny_model):
    info = json.loads((run_folder / "run.json").read_text())
    assert info["schema"] == "ftkit.run/1" and info["status"] == "complete"
    assert info["data"]["path"] == "train.jsonl" and info["data"]["rows"] == 40 and info["data"]["held_out"] == 8
    assert info["model"]["id"] == info["model"]["location"] == str(tiny_model)
    assert (info["trainable"], info["parameters"], info["steps"]) == (4_096, 55_456, 4)
    assert info["settings"]["seed"] == 42 and info["settings"]["lr"] == 0.01
    assert info["plan"]["micro_batch"] == 4 and info["dtype"] == "fp32" and info["device"] == "cpu"
    assert info["measured_peak_bytes"] > 1e6 and info["tokens_per_second"] > 0
    assert set(info["versions"]) >= {"ftkit", "python", "torch", "transformers", "peft", "bitsandbytes"}


def test_metrics_have_a_line_for_each_step_and_the_held_out_loss_around_them(run_folder):
    lines = jsonl(run_folder / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(
        set(line) >= {"epoch", "loss", "lr", "grad_norm", "tokens", "counted", "seconds", "tokens_per_second"}
        for line in steps
    )
    assert (
        [line["step"] for line in lines if "valid_loss" in line] == [0, 4]
        and "valid_loss" in lines[0]
        and "valid_loss" in lines[-1]
    )
    info = json.loads((run_folder / "run.json").read_text())
    assert (info["first_loss"], info["last_loss"]) == (steps[0]["loss"], steps[-1]["loss"])
    assert (info["valid_loss_before"], info["valid_loss"]) == (lines[0]["valid_loss"], lines[-1]["valid_loss"])


def test_held_out_rows_are_kept_and_are_not_trained(run_folder, finished, tiny_model):
    held = jsonl(run_folder / "valid.jsonl")
    assert len(held) == 8 and all(row in ROWS for row in held)
    prepared = prepared_again(finished, tiny_model)
    encoded = [prepared.encoder.example(row) for row in held]
    assert prepared.valid_examples == encoded and not any(example in prepared.examples for example in encoded)
    assert len(prepared.examples) == 32


def prepared_again(finished, tiny_model):
    """What the finished run had before it loaded weights."""
    with contextlib.chdir(finished[0]), contextlib.redirect_stderr(io.StringIO()):
        return prepare(
            TrainSettings(data="train.jsonl", model=str(tiny_model), steps=4, batch=4, r=4, lr=0.01, dtype="fp32")
        )


def test_the_adapter_folder_is_whole_and_says_what_it_is(run_folder, tiny_model):
    adapter = run_folder / "adapter"
    check_manifest(adapter)
    tokenizer_files = {"tokenizer.json", "tokenizer_config.json"}
    own = {"adapter_model.safetensors", "adapter_config.json", "ftkit.json", "README.md", "manifest.json"}
    assert {path.name for path in adapter.iterdir()} == own | tokenizer_files
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model) and config["r"] == 4 and config["peft_type"] == "LORA"
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    card = read_card(adapter)
    assert (card.base, card.method, card.objective, card.dtype, card.max_length) == (
        str(tiny_model),
        "lora",
        "sft",
        "fp32",
        512,
    )
    assert card.stop_tokens == [0] and card.template.name == "completion" and card.quantized_sha256 == {}
    assert {value.dtype for value in load_file(adapter / "adapter_model.safetensors").values()} == {torch.float32}


def test_peft_loads_the_adapter_and_gives_the_logits_that_training_ended_with(run_folder, finished, tiny_model):
    ids = torch.tensor([[5, 9, 300, 17, 41, 260]])
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), run_folder / "adapter").eval()
    prepared = prepared_again(finished, tiny_model)
    model = load(prepared)
    optimizer = make_optimizer(model, "adamw", 0.01, 0.0)
    steps = train_steps(model, begin_training(model, optimizer, prepared.plan), prepared.examples, summed_loss, "cpu")
    with packed_attention(model):
        losses = [step.loss for step in steps]
    assert losses == [line["loss"] for line in jsonl(run_folder / "metrics.jsonl") if "loss" in line]
    with torch.no_grad():
        assert torch.equal(tuned(ids).logits, model.eval()(input_ids=ids).logits)
        with tuned.disable_adapter():
            assert not torch.allclose(tuned(ids).logits, model(input_ids=ids).logits, atol=1e-3)
    saved, own = (AutoTokenizer.from_pretrained(folder) for folder in (run_folder / "adapter", tiny_model))
    assert saved("a<|im_end|>b").input_ids == own("a<|im_end|>b").input_ids  # encoding rows left it as it was


# ---------------------------------------------------------------- again, and the same
def test_another_process_writes_the_same_bytes(run_folder, ftkit, tmp_path, tiny_model):
    write_rows(tmp_path / "train.jsonl")
    result = ftkit("train", "train.jsonl", "--model", tiny_model, *QUICK)
    assert result.exit_code == 0, result.stderr
    ours, theirs = files_in(run_folder / "adapter"), files_in(tmp_path / result.stdout.strip() / "adapter")
    digests = [hashlib.sha256(files["adapter_model.safetensors"]).hexdigest() for files in (ours, theirs)]
    assert digests[0] == digests[1]
    assert ours == theirs  # the order of PEFT's settings too, which is a set's


def test_the_same_command_again_prints_the_same_path_and_trains_nothing(finished, run_folder, tiny_model):
    place, first = finished
    before = files_in(run_folder)
    again = run_train("train.jsonl", "--model", tiny_model, *QUICK, cwd=place)
    assert (again.exit_code, again.stdout) == (0, first.stdout) and "already trained" in again.stderr
    as_json = run_train("train.jsonl", "--model", tiny_model, *QUICK, "--json", cwd=place)
    assert json.loads(as_json.stdout)["path"] == first.stdout.strip()
    assert json.loads(as_json.stdout)["status"] == "complete"
    assert files_in(run_folder) == before and len(list((place / "runs").glob("*/"))) == 1


def test_config_toml_repeats_the_run_to_the_byte(run_folder, finished, train, tmp_path):
    place, first = finished
    config = run_folder / "config.toml"
    resolved = tomllib.loads(config.read_text())["train"]
    names = ("micro_batch", "micro_tokens", "pack", "share_prefix", "lr", "dtype", "objective")
    assert [resolved[name] for name in names] == ["4", "8192", "on", "on", 0.01, "fp32", "sft"]
    known = run_train("--config", config, cwd=place)
    assert (known.exit_code, known.stdout) == (0, first.stdout)  # where it was trained it is found, by its identity
    result = train("--config", config)
    assert result.exit_code == 0, result.stderr
    assert files_in(tmp_path / result.stdout.strip() / "adapter") == files_in(run_folder / "adapter")


@pytest.mark.parametrize(
    "change",
    [
        ["--seed", 43], ["--lr", 0.02], ["--alpha", 16], ["--batch", 8], ["--targets", "attention"],
        ["--pack", "off"], ["--share-prefix", "off"], ["--micro-tokens", 100], ["--micro-batch", 2],
    ],
)  # fmt: skip
def test_another_setting_is_another_run(finished, change, tiny_model):
    place, first = finished
    shown = run_train("train.jsonl", "--model", tiny_model, *QUICK, *change, "--dry-run", "--json", cwd=place)
    identity = json.loads((place / first.stdout.strip() / "run.json").read_text())["identity"]
    assert json.loads(shown.stdout)["identity"] != identity
    same = run_train("train.jsonl", "--model", tiny_model, *QUICK, "--dry-run", "--json", cwd=place)
    assert json.loads(same.stdout)["identity"] == identity


def test_other_held_out_rows_are_another_run(train, tmp_path, tiny_model):
    """The same file name with other rows: what it holds decides."""
    options = ["train.jsonl", "--model", tiny_model, "--valid", "held.jsonl", "--dry-run", "--json"]
    identities = []
    for rows in (ROWS[:3], ROWS[:3], ROWS[:4]):
        write_rows(tmp_path / "held.jsonl", rows)
        identities.append(json.loads(train(*options).stdout)["identity"])
    assert identities[0] == identities[1] != identities[2]


# ---------------------------------------------------------------- packs
def step_losses(folder):
    return [line["loss"] for line in jsonl(folder / "metrics.jsonl") if "loss" in line]


def test_packed_padded_shared_and_small_packs_train_the_same(trained, run_folder, tiny_model):
    ways = (["--pack", "off"], ["--share-prefix", "off"], ["--micro-tokens", 40], ["--pack", "off", "--micro-batch", 1])
    info = json.loads((run_folder / "run.json").read_text())
    assert info["plan"]["pack"] and info["plan"]["share_prefix"] and info["plan"]["micro_tokens"] == 8192
    for way in ways:
        folder, other = trained("train.jsonl", "--model", tiny_model, *QUICK, *way)
        assert step_losses(folder) == pytest.approx(step_losses(run_folder), rel=1e-5)
        assert other["valid_loss"] == pytest.approx(info["valid_loss"], rel=1e-5)


def test_rows_at_once_are_tokens_at_once_in_packs(train, tiny_model):
    """--micro-batch 1 makes a step small, packed or not."""
    shown = train("train.jsonl", "--model", tiny_model, *QUICK, "--micro-batch", 1, "--dry-run", "--json")
    plan = json.loads(shown.stdout)["plan"]
    longest = max(len(row["prompt"] + row["completion"]) for row in ROWS)
    assert plan["micro_batch"] == 1 and 10 < plan["micro_tokens"] <= longest + 1


def test_a_model_with_its_own_attention_is_trained_on_padded_rows_and_that_is_said(
    trained, train, tmp_path, tiny_model
):
    neo = tmp_path / "neo"
    shutil.copytree(tiny_model, neo, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 512}
    config = GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]], bos_token_id=None, eos_token_id=0)
    GPTNeoForCausalLM(config).save_pretrained(neo)
    folder, info = trained("train.jsonl", "--model", neo, *QUICK, "--run", "packed")
    assert info["plan"]["pack"] is False and info["settings"]["pack"] == "on"
    again = train("train.jsonl", "--model", neo, *QUICK, "--run", "second", "-q")
    assert again.exit_code == 0 and "padded" not in again.stderr
    padded, _ = trained("train.jsonl", "--model", neo, *QUICK, "--pack", "off")
    assert step_losses(folder) == step_losses(padded)
    said = train("train.jsonl", "--model", neo, *QUICK, "--run", "third").stderr
    assert said.count("rows are padded, not packed: GPTNeo: it brings its own attention") == 1
    assert "(4 at once)" in said


# ---------------------------------------------------------------- rows with weights
def test_a_weight_counts_in_training_and_not_in_the_held_out_loss(trained, tmp_path, tiny_model, run_folder):
    weighted = [{**row, "weight": 4 if "cat" in row["prompt"] else 0.5} for row in ROWS]
    write_rows(tmp_path / "weighted.jsonl", weighted)
    write_rows(tmp_path / "held.jsonl", ROWS[:4])
    write_rows(tmp_path / "held4.jsonl", [{**row, "weight": 4} for row in ROWS[:4]])
    same = [
        trained("weighted.jsonl", "--model", tiny_model, *QUICK, "--valid", held)[1]
        for held in ("held.jsonl", "held4.jsonl")
    ]
    assert same[0]["valid_loss_before"] == same[1]["valid_loss_before"]
    plain = trained("train.jsonl", "--model", tiny_model, *QUICK, "--valid", "held.jsonl")[1]
    assert plain["valid_loss_before"] == same[0]["valid_loss_before"]
    assert plain["valid_loss"] != same[0]["valid_loss"]


def test_prep_keeps_the_weights_of_rows(prep, tmp_path):
    write_rows(tmp_path / "weighted.jsonl", [{**row, "weight": 0.5} for row in ROWS[:3]])
    result = prep("weighted.jsonl")
    assert [json.loads(line)["weight"] for line in result.stdout.splitlines()] == [0.5] * 3


# ---------------------------------------------------------------- methods
METHODS = {
    "lora": ["--lora", "--lr", 5e-3, "--r", 8],
    "qlora": ["--qlora", "--lr", 5e-3, "--r", 8],
    "int8": ["--load-in-8bit", "--lr", 5e-3, "--r", 8],
    "full": ["--full", "--lr", 3e-3],
}


@pytest.mark.parametrize("method", list(METHODS))
def test_each_method_learns_on_a_real_model(method, trained, shared):
    base = shared / "models" / "stories260k"
    folder, info = trained("train.jsonl", "--model", base, *METHODS[method], "--steps", 25, "--batch", 4)
    losses = [line["loss"] for line in jsonl(folder / "metrics.jsonl") if "loss" in line]
    assert len(losses) == 25 and sum(losses[-5:]) < 0.4 * sum(losses[:5])
    assert info["valid_loss"] < 0.5 * info["valid_loss_before"]
    card = read_card(folder / ("model" if method == "full" else "adapter"))
    assert card.method == method and len(card.quantized_sha256) == (35 if method in ("qlora", "int8") else 0)
    assert (folder / "model").is_dir() == (method == "full") and (folder / "adapter").is_dir() != (method == "full")


def test_full_training_writes_a_model_that_transformers_takes(trained, tiny_model):
    folder, info = trained("train.jsonl", "--model", tiny_model, "--full", "--steps", 2, "--batch", 4)
    assert info["trainable"] == info["parameters"] and info["dtype"] == "fp32"
    check_manifest(folder / "model")
    before, after = (
        AutoModelForCausalLM.from_pretrained(tiny_model),
        AutoModelForCausalLM.from_pretrained(folder / "model"),
    )
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved) and AutoTokenizer.from_pretrained(folder / "model").eos_token == "<|endoftext|>"


def test_an_adapter_on_the_output_head_is_saved_without_the_bases_weights(trained, tiny_model):
    folder, _ = trained("train.jsonl", "--model", tiny_model, *QUICK, "--targets", "all-linear,lm_head")
    names = load_file(folder / "adapter" / "adapter_model.safetensors").keys()
    assert any("lm_head.lora_A" in name for name in names) and all(".lora_" in name for name in names)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder / "adapter")


def test_recomputing_activations_gives_the_same_adapter(trained, run_folder, tiny_model):
    folder, _ = trained("train.jsonl", "--model", tiny_model, *QUICK, "--gradient-checkpointing", "on")
    ours, theirs = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (folder, run_folder))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


def test_a_model_is_trained_from_scratch_on_plain_text(trained, tiny_model, tmp_path):
    scratch = tmp_path / "scratch"
    shutil.copytree(tiny_model, scratch, ignore=shutil.ignore_patterns("*.safetensors"))
    texts = [{"text": f"{row['prompt']}{row['completion']}"} for row in ROWS]
    write_rows(tmp_path / "text.jsonl", texts)
    options = [
        "text.jsonl",
        "--objective",
        "text",
        "--init",
        scratch,
        "--steps",
        12,
        "--batch",
        8,
        "--lr",
        0.01,
        "--max-length",
        24,
    ]
    folder, info = trained(*options)
    losses = [line["loss"] for line in jsonl(folder / "metrics.jsonl") if "loss" in line]
    assert info["settings"]["objective"] == "text" and losses[-1] < losses[0] - 1
    assert info["data"]["counted"] == info["data"]["tokens"] - info_pieces(info, texts, tiny_model)
    AutoModelForCausalLM.from_pretrained(folder / "model")
    recomputed, _ = trained(*options, "--gradient-checkpointing", "on", "--run", "recomputed")
    assert [line["loss"] for line in jsonl(recomputed / "metrics.jsonl") if "loss" in line] == pytest.approx(
        losses, rel=1e-4
    )


def info_pieces(info, texts, tokenizer_folder):
    """How many pieces of at most 24 tokens the texts make; the first token of each is context only."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    lengths = [len(tokenizer(row["text"]).input_ids) + 1 for row in texts]
    return sum(-(-(length - 1) // 23) for length in lengths)


def test_a_run_from_scratch_can_recompute_activations(train, tmp_path, tiny_model):
    with contextlib.chdir(tmp_path), contextlib.redirect_stderr(io.StringIO()):
        write_rows(tmp_path / "text.jsonl", [{"text": "one two three"}, {"text": "four"}])
        model = load(prepare(TrainSettings(data="text.jsonl", init=str(tiny_model), gradient_checkpointing="on")))
    assert model.is_gradient_checkpointing and all(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------- options
def test_a_dry_run_checks_everything_loads_no_weights_and_writes_nothing(train, tmp_path, tiny_model, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a dry run loads no weights")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    before = files_in(tmp_path)
    result = train("train.jsonl", "--model", tiny_model, *QUICK, "--dry-run")
    assert (result.exit_code, result.stdout) == (0, "") and files_in(tmp_path) == before
    assert (
        "4 steps of 4 rows" in result.stderr
        and "trains 4,096 of 55,456 parameters" in result.stderr
        and "⟦" in result.stderr
    )
    planned = json.loads(train("train.jsonl", "--model", tiny_model, *QUICK, "--dry-run", "--json").stdout)
    assert planned["schema"] == "ftkit.run/1" and planned["status"] == "planned" and planned["plan"]["steps"] == 4
    for wrong, code in (
        (["--targets", "q_prj"], ExitCode.MODEL),
        (["--r", 99], ExitCode.USAGE),
        (["--full", "--dtype", "fp16"], ExitCode.USAGE),
    ):
        for dry in (["--dry-run"], []):  # before anything is loaded or written
            assert train("train.jsonl", "--model", tiny_model, *wrong, *dry).exit_code == code
    assert files_in(tmp_path) == before


def test_json_is_one_object_with_all_of_run_json(train, tmp_path, tiny_model):
    result = train("train.jsonl", "--model", tiny_model, *QUICK, "--json")
    assert result.exit_code == 0 and result.stdout.count("\n") == 1
    shown = json.loads(result.stdout)
    folder = tmp_path / shown.pop("path")
    assert shown == json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize("argument", [["-"], []])
def test_rows_come_from_stdin_and_are_counted(argument, trained, train, run_folder, tmp_path, tiny_model):
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    result = train(*argument, "--model", tiny_model, *QUICK, stdin=rows)
    assert result.exit_code == 0 and "40 rows from stdin" in result.stderr
    adapter = tmp_path / result.stdout.strip() / "adapter"
    assert sha256_of_file(adapter / "adapter_model.safetensors") == sha256_of_file(
        run_folder / "adapter" / "adapter_model.safetensors"
    )


def test_quiet_leaves_the_path_only(train, tiny_model):
    result = train("train.jsonl", "--model", tiny_model, *QUICK, "-q")
    assert result.exit_code == 0 and result.stdout.startswith("runs/") and result.stderr == ""


def test_valid_zero_trains_every_row(trained, tiny_model):
    folder, info = trained("train.jsonl", "--model", tiny_model, *QUICK, "--valid", 0)
    assert info["data"]["held_out"] == 0 and info["valid_loss"] is None and (folder / "valid.jsonl").read_text() == ""
    assert not any("valid_loss" in line for line in jsonl(folder / "metrics.jsonl"))


def test_valid_takes_a_file_and_then_trains_all_rows_of_the_data(trained, tmp_path, tiny_model):
    held = [{"prompt": "Tell me of Zoe.\n", "completion": "Zoe had a kite."}] * 2
    write_rows(tmp_path / "held.jsonl", held)
    folder, info = trained(
        "train.jsonl", "--model", tiny_model, "--valid", "held.jsonl", "--epochs", 1, "--batch", 8, "--r", 2
    )
    assert jsonl(folder / "valid.jsonl") == held and info["data"]["held_out"] == 2
    assert info["steps"] == 5 and info["valid_loss"] < info["valid_loss_before"]  # 40 rows, 8 at a time


def test_held_out_rows_that_are_trained_or_too_long_are_said(train, tmp_path, tiny_model):
    write_rows(tmp_path / "held.jsonl", [ROWS[3], ROWS[5], {"prompt": "Tell me.\n", "completion": "word " * 600}])
    shown = train("train.jsonl", "--model", tiny_model, "--valid", "held.jsonl", "--dry-run", "--json")
    assert "held.jsonl: 2 of 3 rows are in the training data too" in shown.stderr
    assert "held.jsonl: of 3 rows, beyond 512 tokens: 1 dropped" in shown.stderr
    assert json.loads(shown.stdout)["data"]["held_out"] == 2


def test_all_pieces_of_a_long_text_are_on_one_side(trained, tmp_path, tiny_model):
    texts = [{"text": " ".join(f"{name} had a {thing}." for thing in THINGS)} for name in [*NAMES, "Ann", "Joe", "Eve"]]
    write_rows(tmp_path / "text.jsonl", texts)
    folder, info = trained("text.jsonl", "--model", tiny_model, *QUICK, "--max-length", 16)
    assert info["data"]["held_out"] == 2 and info["data"]["rows"] == 8 and info["data"]["tokens"] > 8 * 16
    held = jsonl(folder / "valid.jsonl")
    assert len(held) == 2 and all(row in texts for row in held)


def test_conversations_are_trained_with_the_template_that_their_rows_name(trained, tmp_path, tiny_model):
    chatml = load_template("chatml")
    turns = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}] * 2
        for row in ROWS
    ]
    write_rows(tmp_path / "chats.jsonl", [{"messages": messages, "template": chatml.fingerprint} for messages in turns])
    folder, info = trained("chats.jsonl", "--model", tiny_model, *QUICK)
    card = read_card(folder / "adapter")
    assert card.template == chatml and card.stop_tokens == [0, 2] and info["template"] == chatml.fingerprint
    assert info["data"]["untrained_turns"] == 0 and info["last_loss"] < info["first_loss"]


def test_steps_that_float16_skips_are_said_and_counted(train, tmp_path):
    asked = ["--steps", 2, "--batch", 4, "--dtype", "fp16"]
    result = train("train.jsonl", "--model", "builtin:tiny", *asked, "--run", "half")
    assert result.exit_code == 0 and "2 of 2 steps changed nothing" in result.stderr, result.stderr
    info = json.loads((tmp_path / "half" / "run.json").read_text())
    assert info["skipped_steps"] == 2 and info["valid_loss"] == info["valid_loss_before"]
    wide = train("train.jsonl", "--model", "builtin:tiny", *asked[:-1], "fp32", "--json")
    assert json.loads(wide.stdout)["skipped_steps"] == 0 and "changed nothing" not in wide.stderr


def test_documents_that_are_joined_train_the_same_tokens_in_fewer_rows(trained, tiny_model, tmp_path):
    texts = [{"text": f"{row['prompt']}{row['completion']}"} for row in ROWS]
    write_rows(tmp_path / "text.jsonl", texts)
    asked = ["text.jsonl", "--model", tiny_model, "--max-length", 64, "--valid", 0, "--batch", 4, "--lr", 0.01]
    alone, across = (trained(*asked, "--epochs", 2, *more) for more in ([], ["--across"]))
    assert alone[1]["data"]["counted"] == across[1]["data"]["counted"]
    assert 1 < across[1]["steps"] < alone[1]["steps"] and across[1]["last_loss"] < across[1]["first_loss"]
    counted = [sum(line["counted"] for line in jsonl(folder / "metrics.jsonl")) for folder, _ in (alone, across)]
    assert (
        counted[0] == 2 * alone[1]["data"]["counted"]
        and max(line["tokens"] for line in jsonl(across[0] / "metrics.jsonl")) <= 4 * 64
    )


def test_an_eight_bit_optimizer_trains_too(trained, tiny_model):
    folder, info = trained(
        "train.jsonl",
        "--model",
        tiny_model,
        "--full",
        "--optimizer",
        "adamw-8bit",
        "--steps",
        8,
        "--lr",
        3e-3,
        "--batch",
        4,
    )
    assert info["valid_loss"] < 0.8 * info["valid_loss_before"] and (folder / "model").is_dir()


def test_long_rows_are_dropped_and_counted(trained, train, tmp_path, tiny_model):
    rows = [
        *ROWS[:6],
        {"prompt": "Tell me.\n", "completion": "word " * 200},
        {"prompt": "long " * 200, "completion": "No."},
    ]
    write_rows(tmp_path / "mixed.jsonl", rows)
    result = train("mixed.jsonl", "--model", tiny_model, *QUICK, "--max-length", 100, "--valid", 0)
    info = json.loads((tmp_path / result.stdout.strip() / "run.json").read_text())
    assert "of 8 rows, beyond 100 tokens: 2 dropped" in result.stderr
    assert (info["data"]["rows"], info["data"]["dropped"], info["data"]["truncated"]) == (8, 2, 0)


def test_long_answers_are_cut_on_request_and_counted_with_what_must_be_dropped(train, tmp_path, tiny_model):
    rows = [
        *ROWS[:6],
        {"prompt": "Tell me.\n", "completion": "word " * 200},
        {"prompt": "long " * 200, "completion": "No."},
    ]
    write_rows(tmp_path / "mixed.jsonl", rows)
    result = train(
        "mixed.jsonl", "--model", tiny_model, *QUICK, "--max-length", 100, "--valid", 0, "--overlength", "truncate"
    )
    info = json.loads((tmp_path / result.stdout.strip() / "run.json").read_text())
    assert "1 dropped, 1 cut, so without a trained stop" in result.stderr
    assert (info["data"]["dropped"], info["data"]["truncated"]) == (1, 1)


def test_max_length_is_capped_to_the_context_and_said(train, tiny_model):
    shown = json.loads(train("train.jsonl", "--model", tiny_model, "--max-length", 4096, "--dry-run", "--json").stdout)
    assert shown["settings"]["max_length"] == 512
    assert (
        "--max-length 4096 is beyond the model's context"
        in train("train.jsonl", "--model", tiny_model, "--max-length", 4096, "--dry-run").stderr
    )
    assert "beyond" not in train("train.jsonl", "--model", tiny_model, "--max-length", 300, "--dry-run").stderr


def test_run_chooses_the_folder_and_keeps_it(trained, train, tmp_path, tiny_model):
    folder, _ = trained("train.jsonl", "--model", tiny_model, *QUICK, "--run", "mine")
    assert folder == tmp_path / "mine" and (folder / "adapter").is_dir()
    before = files_in(folder)
    again = train("train.jsonl", "--model", tiny_model, *QUICK, "--run", "mine")
    assert (again.exit_code, again.stdout) == (0, "mine\n")
    other = train("train.jsonl", "--model", tiny_model, *QUICK, "--seed", 1, "--run", "mine")
    assert other.exit_code == ExitCode.MODEL and "seed 42 -> 1" in other.stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("keep me")
    taken = train("train.jsonl", "--model", tiny_model, *QUICK, "--run", "full")
    assert taken.exit_code == ExitCode.EXISTS and files_in(tmp_path / "full") == {"notes.txt": b"keep me"}
    assert files_in(folder) == before


def test_turns_that_the_chat_template_hides_are_said_and_counted(train, tmp_path, tiny_model):
    """As Qwen3's, which shows an answer's thinking only while it is the last."""
    model = shutil.copytree(tiny_model, tmp_path / "thinker")
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [{"role": role, "content": f"{role} {number}"} for number in range(3) for role in ("user", "assistant")]
    write_rows(tmp_path / "chats.jsonl", [{"messages": turns}, {"messages": turns[:2]}])
    result = train("chats.jsonl", "--model", model, "--dry-run", "--valid", 0)
    assert result.exit_code == 0 and "chats.jsonl: 2 assistant turns are context only" in result.stderr


def test_a_run_that_diverges_is_not_complete_and_leaves_no_adapter(train, tmp_path, tiny_model):
    result = train("train.jsonl", "--model", tiny_model, "--steps", 9, "--alpha", "1e38", "--lr", 1)
    assert result.exit_code == ExitCode.DIVERGED and result.stdout == "" and "diverged" in result.stderr
    (info,) = (tmp_path / "runs").glob("*/run.json")
    assert json.loads(info.read_text())["status"] == "diverged" and not (info.parent / "adapter").exists()
    assert not (tmp_path / "runs" / "latest").exists()
