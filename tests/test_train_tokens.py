"""`ftkit train --add-tokens`: new tokens get rows in the embeddings, which are trained; no other row changes."""

import json

import pytest
import torch
from conftest import assert_refused, save_tiny_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_resume import made
from train_shell import run_train, without_lora, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ftkit import faults
from ftkit.errors import ExitCode
from ftkit.io.card import read_card
from ftkit.io.new_tokens import add_new_tokens, appended_tokens, read_token_file

TOKENS = ["Lily", "<sum>", "very happy"]
RUN = ["train.jsonl", "--add-tokens", "tokens.txt", "--steps", 8, "--batch", 8, "--r", 4, "--lr", 0.01, "--run", "run"]
WAYS = {
    "lora": ("untied", ["--dtype", "fp32"], 2),
    "tied, dora": ("tied", ["--dtype", "fp32", "--dora"], 1),
    "qlora": ("untied", ["--qlora"], 2),
    "padded vocabulary": ("padded", ["--dtype", "fp32"], 2),
}
"""(model, options, embeddings that hold the new rows)."""
ROWS = [
    {"prompt": f"Tell me of {name} and the {thing}.\n", "completion": f"<sum> {name} had a {thing}, very happy."}
    for name in ("Lily", "Tom", "Ben", "Sue")
    for thing in ("ball", "cat", "dog", "tree", "hat")
]


@pytest.fixture(scope="module")
def first(tiny_model):
    """The id that the first new token gets."""
    return len(AutoTokenizer.from_pretrained(tiny_model))


@pytest.fixture(scope="module")
def models(tiny_model, first, tmp_path_factory):
    """Folders with a tiny Llama: head of its own, tied head, more rows than its tokenizer has tokens."""

    def made(name, tied):
        folder = tmp_path_factory.mktemp("models") / name
        save_tiny_tokenizer(folder)
        torch.manual_seed(1)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=first, max_position_embeddings=512, tie_word_embeddings=tied, bos_token_id=None,
                             eos_token_id=0, initializer_range=0.3, **sizes)  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        return folder

    return {"untied": made("untied", False), "tied": made("tied", True), "padded": tiny_model}


def prepare(place):
    write_rows(place / "train.jsonl", ROWS)
    (place / "tokens.txt").write_text("".join(f"{token}\n" for token in TOKENS))


@pytest.fixture(scope="module")
def runs(models, first, tmp_path_factory):
    """name of a way -> folder of its run, each made once."""
    known = {}

    def run(way):
        if way not in known:
            place = tmp_path_factory.mktemp("way")
            prepare(place)
            faults.forget()
            model, options, _ = WAYS[way]
            result = run_train(*RUN, *options, "--model", models[model], cwd=place)
            assert result.exit_code == 0, result.stderr
            assert f"new tokens: 3, ids {first} to {first + 2}" in result.stderr
            known[way] = place / "run"
        return known[way]

    return run


def base_with_rows(folder, rows):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_new_tokens_are_all_that_the_adapter_holds_of_the_embeddings(way, runs, first):
    tensors = load_file(runs(way) / "adapter" / "adapter_model.safetensors")
    rows = {name: value for name, value in tensors.items() if "lora_" not in name}
    assert len(rows) == WAYS[way][2]
    assert all(name.endswith("trainable_tokens_delta") and value.shape == (3, 32) for name, value in rows.items())
    card = read_card(runs(way) / "adapter")
    assert card.added_tokens == TOKENS and card.vocabulary == (512 if "padded" in way else first + 3)
    assert len(AutoTokenizer.from_pretrained(runs(way) / "adapter")) == first + 3


@pytest.mark.parametrize("way", WAYS)
def test_merge_changes_no_other_row_to_the_bit(way, runs, models, first, run_here):
    folder = runs(way)
    result = run_here("merge", "run", "--dtype", "fp32", cwd=folder.parent)
    assert result.exit_code == 0, result.stderr
    base = AutoModelForCausalLM.from_pretrained(models[WAYS[way][0]], dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    for kind, name in (("get_input_embeddings", "embed_tokens"), ("get_output_embeddings", "lm_head")):
        before, after = (getattr(model, kind)().weight for model in (base, merged))
        new, behind = slice(first, first + 3), slice(first + 3, None)
        assert torch.equal(before[:first], after[:first]) and torch.equal(before[behind], after[behind])
        owner = name if WAYS[way][2] == 2 else "embed_tokens"
        (trained,) = (value for key, value in tensors.items() if f".{owner}.token_adapter" in key)
        assert torch.equal(after[new], trained.float())
    assert merged.config.vocab_size == len(merged.get_input_embeddings().weight)


@pytest.mark.parametrize("way", WAYS)
def test_eval_has_the_losses_that_training_measured(way, runs, run_here):
    """Of the base too: the new rows that it is given are those that training began with."""
    folder = runs(way)
    info = json.loads((folder / "run.json").read_text())
    result = run_here("eval", "--run", "run", "--metrics", "loss", "--baseline", "--json", "-o", "p", cwd=folder.parent)
    scores, tolerance = json.loads(result.stdout), 2e-2 if "qlora" in way else 1e-4
    assert info["valid_loss"] < info["valid_loss_before"] and info["added_tokens"] == TOKENS
    assert scores["scores"]["loss"] == pytest.approx(info["valid_loss"], rel=tolerance)
    assert scores["baseline"]["loss"] == pytest.approx(info["valid_loss_before"], rel=tolerance)


@pytest.mark.parametrize("way", ["lora", "tied, dora"])
def test_a_stopped_run_ends_with_the_same_bytes(way, runs, models, tmp_path, monkeypatch):
    prepare(tmp_path)
    model, options, _ = WAYS[way]
    for fault, status in (("step:term:3", ExitCode.STOPPED), ("", ExitCode.OK)):
        faults.forget()
        monkeypatch.setenv("FTKIT_FAULT", fault)
        assert run_train(*RUN, *options, "--model", models[model], cwd=tmp_path).exit_code == status
    assert made(tmp_path / "run") == made(runs(way))


@pytest.mark.parametrize("way", ["lora", "tied, dora"])
def test_peft_opens_it_on_a_resized_base_and_gives_the_same_logits_as_the_merged_model(
    way, runs, models, first, run_here
):
    folder = runs(way)
    theirs = PeftModel.from_pretrained(base_with_rows(models[WAYS[way][0]], first + 3), folder / "adapter").eval()
    assert run_here("merge", "run", "-o", "again", "--dtype", "fp32", cwd=folder.parent).exit_code == 0
    merged = AutoModelForCausalLM.from_pretrained(folder.parent / "again", dtype=torch.float32)
    ids = torch.tensor([[5, first, 200, first + 2, 7]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["lora", "tied, dora"])
def test_as_many_are_trained_as_peft_counts_and_as_are_foretold(way, runs, models, first, run_here):
    folder, (model, options, _) = runs(way), WAYS[way]
    base = base_with_rows(models[model], first + 3)
    rows = [first, first + 1, first + 2]
    tokens = {"model.embed_tokens": rows} if model == "tied" else {"model.embed_tokens": rows, "lm_head": rows}
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora="--dora" in options)
    config.trainable_token_indices = tokens
    expected = get_peft_model(base, config).get_nb_trainable_parameters()[0]
    assert json.loads((folder / "run.json").read_text())["trainable"] == expected
    estimate = ["--add-tokens", "tokens.txt", "--r", 4, "--batch", 8, *options, "--json"]
    result = run_here("estimate-memory", "--model", models[model], *estimate, cwd=folder.parent)
    assert json.loads(result.stdout)["trained_parameters"] == expected, result.stderr


def test_chat_speaks_with_them_and_nothing_of_another_vocabulary_joins(runs, models, run_here):
    place = runs("lora").parent
    result = run_here("chat", "run", "-p", "Tell me of Lily and the cat.\n", "--max-new", 4, cwd=place)
    assert result.exit_code == 0 and result.stdout, result.stderr
    plain = [argument for argument in RUN if argument not in ("--add-tokens", "tokens.txt", "run")]
    run_train(*plain, "plain", "--dtype", "fp32", "--model", models["untied"], cwd=place)
    assert_refused(
        run_here("chat", "run", "plain", "-p", "a", cwd=place), ExitCode.MODEL, "vocabularies differ (--add-tokens)"
    )


def test_full_training_saves_a_larger_model_and_goes_on_with_it(models, first, tmp_path, monkeypatch, run_here):
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    for folder, stops in zip(folders, ([""], ["step:term:3", ""]), strict=True):
        folder.mkdir()
        prepare(folder)
        for fault in stops:
            faults.forget()
            monkeypatch.setenv("FTKIT_FAULT", fault)
            result = run_train(*without_lora(RUN), "--full", "--model", models["untied"], cwd=folder)
    assert result.exit_code == 0, result.stderr
    assert made(folders[0] / "run") == made(folders[1] / "run")
    assert len(AutoTokenizer.from_pretrained(folders[0] / "run" / "model")) == first + 3
    assert run_here("eval", "--run", "run", "--metrics", "loss", cwd=folders[0]).exit_code == 0


def test_a_new_row_begins_as_the_mean_of_what_the_text_was_before(tiny_model, first):
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)
    pieces = tokenizer("Lily", add_special_tokens=False).input_ids
    before = model.get_input_embeddings().weight.detach().clone()
    add_new_tokens(tokenizer, ["Lily"], "tokens.txt").give_rows(model)
    assert tokenizer("a Lily", split_special_tokens=True).input_ids[-1] == first
    after = model.get_input_embeddings().weight
    torch.testing.assert_close(after[first], before[pieces].mean(0))
    assert torch.equal(after[:first], before[:first])


@pytest.mark.parametrize("name", ["stories260k", "tinystories-chat-3m"])
def test_text_with_new_tokens_comes_back_from_real_tokenizers(name, shared):
    tokenizer, text = AutoTokenizer.from_pretrained(shared / "models" / name), "a <sum> of glorbix, x<sum>y glorbix"
    new = add_new_tokens(tokenizer, ["<sum>", "glorbix"], "tokens.txt")
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert tokenizer.decode(ids).strip() == text and set(new.ids) <= set(ids)
    assert new.count_used([ids]) == 2 and appended_tokens(["a", "b"], 512).ids == (512, 513)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["tokens.txt: empty"]),
        ("<sum>\nnew\n<sum>\n", ["tokens.txt:3: '<sum>' is in line 1 already"]),
        ("<sum>\n\n", ["tokens.txt:2: an empty line"]),
        (" glorbix\n", ["tokens.txt:1: ' glorbix' has a space"]),
        ("<sum>\n<|im_end|>\n", ["tokens.txt:2: the tokenizer has '<|im_end|>' as one token already"]),
        (b"\xff\xfe<", ["tokens.txt: not UTF-8"]),
        (None, ["tokens.txt: No such file"]),
    ],
)
def test_a_line_that_is_no_new_token_has_an_address(content, words, tiny_model, tmp_path):
    write_rows(tmp_path / "train.jsonl")
    if content is not None:
        (tmp_path / "tokens.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    result = run_train(*RUN, "--model", tiny_model, cwd=tmp_path)
    assert_refused(result, ExitCode.DATA, *words)


def test_a_file_from_windows_is_read_as_it_is_meant(tmp_path):
    (tmp_path / "tokens.txt").write_bytes("\ufeff<sum>\r\nvery happy\r\n".encode())
    assert read_token_file(str(tmp_path / "tokens.txt")) == ["<sum>", "very happy"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "ia3"], ["the method is ia3", "--full"]),
        (["--train-layers", "last:1"], ["the method is --train-layers", "--lora or --full"]),
        (["--init", "."], ["--add-tokens is for a trained model"]),
        (["--targets", "all-linear,lm_head"], ["lm_head gets trained rows", "--targets all-linear"]),
    ],
)
def test_methods_that_cannot_train_rows_are_refused(options, words, tiny_model, tmp_path):
    prepare(tmp_path)
    run = RUN if "--targets" in options else without_lora(RUN)
    assert_refused(run_train(*run, *options, "--model", tiny_model, cwd=tmp_path), ExitCode.USAGE, *words)


def test_tokens_that_no_row_holds_are_warned_of(tiny_model, tmp_path):
    prepare(tmp_path)
    (tmp_path / "tokens.txt").write_text("Lily\nglorbix\n")
    result = run_train(*RUN, "--dry-run", "--model", tiny_model, cwd=tmp_path)
    assert result.exit_code == 0 and "1 of 2 new tokens are in no row to train" in result.stderr


def test_a_dry_run_counts_the_rows_too(runs, models, tmp_path):
    trainable = json.loads((runs("lora") / "run.json").read_text())["trainable"]
    prepare(tmp_path)
    result = run_train(*RUN, "--dry-run", "--model", models["untied"], cwd=tmp_path)
    assert f"trains {trainable:,} of" in result.stderr, result.stderr
