"""`ftkit merge`: the laws of a merge, its proof, and what bad adapters and bases get."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from xxhash import xxh3_128_hexdigest

from ftkit.core.merge_settings import MergeSettings
from ftkit.errors import ExitCode, UserError
from ftkit.io.adapter_folder import save_adapter
from ftkit.io.atomic import MANIFEST, write_manifest
from ftkit.io.base_model import config_sha256, find_base, load_tokenizer, load_weights
from ftkit.io.card import Card, read_card
from ftkit.io.quantization import keep_plain_layout, quantization_config, quantized_fingerprints
from ftkit.io.run_folder import RunFolder
from ftkit.io.trained import load_trained, open_trained

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[5, 99, 300, 7, 250, 42, 18]])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


DEFAULTS = {
    "Lora": {"r": 4, "lora_alpha": 8, "target_modules": LINEAR},
    "LoHa": {"r": 4, "alpha": 8, "target_modules": LINEAR},
    "LoKr": {"r": 4, "alpha": 8, "target_modules": LINEAR},
    "OFT": {"oft_block_size": 8, "target_modules": LINEAR},
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "Vera": {"r": 8, "target_modules": LINEAR},
}


def make_adapter(
    base, out, *, kind="Lora", method="lora", dtype=torch.float32, spread=0.3, card=False, seed=1, **options
):
    """A PEFT adapter whose B is random instead of trained; with a card it is one of ftkit's own."""
    import peft
    from peft import get_peft_model

    found = find_base(str(base))
    model = load_weights(found, dtype=dtype, device="cpu", quantization=quantization_config(method, dtype))
    keep_plain_layout(model)
    seen = quantized_fingerprints(model)
    model = get_peft_model(model, getattr(peft, f"{kind}Config")(**{**DEFAULTS[kind], **options}))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if kind != "Lora" and parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * spread / 3)
        elif any(part in name for part in ("lora_B", "lora_embedding_B", "modules_to_save", "trainable_tokens")):
            torch.nn.init.normal_(parameter, std=spread)
        if "magnitude" in name or (parameter.requires_grad and name.endswith(".bias")):
            parameter.data.add_(torch.rand_like(parameter) * spread / 0.3)
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    if card:
        about = Card(
            found.name, found.location, None, config_sha256(found), method, "sft", name, 64, quantized_sha256=seen
        )
        save_adapter(out, model, load_tokenizer(found), about)
    else:
        model.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """A foreign adapter (PEFT's files and nothing else) on every linear layer."""
    return make_adapter(tiny_model, tmp_path_factory.mktemp("adapter") / "lora")


@pytest.fixture(scope="module")
def qlora(tiny_model, tmp_path_factory):
    """An adapter of ours, trained on NF4."""
    return make_adapter(tiny_model, tmp_path_factory.mktemp("adapter") / "qlora", method="qlora", card=True)


@pytest.fixture(scope="module")
def gpt2(tiny_model, tmp_path_factory):
    """A GPT-2 (Conv1D, tied head) whose file lacks the model's prefix, as the original's does."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("models") / "gpt2"
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64, "vocab_size": 512}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.3)).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / file, folder)
    return folder


def variant(base, out, **config):
    """A model of random weights like `base` with another config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(base, **config))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(out)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / file, out)
    return out


@pytest.fixture(scope="module")
def biased(tiny_model, tmp_path_factory):
    """A Llama whose attention has biases."""
    return variant(tiny_model, tmp_path_factory.mktemp("models") / "biased", attention_bias=True)


@pytest.fixture(scope="module")
def tied(tiny_model, tmp_path_factory):
    """A Llama whose head is its embeddings."""
    return variant(tiny_model, tmp_path_factory.mktemp("models") / "tied", tie_word_embeddings=True)


def as_bfloat16(base, out):
    """The same model with weights in bfloat16."""
    shutil.copytree(base, out)
    rounded = {name: tensor.bfloat16() for name, tensor in tensors_of(base).items()}
    save_file(rounded, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return out


def merge(run, out=None, **options):
    """The command, in this process."""
    from ftkit.commands.merge import run as command

    command(MergeSettings(run=str(run), output=out and str(out), **options))
    return out


def merge_several(adapters, out, **options):
    """The command with --adapter, in this process."""
    from ftkit.commands.merge import run as command

    command(MergeSettings(adapter=adapters, output=str(out), **options))
    return out


def refused(run, out, code, **options):
    """The message of a merge that must fail with this code and leave nothing behind."""
    before = sorted(path.name for path in out.parent.iterdir())
    with pytest.raises(UserError) as raised:
        merge(run, out, **options)
    assert raised.value.exit_code == code, raised.value.message
    assert sorted(path.name for path in out.parent.iterdir()) == before
    return raised.value.message


def tensors_of(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def merged_by_peft(base, adapter, **options):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, **options)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


@torch.no_grad()
def logits_of(model):
    return model.eval()(IDS).logits.float()


@torch.no_grad()
def logits_of_folder(folder):
    from transformers import AutoModelForCausalLM

    return logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def edited(adapter, out, **config):
    """A copy of an adapter with other values in its config."""
    shutil.copytree(adapter, out)
    if config:
        file = out / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return out


# laws


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 32}},
        {"target_modules": [*LINEAR, "lm_head"]},
        {"target_modules": ["embed_tokens", "v_proj"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "target_modules": ["embed_tokens", "o_proj"]},
        {"trainable_token_indices": [3, 500]},
        {"trainable_token_indices": {"embed_tokens": [7], "lm_head": [1, 2]}},
        {"kind": "LoHa"},
        {"kind": "LoHa", "rank_pattern": {"q_proj": 2}, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"kind": "LoKr"},
        {"kind": "LoKr", "decompose_both": True, "decompose_factor": 4},
        {"kind": "OFT"},
        {"kind": "OFT", "coft": True, "use_cayley_neumann": False, "target_modules": ["embed_tokens", "q_proj"]},
        {"kind": "IA3"},
        {"kind": "Vera"},
        {"kind": "Vera", "save_projection": False},
    ],
    ids=[
        "plain", "rslora", "patterns", "head", "embeddings", "saved", "dora", "dora embeddings", "tokens",
        "tokens of both", "loha", "loha and saved", "lokr", "lokr both", "oft", "oft embeddings", "ia3", "vera",
        "vera drawn",
    ],
)  # fmt: skip
def test_merged_is_what_peft_merges_to_the_last_bit(tiny_model, tmp_path, options):
    out = merge(make_adapter(tiny_model, tmp_path / "adapter", **options), tmp_path / "out")
    expected, found, base = (
        merged_by_peft(tiny_model, tmp_path / "adapter").state_dict(),
        tensors_of(out),
        tensors_of(tiny_model),
    )
    assert found.keys() == base.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    listed = json.loads((out / "merge.json").read_text())["tensors"]
    changed = listed["changed"]
    assert listed["xxh128"] == {name: xxh3_128_hexdigest(tensor.numpy().tobytes()) for name, tensor in found.items()}
    assert changed == sorted(name for name in found if not torch.equal(found[name], base[name])) and changed


@pytest.mark.parametrize(
    "options",
    [{"lora_bias": True}, {"bias": "all"}, {"bias": "lora_only"}, {"kind": "IA3"}, {"kind": "Vera", "bias": "all"}],
    ids=str,
)
def test_biases_are_what_peft_merges_to_the_last_bit(biased, tmp_path, options):
    kinds = {} if "kind" in options else {"target_modules": ["q_proj", "v_proj", "o_proj"]}
    out = merge(make_adapter(biased, tmp_path / "adapter", **kinds, **options), tmp_path / "out")
    expected, found, base = (
        merged_by_peft(biased, tmp_path / "adapter").state_dict(),
        tensors_of(out),
        tensors_of(biased),
    )
    assert found.keys() == base.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    trained = "model.layers.0.self_attn.v_proj.bias"
    assert not torch.equal(found[trained], base[trained])


def test_an_update_of_a_bias_that_the_base_lacks_is_refused(tiny_model, tmp_path):
    adapter = make_adapter(tiny_model, tmp_path / "adapter", lora_bias=True)
    assert "which has none in the base" in refused(adapter, tmp_path / "out", ExitCode.MODEL)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"use_dora": True}, {"lora_bias": True, "target_modules": ["q_proj"]},
        {"kind": "LoHa"}, {"kind": "LoKr"}, {"kind": "OFT"}, {"kind": "IA3"}, {"kind": "Vera"},
    ],
    ids=str,
)  # fmt: skip
def test_a_bfloat16_base_is_merged_as_peft_does_within_one_rounding(biased, tmp_path, options):
    base = as_bfloat16(biased, tmp_path / "base")
    out = merge(make_adapter(base, tmp_path / "adapter", **options), tmp_path / "out")
    expected = merged_by_peft(base, tmp_path / "adapter", dtype=torch.bfloat16).state_dict()
    for name, tensor in tensors_of(out).items():
        assert torch.allclose(tensor.float(), expected[name].float(), rtol=2**-7, atol=1e-6), name


TIE_BREAKERS = {
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embeddings": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", TIE_BREAKERS)
def test_a_broken_tie_is_refused_or_untied_as_base_and_adapter_have_it(tied, tmp_path, kind):
    adapter = make_adapter(tied, tmp_path / "adapter", **TIE_BREAKERS[kind])
    message = refused(adapter, tmp_path / "out", ExitCode.MODEL)
    assert "lm_head.weight" in message and "embed_tokens" in message
    expected = logits_of(load_trained(open_trained(str(adapter)), "cpu", dtype="fp32").model)
    out = merge(adapter, tmp_path / "out", untie=True)
    assert torch.allclose(logits_of_folder(out), expected, atol=1e-4)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in tensors_of(out) and "lm_head.weight" not in tensors_of(tied)


@pytest.mark.parametrize(
    "options",
    [{"trainable_token_indices": [3, 500]}, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}],
    ids=["tokens", "saved as one"],
)
def test_a_tie_that_was_trained_as_one_stays(tied, tmp_path, options):
    adapter = make_adapter(tied, tmp_path / "adapter", **options)
    out = merge(adapter, tmp_path / "out")
    assert tensors_of(out).keys() == tensors_of(tied).keys()
    expected = logits_of(load_trained(open_trained(str(adapter)), "cpu", dtype="fp32").model)
    assert torch.allclose(logits_of_folder(out), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["IA3", "Vera"])
def test_gpt2_is_turned_for_other_methods_too(gpt2, tmp_path, kind):
    options = {"feedforward_modules": ["mlp.c_proj"]} if kind == "IA3" else {}
    targets = ["c_attn", "mlp.c_proj"]
    out = merge(make_adapter(gpt2, tmp_path / "a", kind=kind, target_modules=targets, **options), tmp_path / "out")
    expected = merged_by_peft(gpt2, tmp_path / "a").state_dict()
    assert all(torch.equal(tensor, expected[f"transformer.{name}"]) for name, tensor in tensors_of(out).items())


@pytest.mark.parametrize("stated", [True, False])
def test_gpt2_is_turned_by_its_layers_class_whatever_the_adapter_says(gpt2, tmp_path, stated):
    made = make_adapter(gpt2, tmp_path / "made", target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    adapter = edited(made, tmp_path / "adapter", fan_in_fan_out=stated)
    out = merge(adapter, tmp_path / "out")
    expected = merged_by_peft(gpt2, made).state_dict()
    found = tensors_of(out)
    assert found.keys() == tensors_of(gpt2).keys() and "h.0.attn.c_attn.weight" in found
    assert all(torch.equal(tensor, expected[f"transformer.{name}"]) for name, tensor in found.items())


def test_bfloat16_is_the_float32_sum_rounded_once(tiny_model, adapter, tmp_path):
    out = merge(adapter, tmp_path / "out", dtype="bf16")
    exact = merged_by_peft(tiny_model, adapter).state_dict()
    assert all(torch.equal(tensor, exact[name].bfloat16()) for name, tensor in tensors_of(out).items())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_each_tensor_keeps_the_format_that_it_has_in_the_base(tiny_model, tmp_path):
    base = tmp_path / "mixed"
    shutil.copytree(tiny_model, base)
    mixed = {name: t if "norm" in name else t.bfloat16() for name, t in tensors_of(tiny_model).items()}
    save_file(mixed, base / "model.safetensors", {"format": "pt"})
    found = tensors_of(merge(make_adapter(base, tmp_path / "adapter"), tmp_path / "out"))
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in mixed.items()}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_shards_of_the_base_do_not_show_in_the_result(tiny_model, adapter, tmp_path):
    from transformers import AutoModelForCausalLM

    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(sharded, max_shard_size="20KB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / file, sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one = merge(adapter, tmp_path / "one")
    two = merge(edited(adapter, tmp_path / "same", base_model_name_or_path=str(sharded)), tmp_path / "two")
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_weights_are_written_in_files_of_the_size_that_is_asked_for(adapter, tmp_path):
    one, out = merge(adapter, tmp_path / "one"), merge(adapter, tmp_path / "out", shard_size="0.05MB")
    files = sorted(file.name for file in out.glob("*.safetensors"))
    sizes = {file.name: sum(tensor.nbytes for tensor in load_file(file).values()) for file in out.glob("*.safetensors")}
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(size <= 50_000 or len(load_file(out / name)) == 1 for name, size in sizes.items())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors_of(one).keys()
    assert all(torch.equal(tensor, tensors_of(one)[name]) for name, tensor in tensors_of(out).items())
    assert "--shard-size" in refused(adapter, tmp_path / "other", ExitCode.USAGE, shard_size="big")


def test_the_merged_folder_answers_as_base_and_adapter_do(tiny_model, adapter, tmp_path):
    from transformers import AutoTokenizer

    expected = logits_of(load_trained(open_trained(str(adapter)), "cpu", dtype="fp32").model)
    out = merge(adapter, tmp_path / "out")
    assert torch.allclose(logits_of_folder(out), expected, atol=1e-4)
    assert not torch.allclose(logits_of_folder(tiny_model), expected, atol=1e-2)
    assert (
        AutoTokenizer.from_pretrained(out)("a b").input_ids
        == AutoTokenizer.from_pretrained(tiny_model)("a b").input_ids
    )


METHODS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "tokens": {"trainable_token_indices": [3, 500]},
    "embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "saved": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "oft": {"kind": "OFT"},
    "ia3": {"kind": "IA3"},
    "vera": {"kind": "Vera"},
    "loha": {"kind": "LoHa"},
    "lokr": {"kind": "LoKr"},
}
BASES = ["fp32", "bf16", "nf4", "nf4-dq", "fp4", "fp4-dq", "int8"]
UNQUANTISED = ("loha", "lokr")
"""What PEFT cannot put on a quantised layer."""
CELLS = [(base, method) for method in METHODS for base in (BASES[:2] if method in UNQUANTISED else BASES)]


@pytest.mark.parametrize(("base", "method"), CELLS)
def test_every_method_on_every_base_answers_as_peft_does(tiny_model, tmp_path, base, method):
    from peft import PeftModel

    quantised = base not in ("fp32", "bf16")
    folder = as_bfloat16(tiny_model, tmp_path / "base") if base == "bf16" else tiny_model
    kind = base if quantised else "lora"
    adapter = make_adapter(folder, tmp_path / "adapter", method=kind, spread=0.05, **METHODS[method])
    out = merge(adapter, tmp_path / "out", dtype="fp32", trained_on=base if quantised else None)
    assert json.loads((out / "merge.json").read_text())["proof"]["proven"]
    model = load_weights(
        find_base(str(folder)),
        dtype=torch.float32,
        device="cpu",
        quantization=quantization_config(kind, torch.float32),
    )
    model = model.dequantize() if quantised else model
    expected = logits_of(PeftModel.from_pretrained(model, adapter))
    assert torch.allclose(logits_of_folder(out), expected, atol=1e-3)


# several adapters


WAYS = ["cat", "linear", "svd", "ties", "dare-ties"]


@pytest.fixture(scope="module")
def pair_of_adapters(tiny_model, tmp_path_factory):
    """Two adapters of one base and rank; the second on other layers, too, with another alpha."""
    folder = tmp_path_factory.mktemp("adapters")
    one = make_adapter(tiny_model, folder / "one", target_modules=["q_proj", "up_proj"])
    return one, make_adapter(tiny_model, folder / "two", target_modules=["q_proj", "v_proj"], lora_alpha=2, seed=2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -0.5)], ids=str)
def test_several_adapters_are_what_peft_combines(tiny_model, pair_of_adapters, tmp_path, way, weights):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    one, two = pair_of_adapters
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), one, adapter_name="one")
    model.load_adapter(two, adapter_name="two")
    density = 0.5 if "ties" in way and way != "dare-ties" else 1.0  # at random, each draws in another order
    model.add_weighted_adapter(["one", "two"], list(weights), "sum", way.replace("-", "_"), density=density)
    model.set_adapter("sum")
    expected = model.merge_and_unload().state_dict()
    named = [f"{path}={weight}" for path, weight in zip((one, two), weights, strict=True)]
    found = tensors_of(merge_several(named, tmp_path / "out", combine=way, density=density))
    changed = json.loads((tmp_path / "out" / "merge.json").read_text())["tensors"]["changed"]
    assert len(changed) == 6
    for name in found:
        assert torch.allclose(found[name], expected[name], atol=1e-5), name
        assert way == "svd" or torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("way", ["linear", "cat"])
def test_checkpoints_of_one_run_are_averaged(run_here, tiny_model, tmp_path, way):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = ("train", "rows.jsonl", "--model", tiny_model, "--valid", "0", "--batch", "4", "--r", "4", "--lr", "0.01")
    assert run_here(*train, "--steps", "6", "--save-every", "2", "--keep", "9", "--run", "run").exit_code == 0
    one, two, *_ = sorted((tmp_path / "run" / "checkpoints").iterdir())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), one, adapter_name="one")
    model.load_adapter(two, adapter_name="two")
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mean", way)
    model.set_adapter("mean")
    expected = model.merge_and_unload().state_dict()
    merge_several([f"{one}=0.5", f"{two}=0.5"], tmp_path / "out", combine=way)
    found = tensors_of(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert read_card(tmp_path / "out").method == "merged"


def test_random_keeping_is_the_same_for_the_same_seed(pair_of_adapters, tmp_path):
    named = [f"{path}=0.5" for path in pair_of_adapters]
    one, two, other = (
        (merge_several(named, tmp_path / name, combine="dare-ties", seed=seed) / "model.safetensors").read_bytes()
        for name, seed in (("one", 1), ("two", 1), ("other", 2))
    )
    assert one == two != other


def test_adapters_that_do_not_fit_together_are_refused(tiny_model, biased, pair_of_adapters, tmp_path):
    one, two = pair_of_adapters
    elsewhere = make_adapter(biased, tmp_path / "elsewhere")
    wide = make_adapter(tiny_model, tmp_path / "wide", r=8)
    dora = make_adapter(tiny_model, tmp_path / "dora", use_dora=True)
    for others, code, words, options in (
        ([elsewhere], ExitCode.MODEL, "same base", {}),
        ([wide], ExitCode.MODEL, "ranks differ", {"combine": "linear"}),
        ([dora], ExitCode.MODEL, "only plain LoRA", {}),
        ([f"{two}=much"], ExitCode.USAGE, "no number", {}),
        ([two], ExitCode.USAGE, "--density", {"density": 0.0}),
    ):
        with pytest.raises(UserError, match=words) as raised:
            merge_several([str(one), *map(str, others)], tmp_path / "out", **options)
        assert raised.value.exit_code == code and not (tmp_path / "out").exists()


# quantised training


def test_merged_onto_trained_is_the_quantised_base_with_its_adapter(qlora, tmp_path):
    live = logits_of(load_trained(open_trained(str(qlora)), "cpu").model)
    onto_trained = logits_of_folder(merge(qlora, tmp_path / "trained"))
    onto_original = logits_of_folder(merge(qlora, tmp_path / "original", onto="original"))
    assert torch.allclose(onto_trained, live, atol=1e-4)
    assert (onto_original - live).abs().max() > 0.1
    card = read_card(tmp_path / "trained")
    assert card.method == "merged" and card.quantized_sha256 == {}


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"])
def test_an_adapter_of_another_tool_is_merged_onto_what_it_was_trained_on_if_told(tiny_model, tmp_path, kind):
    adapter = make_adapter(tiny_model, tmp_path / "adapter", method=kind)
    quantized = load_weights(
        find_base(str(tiny_model)),
        dtype=torch.float32,
        device="cpu",
        quantization=quantization_config(kind, torch.float32),
    )
    expected = quantized.dequantize().state_dict()
    out = merge(adapter, tmp_path / "out", trained_on=kind)
    report = json.loads((out / "merge.json").read_text())
    assert report["method"] == kind and len(report["tensors"]["dequantised"]) == 14
    assert report["live"]["agreement"] > 0.5 and not (out / "ftkit.json").exists()
    from ftkit.core.merging import LowRank, apply_delta

    name, tensors = "model.layers.1.mlp.up_proj", load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
    right = apply_delta(expected[f"{name}.weight"], LowRank(a, b, 2.0))
    assert torch.equal(tensors_of(out)[f"{name}.weight"], right)
    assert "another --trained-on" in refused(adapter, out, ExitCode.EXISTS)


UNSLOTHS_TARGETS = (
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|v_proj|q_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|mlp)"
    r"\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)
LLAMA = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}


@pytest.mark.parametrize(
    "written",
    [
        {"auto_mapping": {**LLAMA, "unsloth_fixed": True}},
        {"auto_mapping": {**LLAMA, "unsloth_fixed": True}, "target_modules": UNSLOTHS_TARGETS, "task_type": None},
        {"auto_mapping": None, "fan_in_fan_out": None, "task_type": "CAUSAL_LM"},
    ],
    ids=["unsloth", "unsloth-regex", "axolotl"],
)
def test_what_other_tools_write_into_the_config_is_merged_as_peft_does(tiny_model, adapter, tmp_path, written):
    changed = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((changed / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(json.dumps(config | written))
    expected, found = merged_by_peft(tiny_model, changed).state_dict(), tensors_of(merge(changed, tmp_path / "out"))
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_merge_without_proof_loads_neither_the_compiler_nor_what_else_it_does_not_run(adapter, tmp_path):
    unused = "sympy", "scipy.optimize", "torch._dynamo.convert_frame", "torch.distributed.tensor"
    asked = ["merge", str(adapter), "-o", str(tmp_path / "out"), "--no-check", "-q"]
    told = f"import sys; from ftkit.cli import main\ntry: main({asked!r})\nfinally: print(set({unused!r}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(tmp_path / "out"), "set()"]


def test_what_ftkit_trained_needs_no_telling(qlora, tmp_path):
    assert "recorded how" in refused(qlora, tmp_path / "out", ExitCode.USAGE, trained_on="nf4")


@torch.no_grad()
@pytest.mark.parametrize("method", ["qlora", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_live_model_of_the_proof_is_the_one_that_training_ran(tiny_model, tmp_path, method, dtype):
    from ftkit.commands.merge_proof import base_and_adapter
    from ftkit.core.proof import compare_logits
    from ftkit.io.adapter_weights import open_adapter_weights
    from ftkit.io.base_model import check_base

    folder = make_adapter(tiny_model, tmp_path / "adapter", method=method, dtype=dtype, card=True)
    trained = open_trained(str(folder))
    seen = dict.fromkeys(trained.card.quantized_sha256, False)
    adapter = open_adapter_weights(folder)
    live = base_and_adapter(trained, adapter, check_base(trained.base), seen=seen, kernels=True)
    found = compare_logits(logits_of(load_trained(trained, "cpu").model), logits_of(live))
    assert found.largest_difference == 0 if dtype is torch.float32 else found.mean_kl < 1e-3  # sums rounded elsewhere


EXPERTS = {
    "around": ("Mixtral", {"target_modules": ["q_proj", "v_proj"]}),
    "joined": ("Mixtral", {"target_modules": "all-linear", "use_rslora": True}),
    "packed": ("GptOss", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
}


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_are_merged_as_peft_does_to_the_last_bit(tiny_model, tmp_path, kind):
    import transformers

    architecture, options = EXPERTS[kind]
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "head_dim": 8}
    config = getattr(transformers, f"{architecture}Config")(
        **sizes, **heads, num_experts_per_tok=2, initializer_range=0.3
    )
    base = tmp_path / "base"
    getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(base)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / file, base)
    adapter = make_adapter(base, tmp_path / "adapter", spread=0.05, **options)
    found = tensors_of(merge(adapter, tmp_path / "out"))
    merged_by_peft(base, adapter).save_pretrained(tmp_path / "peft")
    expected = tensors_of(tmp_path / "peft")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    changed = json.loads((tmp_path / "out" / "merge.json").read_text())["tensors"]["changed"]
    assert any("experts" in name for name in changed) == (kind != "around")


def test_convolutions_in_groups_are_refused_as_peft_cannot_merge_them(tiny_model, tmp_path):
    from transformers import Lfm2Config, Lfm2ForCausalLM

    sizes = {"vocab_size": 512, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    base = tmp_path / "base"
    Lfm2ForCausalLM(
        Lfm2Config(**sizes, num_attention_heads=2, num_key_value_heads=2, full_attn_idxs=[1])
    ).save_pretrained(base)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / file, base)
    grouped = make_adapter(base, tmp_path / "grouped", r=16, target_modules=["conv.conv", "q_proj"])
    assert "groups > 1" in refused(grouped, tmp_path / "out", ExitCode.MODEL)
    merge(make_adapter(base, tmp_path / "linear", target_modules=["q_proj", "in_proj"]), tmp_path / "out")


@pytest.mark.parametrize("kind", ["Lora", "LoHa", "LoKr", "OFT"])
def test_convolutions_are_merged_as_peft_does(kind):
    import copy

    import peft

    from ftkit.core.layer_merging import layers_of_peft, merged_by_peft

    torch.manual_seed(0)
    base = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(4, 8, 3)})
    config = getattr(peft, f"{kind}Config")(**{**DEFAULTS[kind], "target_modules": ["conv"]})
    if kind == "OFT":
        config.oft_block_size = 4
    tuned = peft.PeftModel(base, config)
    for parameter in tuned.parameters():
        parameter.data.normal_(std=0.1)
    expected = copy.deepcopy(tuned).merge_and_unload()["conv"]
    layers = layers_of_peft(tuned)
    assert list(layers) == ["conv.weight"]
    before = base["conv"].base_layer.weight.clone()
    found = merged_by_peft(layers["conv.weight"], "weight", before.clone())
    assert torch.equal(found, expected.weight) and not torch.equal(found, before)
    assert torch.equal(base["conv"].base_layer.weight, before), "the base is left as it was"


def test_int8_values_are_those_that_transformers_dequantises(tiny_model, tmp_path):
    adapter = make_adapter(tiny_model, tmp_path / "adapter", method="int8", card=True, target_modules=["q_proj"])
    quantised = load_weights(
        find_base(str(tiny_model)),
        dtype=torch.float32,
        device="cpu",
        quantization=quantization_config("int8", torch.float32),
    )
    expected, found = quantised.dequantize().state_dict(), tensors_of(merge(adapter, tmp_path / "out"))
    assert all(torch.equal(found[name], expected[name]) for name in found if "q_proj" not in name)
    report = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert "model.layers.0.mlp.up_proj.weight" in report["tensors"]["dequantised"]


def test_a_base_that_was_cast_before_it_was_quantised_is_cast_again(tiny_model, tmp_path):
    adapter = make_adapter(tiny_model, tmp_path / "adapter", method="qlora", dtype=torch.bfloat16, card=True)
    report = json.loads((merge(adapter, tmp_path / "out") / "merge.json").read_text())
    assert report["proof"]["agreement"] == 1.0 and report["live"]["positions"] == report["proof"]["positions"]


def test_quantised_gpt2_is_quantised_and_turned_back(gpt2, tmp_path):
    adapter = make_adapter(
        gpt2, tmp_path / "adapter", method="qlora", card=True, target_modules=["c_attn", "c_proj", "c_fc"]
    )
    live = logits_of(load_trained(open_trained(str(adapter)), "cpu").model)
    assert torch.allclose(logits_of_folder(merge(adapter, tmp_path / "out")), live, atol=1e-3)


def test_a_base_that_quantises_otherwise_is_named_and_can_be_merged_unquantised(qlora, tmp_path):
    other = edited(qlora, tmp_path / "other")
    card = json.loads((other / "ftkit.json").read_text())
    for layer in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        card["quantized_sha256"][layer] = "0" * 64
    (other / "ftkit.json").write_text(json.dumps(card))
    write_manifest(other, {}, {})
    message = refused(other, tmp_path / "out", ExitCode.MODEL)
    assert "2 layers" in message and "model.layers.0.mlp.up_proj" in message and "layers.1.self_attn.q_proj" in message
    assert (merge(other, tmp_path / "out", onto="original") / "merge.json").is_file()


# the proof


def test_files_that_are_not_base_and_adapter_do_not_pass_the_proof(adapter, tiny_model, tmp_path):
    from ftkit.commands.merge_proof import prove
    from ftkit.io.adapter_weights import open_adapter_weights
    from ftkit.io.base_model import check_base

    out = merge(adapter, tmp_path / "out")
    tensors = tensors_of(out)
    trained = open_trained(str(adapter))
    asked = trained, open_adapter_weights(trained.adapter), check_base(trained.base), out
    assert prove(*asked, list(tensors), seen={}, live={}, dtype="F32", count=2).probes == 2
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors_of(tiny_model)["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    for dtype in ("F32", "BF16"):
        with pytest.raises(UserError, match="not base") as raised:
            prove(*asked, list(tensors), seen={}, live={}, dtype=dtype, count=2)
        assert raised.value.exit_code == ExitCode.GATE


def test_the_proof_catches_a_tied_head_that_peft_merges_into_the_embeddings_too(tied, tmp_path):
    from ftkit.commands.merge_proof import prove
    from ftkit.io.adapter_weights import open_adapter_weights
    from ftkit.io.base_model import check_base

    adapter = make_adapter(tied, tmp_path / "adapter", target_modules=["lm_head"])
    merged_by_peft(tied, adapter).save_pretrained(tmp_path / "peft")
    trained = open_trained(str(adapter))
    asked = trained, open_adapter_weights(adapter), check_base(trained.base)
    for dtype in ("F32", "BF16"):
        with pytest.raises(UserError, match="not base") as raised:
            prove(*asked, tmp_path / "peft", [], seen={}, live={}, dtype=dtype, count=4)
        assert raised.value.exit_code == ExitCode.GATE


def test_a_model_that_rounding_moves_far_is_published_and_a_wrong_merge_of_it_is_not(tmp_path):
    from ftkit.commands.merge_proof import prove
    from ftkit.core.proof import LIMITS
    from ftkit.io.adapter_weights import open_adapter_weights
    from ftkit.io.base_model import check_base

    base = Path(find_base("builtin:tiny").location)  # of bfloat16
    torch.manual_seed(1)
    adapter = make_adapter(base, tmp_path / "adapter", spread=0.05, seed=2)
    out = merge(adapter, tmp_path / "out")
    report = json.loads((out / "merge.json").read_text())
    found, limits, usual = report["proof"], report["proof"]["limits"], LIMITS["BF16"]
    assert found["mean_kl"] > usual.mean_kl and limits["mean_kl"] > usual.mean_kl, "it is one of those models"
    trained, tensors = open_trained(str(adapter)), tensors_of(out)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors_of(base)["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    asked = trained, open_adapter_weights(adapter), check_base(trained.base), out, report["tensors"]["changed"]
    with pytest.raises(UserError, match="not base"):
        prove(*asked, seen={}, live={}, dtype="BF16", count=8)


@pytest.mark.parametrize("kind", ["rwkv", "mamba"])
def test_models_that_look_into_their_own_weights_are_proven_too(tiny_model, tmp_path, kind):
    """RWKV divides some weights while it runs, Mamba uses a layer's weight without running the layer."""
    from transformers import AutoModelForCausalLM, MambaConfig, RwkvConfig

    size = {"vocab_size": 512, "hidden_size": 16, "bos_token_id": 0, "eos_token_id": 0}
    config, targets = {
        "rwkv": (RwkvConfig(**size, num_hidden_layers=4, context_length=64, rescale_every=2), ["key", "value", "output"]),
        "mamba": (MambaConfig(**size, num_hidden_layers=2, state_size=4), ["in_proj", "x_proj"]),
    }[kind]  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / file, tmp_path / "base" / file)
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=targets)
    report = json.loads((merge(adapter, tmp_path / "out") / "merge.json").read_text())
    assert report["proof"]["proven"] and report["proof"]["mean_kl"] < 1e-8


def test_a_merged_folder_says_nothing_of_where_it_was_made(tiny_model, tmp_path):
    """It may be published; and the same merge has the same bytes wherever base and adapter lie."""
    made = []
    for place in ("here", "there"):
        base = shutil.copytree(tiny_model, tmp_path / place / "base")
        torch.manual_seed(0)
        out = merge(make_adapter(base, tmp_path / place / "adapter", card=True), tmp_path / place / "out")
        made.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert [name for name, data in made[0].items() if str(tmp_path).encode() in data] == []
    assert [name for name, data in made[0].items() if data != made[1][name]] == []


def test_the_proof_says_how_many_prompts_are_continued_alike(adapter, tmp_path):
    report = json.loads((merge(adapter, tmp_path / "out", check=5) / "merge.json").read_text())["proof"]
    assert report["same_greedy"] == report["probes"] == 5 and report["greedy_tokens"] == 4


def test_a_merge_without_proof_says_so_and_is_not_taken_for_a_proven_one(adapter, tmp_path):
    out = merge(adapter, tmp_path / "out", no_check=True)
    assert "UNPROVEN" in (out / "README.md").read_text()
    assert json.loads((out / "merge.json").read_text())["proof"] == {"proven": False}
    merge(adapter, out, no_check=True)
    assert "is not proven" in refused(adapter, out, ExitCode.EXISTS)
    assert "UNPROVEN" not in (merge(adapter, out, force=True) / "README.md").read_text()


def test_an_adapter_that_does_nothing_is_not_published(tiny_model, tmp_path):
    for kind in ("Lora", "IA3", "LoHa"):
        adapter = make_adapter(tiny_model, tmp_path / kind, kind=kind, spread=0.0)
        assert "does nothing" in refused(adapter, tmp_path / "out", ExitCode.GATE)


def test_an_update_below_the_rounding_of_the_format_is_not_published(tiny_model, tmp_path):
    adapter = make_adapter(tiny_model, tmp_path / "adapter", spread=1e-12, target_modules=["q_proj"])
    base = tensors_of(tiny_model)["model.layers.0.self_attn.q_proj.weight"]
    assert base.abs().min() > 1e-7
    assert "smaller than its rounding" in refused(adapter, tmp_path / "out", ExitCode.GATE)


def test_values_beyond_the_format_are_named(tiny_model, tmp_path):
    adapter = make_adapter(tiny_model, tmp_path / "adapter", spread=1e6)
    message = refused(adapter, tmp_path / "out", ExitCode.GATE, dtype="fp16")
    assert "fp16" in message and ".weight" in message


# outputs


def test_what_is_there_already_and_proven_is_pointed_to(adapter, tmp_path, capsys):
    out = merge(adapter, tmp_path / "out")
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    assert capsys.readouterr().out == f"{out}\n"
    merge(adapter, out)
    assert capsys.readouterr().out == f"{out}\n"
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before


def test_what_is_there_of_another_adapter_or_damaged_is_replaced_only_by_force(adapter, qlora, tmp_path):
    out = merge(adapter, tmp_path / "out")
    assert "another adapter" in refused(qlora, out, ExitCode.EXISTS)
    assert "another --dtype" in refused(adapter, out, ExitCode.EXISTS, dtype="bf16")
    whole = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(whole[:-1] + b"\x00")
    assert "damaged" in refused(adapter, out, ExitCode.EXISTS)
    merge(adapter, out, force=True)
    assert (out / "model.safetensors").read_bytes() == whole


def test_force_does_not_replace_what_is_no_merged_model(adapter, tmp_path):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("years of work")
    refused(adapter, out, ExitCode.EXISTS)
    refused(adapter, out, ExitCode.EXISTS, force=True)
    assert (out / "chapter.txt").read_text() == "years of work"


def test_an_output_in_or_around_the_adapter_or_the_base_is_refused(adapter, tiny_model):
    for place in (adapter / "merged", adapter, adapter.parent, tiny_model, tiny_model / "x", tiny_model.parent):
        with pytest.raises(UserError) as raised:
            merge(adapter, place, force=True)
        assert raised.value.exit_code == ExitCode.MODEL
    assert (adapter / "adapter_config.json").is_file() and (tiny_model / "config.json").is_file()


def test_a_merged_model_and_a_plain_model_are_no_adapters(adapter, tiny_model, tmp_path):
    out = merge(adapter, tmp_path / "out")
    assert "merged already" in refused(out, tmp_path / "again", ExitCode.MODEL)
    assert "nothing to merge" in refused(tiny_model, tmp_path / "again", ExitCode.MODEL)


def test_a_run_that_trained_every_weight_is_pointed_to(tiny_model, tmp_path, capsys):
    run = RunFolder(tmp_path / "run")
    shutil.copytree(tiny_model, run.model)
    run.write_info({"status": "complete"})
    merge(run.path)
    assert capsys.readouterr().out == f"{run.model}\n"
    refused(run.path, tmp_path / "out", ExitCode.USAGE)


def test_a_runs_adapter_is_merged_into_the_run_on_the_rows_it_held_out(qlora, tmp_path, capsys):
    run = RunFolder(tmp_path / "run")
    shutil.copytree(qlora, run.adapter)
    run.write_info({"status": "complete"})
    run.write_rows("valid.jsonl", [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(30)])
    merge(run.adapter, check=3, json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == "ftkit.merge/1" and report["path"] == str(run.merged)
    assert report["proof"]["probes"] == 3 and report["proof"]["proven"]
    assert (run.merged / MANIFEST).is_file()


# bad adapters and bases


def test_an_adapter_of_another_model_is_refused_with_both_shapes(tiny_model, gpt2, adapter, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    wider = tmp_path / "wider"
    config = LlamaConfig.from_pretrained(tiny_model, hidden_size=64)
    LlamaForCausalLM(config).save_pretrained(wider)
    other = edited(adapter, tmp_path / "a", base_model_name_or_path=str(wider))
    message = refused(other, tmp_path / "out", ExitCode.MODEL)
    assert "[64, 128]" in message or "[64, 64]" in message
    other = edited(adapter, tmp_path / "b", base_model_name_or_path=str(gpt2))
    assert "no layer 'model.layers.0" in refused(other, tmp_path / "out", ExitCode.MODEL)


def test_nan_in_the_adapter_or_in_the_base_is_named(tiny_model, adapter, tmp_path):
    sick = edited(adapter, tmp_path / "sick")
    tensors = load_file(sick / "adapter_model.safetensors")
    name = next(name for name in tensors if "layers.1.mlp.up_proj.lora_B" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, sick / "adapter_model.safetensors")
    message = refused(sick, tmp_path / "out", ExitCode.MODEL)
    assert "NaN" in message and "layers.1.mlp.up_proj" in message
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    tensors = tensors_of(base)
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    message = refused(
        edited(adapter, tmp_path / "well", base_model_name_or_path=str(base)), tmp_path / "out", ExitCode.MODEL
    )
    assert "model.norm.weight" in message


def test_a_damaged_or_incomplete_adapter_is_refused(adapter, qlora, tmp_path):
    weights = "adapter_model.safetensors"
    flipped = edited(qlora, tmp_path / "flipped")
    data = bytearray((flipped / weights).read_bytes())
    data[-5] ^= 1
    (flipped / weights).write_bytes(data)
    assert weights in refused(flipped, tmp_path / "out", ExitCode.MODEL)
    cut = edited(adapter, tmp_path / "cut")
    (cut / weights).write_bytes((adapter / weights).read_bytes()[:-10])
    assert "cut off" in refused(cut, tmp_path / "out", ExitCode.MODEL)
    half = edited(adapter, tmp_path / "half")
    tensors = load_file(half / weights)
    del tensors[next(name for name in tensors if "lora_B" in name)]
    save_file(tensors, half / weights)
    assert "no lora_B" in refused(half, tmp_path / "out", ExitCode.MODEL)
    bare = edited(adapter, tmp_path / "bare")
    (bare / weights).unlink()
    assert weights in refused(bare, tmp_path / "out", ExitCode.MODEL)
    rank = edited(adapter, tmp_path / "rank", r=2)
    assert "rank 4, its config says 2" in refused(rank, tmp_path / "out", ExitCode.MODEL)


def with_header(data, change):
    """A safetensors file with another header."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(change(json.loads(data[8 : 8 + length]))).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def moved(header, by):
    """The header with its last tensor's place, and nothing else, moved."""
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    start, end = header[last]["data_offsets"]
    return header | {last: header[last] | {"data_offsets": [start + by, end + by]}}


def reshaped(header):
    """The header with one more row in its first tensor."""
    first = min(name for name in header if name != "__metadata__")
    shape = header[first]["shape"]
    return header | {first: header[first] | {"shape": [shape[0] + 1, *shape[1:]]}}


def twice(data):
    """The file with its first tensor's name twice in the header."""
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].decode().rstrip()
    header = json.loads(text)
    first = min(name for name in header if name != "__metadata__")
    text = text[:-1] + f", {json.dumps(first)}: {json.dumps(header[first])}}}"
    return len(text).to_bytes(8, "little") + text.encode() + data[8 + length :]


DAMAGE = {
    "cut": (lambda data: data[:-10], "cut off"),
    "pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
    "page": (lambda data: b"<!doctype html><html>not found</html>", "HTML page"),
    "zeros": (lambda data: bytes(len(data)), "filled with zeros"),
    "pickle": (lambda data: b"PK\x03\x04" + data, "pickle"),
    "long header": (lambda data: (2**63).to_bytes(8, "little") + data[8:], "header should be"),
    "name twice": (twice, "twice in the header"),
    "overlap": (lambda data: with_header(data, lambda header: moved(header, -8)), "overlaps"),
    "hole": (lambda data: with_header(data, lambda header: moved(header, 8)) + bytes(8), "leaves a hole"),
    "shape": (lambda data: with_header(data, reshaped), "wrong entry"),
    "nothing": (lambda data: b"", "too short"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("where", ["base", "adapter"])
def test_damaged_files_are_named_with_what_they_are(tiny_model, adapter, tmp_path, kind, where):
    change, words = DAMAGE[kind]
    shutil.copytree(tiny_model, tmp_path / "base")
    other = edited(adapter, tmp_path / "a", base_model_name_or_path=str(tmp_path / "base"))
    file = {"base": tmp_path / "base" / "model.safetensors", "adapter": other / "adapter_model.safetensors"}[where]
    file.write_bytes(change(file.read_bytes()))
    message = refused(other, tmp_path / "out", ExitCode.MODEL)
    assert words in message and str(file) in message


def test_an_empty_adapter_and_a_base_without_one_of_its_shards_are_refused(tiny_model, adapter, tmp_path):
    from transformers import AutoModelForCausalLM

    empty = edited(adapter, tmp_path / "empty")
    save_file({}, empty / "adapter_model.safetensors", {"format": "pt"})
    assert "holds no tensors" in refused(empty, tmp_path / "out", ExitCode.MODEL)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(base, max_shard_size="20KB")
    lost = sorted(base.glob("*.safetensors"))[1]
    lost.unlink()
    other = edited(adapter, tmp_path / "a", base_model_name_or_path=str(base))
    assert lost.name in refused(other, tmp_path / "out", ExitCode.MODEL)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"use_qalora": True}, "QALoRA"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "repeated layers"),
        ({"target_parameters": ["mlp.up_proj.weight"]}, "does not fit the base"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"peft_type": "XLORA"}, "XLORA"),
        ({"peft_type": "IA3"}, "is refused"),
        ({"r": 0}, "r is 0"),
        ({"megatron_core": "os"}, "megatron_core"),
    ],
)
def test_adapters_that_are_not_merged_truly_are_refused(adapter, tmp_path, change, word):
    message = refused(edited(adapter, tmp_path / "edited", **change), tmp_path / "out", ExitCode.MODEL)
    assert word in message


def test_a_base_that_is_quantised_on_disk_is_refused_unless_it_can_and_shall_be_unpacked(tiny_model, adapter, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    config = json.loads((base / "config.json").read_text())
    for method, options in (("bitsandbytes", {}), ("gptq", {"dequantise": True})):
        quantised = {"quantization_config": {"quant_method": method, "load_in_4bit": True}}
        (base / "config.json").write_text(json.dumps(config | quantised))
        other = edited(adapter, tmp_path / method, base_model_name_or_path=str(base))
        assert "quantised on disk" in refused(other, tmp_path / "out", ExitCode.MODEL, **options)


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "fp4", "int8"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_base_that_is_quantised_on_disk_is_unpacked_on_request(tiny_model, gpt2, tmp_path, kind, model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain, targets = {"llama": (tiny_model, LINEAR), "gpt2": (gpt2, ["c_attn", "c_fc", "c_proj"])}[model]
    base, out = tmp_path / "base", tmp_path / "place" / "out"
    dtype = torch.float16 if kind == "int8" else torch.float32
    load_weights(
        find_base(str(plain)), dtype=dtype, device="cpu", quantization=quantization_config(kind, dtype)
    ).save_pretrained(base)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(plain / file, base)
    made = make_adapter(plain, tmp_path / "made", spread=0.05, target_modules=targets)
    adapter = edited(made, tmp_path / "adapter", base_model_name_or_path=str(base))
    unpacked = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, device_map={"": "cpu"}).dequantize()
    expected = logits_of(PeftModel.from_pretrained(unpacked, adapter).float())
    merge(adapter, out, dequantise=True)
    assert torch.allclose(logits_of_folder(out), expected, atol=1e-4 * float(expected.abs().max()))
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert json.loads((out / "merge.json").read_text())["base"]["name"] == base.name
    assert [path.name for path in out.parent.iterdir()] == ["out"]


# another vocabulary


@pytest.mark.parametrize("base", ["tiny_model", "tied"])
@pytest.mark.parametrize(
    "options",
    [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": [512, 514]}],
    ids=["saved along", "saved", "tokens"],
)
def test_a_resized_vocabulary_is_the_adapters(request, tmp_path, base, options):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = request.getfixturevalue(base)

    def resized():
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(515, mean_resizing=False)
        return model

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<a>", "<b>", "<c>"][: 515 - len(tokenizer)])
    torch.manual_seed(1)
    tuned = get_peft_model(resized(), LoraConfig(r=4, target_modules=["q_proj"], **options))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 99, 512, 514, 7]])
    if base == "tied" and "modules_to_save" in options:
        assert "one tensor" in refused(tmp_path / "adapter", tmp_path / "out", ExitCode.MODEL)
        return
    out = merge(tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.config.vocab_size == 515 and merged.get_input_embeddings().weight.shape[0] == 515
    with torch.no_grad():
        expected = PeftModel.from_pretrained(resized(), tmp_path / "adapter").eval()(ids).logits
        assert torch.allclose(merged(ids).logits, expected, atol=1e-4)


def test_a_resized_vocabulary_without_a_head_is_refused(tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(515, mean_resizing=False)
    get_peft_model(model, LoraConfig(r=4, target_modules=["embed_tokens"])).save_pretrained(tmp_path / "adapter")
    message = refused(tmp_path / "adapter", tmp_path / "out", ExitCode.MODEL)
    assert "lm_head.weight" in message and "[515, 32]" in message


# as a shell sees it


@pytest.fixture
def hub():
    """A Hugging Face hub of this machine: (its address, what it was asked). Files come to it in commits."""
    import http.server
    import threading

    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            asked.append((self.path, self.headers.get("authorization"), body))
            place = f"http://127.0.0.1:{self.server.server_port}/me/model"
            answer = {"url": place}
            if "preupload" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                answer = {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
            if "/commit/" in self.path:
                answer = {"commitUrl": f"{place}/commit/abc", "commitOid": "abc"}
            text = json.dumps(answer).encode()
            self.send_response(200 if self.headers.get("authorization") == "Bearer right" else 401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_only_the_flag_pushes_and_only_what_was_proven(adapter, tmp_path, hub, monkeypatch, capsys):
    address, asked = hub
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "right")
    out = merge(adapter, tmp_path / "out", check=1)
    assert not asked
    merge(adapter, out, push_to_hub="me/model")
    assert f"{address}/me/model/commit/abc" in capsys.readouterr().err
    made = json.loads(next(body for path, _, body in asked if path.endswith("/repos/create")))
    assert made.get("visibility") == "private" or made.get("private") is True
    commit = next(body for path, _, body in asked if "/commit/" in path).decode()
    assert all(json.dumps(file.name) in commit for file in out.iterdir())
    refused(adapter, tmp_path / "other", ExitCode.USAGE, no_check=True, push_to_hub="me/model")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(UserError, match="me/model") as raised:
        merge(adapter, out, push_to_hub="me/model")
    assert raised.value.exit_code == ExitCode.ENVIRONMENT and "HF_TOKEN" in raised.value.hint


def test_the_program_prints_the_path_alone_and_the_proof_beside(ftkit, qlora, tmp_path):
    result = ftkit("merge", qlora, "-o", "out")
    assert result.exit_code == 0 and result.stdout == "out\n"
    assert "mean KL" in result.stderr and "live quantised" in result.stderr and "Traceback" not in result.stderr
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        "Modelfile", "README.md", "config.json", "ftkit.json", "generation_config.json", "manifest.json", "merge.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_without_a_run_the_program_says_which_command_makes_one(run_here):
    result = run_here("merge")
    assert result.exit_code == ExitCode.MODEL and result.stdout == ""
    assert "ftkit train" in result.stderr and "Traceback" not in result.stderr


def test_a_run_that_is_not_there_and_a_proof_without_prompts_are_refused(adapter, tmp_path):
    assert "no such run" in refused(tmp_path / "nowhere", tmp_path / "out", ExitCode.MODEL)
    assert "--check 0" in refused(adapter, tmp_path / "out", ExitCode.USAGE, check=0)


@pytest.mark.parametrize(
    ("name", "targets"),
    [("stories260k", LINEAR), ("tinystories-chat-3m", ["q_proj", "v_proj", "out_proj", "c_fc", "c_proj"])],
)
def test_real_models_merge_and_answer_as_base_and_adapter(shared, tmp_path, name, targets):
    adapter = make_adapter(shared / "models" / name, tmp_path / "adapter", target_modules=targets, spread=0.02)
    out = merge(adapter, tmp_path / "out")
    expected = logits_of(load_trained(open_trained(str(adapter)), "cpu", dtype="fp32").model)
    assert torch.allclose(logits_of_folder(out), expected, atol=1e-3)
