"""What was trained is opened only if it is whole, harmless and on the base it was trained on."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftkit.errors import ExitCode, UserError
from ftkit.io.adapter_folder import save_adapter
from ftkit.io.atomic import MANIFEST
from ftkit.io.base_model import config_sha256, find_base, load_tokenizer, load_weights, weights_sha256
from ftkit.io.card import Card
from ftkit.io.run_folder import COMPLETE, RunFolder
from ftkit.io.trained import load_trained, open_trained, put_adapter, without_adapter

PROMPT = torch.tensor([[40, 41, 42, 43]])


@pytest.fixture(scope="module")
def base_folder(tiny_model, tmp_path_factory):
    """A base of our own, to be changed by a test without harm to others."""
    return shutil.copytree(tiny_model, tmp_path_factory.mktemp("base") / "tiny")


def adapted(folder, **options):
    """The base with an adapter whose weights are random, so that it changes the model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = load_weights(find_base(str(folder)), dtype=torch.float32, device="cpu")
    model = get_peft_model(
        model, LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def made(base_folder, tmp_path_factory):
    """An adapter as train writes it, and the logits of the model that it was written from."""
    folder = tmp_path_factory.mktemp("made") / "adapter"
    base, model = find_base(str(base_folder)), adapted(base_folder)
    card = Card(
        base=base.name,
        base_location=base.location,
        base_revision=None,
        base_config_sha256=config_sha256(base),
        base_weights_sha256=weights_sha256(base),
        method="lora",
        objective="sft",
        dtype="fp32",
        max_length=64,
    )
    with torch.no_grad():
        logits = model(PROMPT).logits
    save_adapter(folder, model, load_tokenizer(base), card)
    return folder, logits


@pytest.fixture
def adapter(made, tmp_path):
    """A copy to damage."""
    return shutil.copytree(made[0], tmp_path / "adapter")


@pytest.fixture
def foreign(made, tmp_path):
    """The same adapter as another tool would leave it: no card, no manifest."""
    folder = shutil.copytree(made[0], tmp_path / "foreign")
    (folder / "ftkit.json").unlink()
    (folder / MANIFEST).unlink()
    return folder


def change_config(folder, **changes):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def refused(work, *arguments):
    with pytest.raises(UserError) as error:
        work(*arguments)
    assert error.value.exit_code == ExitCode.MODEL
    assert error.value.hint and "\n" not in error.value.message
    return error.value.message


def use(folder):
    return load_trained(open_trained(str(folder)), "cpu")


# what opens


def test_an_adapter_of_ours_gives_the_logits_it_was_saved_with(made):
    loaded = use(made[0])
    with torch.no_grad():
        assert torch.equal(loaded.model(PROMPT).logits, made[1])
        with without_adapter(loaded.model) as base:
            assert not torch.equal(base(PROMPT).logits, made[1])
    assert loaded.context == 512 and loaded.card.max_length == 64 and not loaded.model.training


def test_an_adapter_of_another_tool_gives_the_same(foreign, made):
    loaded = use(foreign)
    with torch.no_grad():
        assert torch.allclose(loaded.model.float()(PROMPT).logits, made[1], atol=0.1)  # in the device's own format
    assert loaded.card is None


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"trainable_token_indices": [1, 2]},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_kind_of_lora_that_peft_writes_lands_whole(base_folder, tmp_path, options):
    model = adapted(base_folder, **options)
    with torch.no_grad():
        logits = model(PROMPT).logits
    model.save_pretrained(tmp_path)
    base = load_weights(find_base(str(base_folder)), dtype=torch.float32, device="cpu")
    with torch.no_grad():
        assert torch.equal(put_adapter(base, tmp_path).eval()(PROMPT).logits, logits)


def test_a_whole_model_opens_by_its_folder(tiny_model):
    trained = open_trained(str(tiny_model))
    assert trained.adapter is None and trained.base.folder == tiny_model
    with without_adapter(load_trained(trained, "cpu").model) as model:
        assert model is not None


def test_a_run_opens_by_its_folder(adapter, tmp_path):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.write_info({"status": COMPLETE})
    shutil.move(adapter, run.adapter)
    trained = open_trained(str(run.path))
    assert (trained.run, trained.adapter) == (run, run.adapter)


# what does not


def test_no_run_and_an_incomplete_run_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "runs/nosuch: no such run folder" in refused(open_trained, "runs/nosuch")
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.write_info({"status": "failed"})
    assert "not complete (status: failed)" in refused(open_trained, str(run.path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"megatron_core": "os"}, "key 'megatron_core' is refused"),
        ({"auto_mapping": {"base_model_class": "x", "parent_library": "os"}}, "key 'auto_mapping' is refused"),
        ({"evil": "x"}, "key 'evil' is refused"),
        ({"r": 0}, "r is 0"),
        ({"r": "8"}, "r is '8'"),
        ({"peft_type": "XLORA"}, "peft_type is 'XLORA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "/nowhere/tiny"}, "its base /nowhere/tiny is not there any more"),
        ({"r": 8}, "does not fit the base: size mismatch"),
        ({"target_modules": ["k_proj"]}, "no layer of the base takes"),
        ({"target_modules": ["q_proj", "k_proj"]}, "the file lacks"),
        ({"target_modules": ["nosuch"]}, "does not fit the base"),
        ({"lora_alpha": "x"}, "does not fit the base"),
        ({"rank_pattern": [1]}, "does not fit the base"),
        ({"target_modules": 5}, "does not fit the base"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_adapter_config_that_lies_or_harms_is_refused(foreign, changes, words):
    change_config(foreign, **changes)
    assert words in refused(use, foreign)


def test_defaults_that_peft_writes_into_every_adapter_are_accepted(foreign):
    change_config(foreign, megatron_core="megatron.core", auto_mapping={"parent_library": "transformers.models.llama"})
    open_trained(str(foreign))


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_broken_adapter_config_is_refused(foreign, content):
    (foreign / "adapter_config.json").write_bytes(content)
    refused(open_trained, str(foreign))


def test_missing_weights_and_pickled_ones_are_told_apart(foreign):
    weights = foreign / "adapter_model.safetensors"
    weights.rename(foreign / "adapter_model.bin")
    assert "pickled adapter_model.bin" in refused(open_trained, str(foreign))
    (foreign / "adapter_model.bin").unlink()
    assert "has no adapter_model.safetensors" in refused(open_trained, str(foreign))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "ftkit.json"])
def test_a_flipped_bit_and_a_cut_file_are_found_by_the_manifest(adapter, name):
    whole = bytearray((adapter / name).read_bytes())
    (adapter / name).write_bytes(whole[:-1])
    assert f"{name}: {len(whole) - 1} bytes, should have {len(whole)}" in refused(open_trained, str(adapter))
    whole[-9] ^= 1
    (adapter / name).write_bytes(whole)
    assert f"{name}: damaged" in refused(open_trained, str(adapter))
    (adapter / name).unlink()
    refused(open_trained, str(adapter))


@pytest.mark.parametrize("files", [None, [], {"x": 5}, {"../x": {"bytes": 1}}, {"/etc/hostname": {"bytes": 1}}])
def test_a_manifest_that_lies_is_refused(adapter, files):
    manifest = json.loads((adapter / MANIFEST).read_text())
    (adapter / MANIFEST).write_text(json.dumps({**manifest, "files": files}))
    refused(open_trained, str(adapter))


def test_a_base_of_another_size_is_refused(foreign, base_folder, tmp_path):
    from transformers import AutoConfig, LlamaForCausalLM

    other = shutil.copytree(base_folder, tmp_path / "wide")
    config = AutoConfig.from_pretrained(other)
    config.num_attention_heads = 8
    LlamaForCausalLM(config).save_pretrained(other)
    change_config(foreign, base_model_name_or_path=str(other))
    assert "size mismatch" in refused(use, foreign)


def test_a_base_whose_layers_have_other_names_is_refused(foreign, tmp_path, tiny_model):
    from transformers import GPT2Config, GPT2LMHeadModel

    other = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=512)).save_pretrained(other)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / file, other)
    change_config(foreign, base_model_name_or_path=str(other))
    assert "does not fit the base" in refused(use, foreign)


def test_a_base_that_changed_since_training_is_refused(adapter, base_folder):
    weights, config = base_folder / "model.safetensors", base_folder / "config.json"
    kept = weights.read_bytes(), config.read_text()
    try:
        tensors = load_file(weights)
        tensors["model.layers.0.self_attn.q_proj.weight"].add_(0.01)  # trained on: same names and shapes
        save_file(tensors, weights, metadata={"format": "pt"})
        assert "its weights are not what" in refused(open_trained, str(adapter))
        weights.write_bytes(kept[0])
        config.write_text(kept[1].replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
        assert "its config.json is not what" in refused(open_trained, str(adapter))
    finally:
        weights.write_bytes(kept[0])
        config.write_text(kept[1])
    open_trained(str(adapter))
