"""Each method trains what PEFT trains, learns, and leaves the base as it is until it has learned."""

import pytest
import torch
from architectures import build_model, every_architecture
from peft import IA3Config, LNTuningConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig

from ftkit.core import adapters
from ftkit.core.adapters import (
    count_parameters,
    make_trainable,
    start_from_rounding,
    to_computer,
    trainable_parameters,
    virtual_tokens,
)
from ftkit.core.batching import make_batch
from ftkit.core.encoding import Example
from ftkit.core.generation import Decoding, start_of
from ftkit.core.loss import counted_logits, summed_loss
from ftkit.core.memory_estimate import Phase
from ftkit.core.methods import METHODS, recipe_of
from ftkit.core.optimizers import make_optimizer, set_learning_rate
from ftkit.core.packing_check import packing_fault
from ftkit.core.planned_run import PlannedRun
from ftkit.core.train_settings import TrainSettings
from ftkit.core.training_memory import training_memory
from ftkit.errors import ExitCode, UserError
from ftkit.io.quantization import quantization_of

ROWS = [Example([3, 9, 27, 17, 51], [False, False, True, True, True]), Example([5, 25, 61], [False, True, True])]
BATCH = make_batch(ROWS)
PEFTS = {
    "dora": (
        {"dora": True},
        lambda: LoraConfig(r=4, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"),
    ),
    "ranks": (
        {"rank_pattern": "q_proj=2"},
        lambda: LoraConfig(r=4, rank_pattern={"q_proj": 2}, target_modules="all-linear", task_type="CAUSAL_LM"),
    ),
    "ia3": ({"method": "ia3"}, lambda: IA3Config(task_type="CAUSAL_LM")),
    "ln": ({"method": "ln"}, lambda: LNTuningConfig(task_type="CAUSAL_LM")),
    "prompt": ({"method": "prompt"}, lambda: PromptTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM")),
    "prefix": ({"method": "prefix"}, lambda: PrefixTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM")),
}
WAYS = {
    "lora": {},
    "dora": {"dora": True},
    "rslora": {"rslora": True},
    "pissa": {"lora_init": "pissa"},
    "lora+": {"lora_plus": 16.0},
    "ia3": {"method": "ia3"},
    "ln": {"method": "ln"},
    "prompt": {"method": "prompt"},
    "prefix": {"method": "prefix"},
    "last block": {"train_layers": "last:1"},
    "all but embeddings": {"freeze": "embed"},
    "full": {"full": True},
}


def made(architecture="llama", **settings):
    torch.manual_seed(1)
    return make_trainable(build_model(architecture), TrainSettings(r=4, **settings))


def learning(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------- counts
@pytest.mark.parametrize("name", PEFTS)
def test_as_many_parameters_are_trained_as_peft_trains(name):
    options, config = PEFTS[name]
    theirs = get_peft_model(build_model("llama"), config())
    assert count_parameters(made(**options)) == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("architecture", ["gpt2", "gpt-neox", "opt", "falcon"])
@pytest.mark.parametrize("method", ["ia3", "prefix"])
def test_other_architectures_get_pefts_counts_too(architecture, method):
    theirs = get_peft_model(build_model(architecture), PEFTS[method][1]())
    assert count_parameters(made(architecture, method=method)) == theirs.get_nb_trainable_parameters()


def test_counts_by_hand():
    """Llama with 2 blocks, width 32, MLP 48, two key heads of 8: what each selective method frees."""
    block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    assert count_parameters(made(train_layers="first:1"))[0] == block
    assert count_parameters(made(train_layers="last:2"))[0] == 2 * block + 32 + 64 * 32  # final norm and own head
    assert count_parameters(made(method="ln"))[0] == 5 * 32
    assert count_parameters(made(method="prompt", virtual_tokens=7))[0] == 7 * 32
    assert count_parameters(made(method="prefix", virtual_tokens=7))[0] == 7 * 2 * 2 * 16
    assert count_parameters(made(method="ia3"))[0] == 2 * (16 + 16 + 48)


@every_architecture
def test_norms_and_biases_are_found_in_every_architecture(architecture):
    names = dict(build_model(architecture).named_parameters())
    norms = {name for name in names if ("norm" in name.lower() or "ln_" in name) and names[name].ndim == 1}
    copied = {name.replace(".ln_tuning_layers.default", "") for name in learning(made(architecture, method="ln"))}
    assert {name.removeprefix("base_model.model.") for name in copied} == norms
    biases = {name for name in names if name.endswith(".bias")}
    if biases:
        assert learning(made(architecture, method="bitfit")) == biases
    else:
        with pytest.raises(UserError, match="has no biases") as refused:
            made(architecture, method="bitfit")
        assert refused.value.exit_code == ExitCode.MODEL and "--method ln" in refused.value.hint


# ---------------------------------------------------------------- choices by name
def test_layers_are_chosen_by_place_and_by_name():
    assert learning(made("llama-tied", train_layers="last:1")) == {
        name for name, _ in build_model("llama-tied").named_parameters() if ".1." in name or name == "model.norm.weight"
    }
    only_values = learning(made(train_layers=r"v_proj|lm_head"))
    assert only_values == {f"model.layers.{n}.self_attn.v_proj.weight" for n in (0, 1)} | {"lm_head.weight"}
    rest = learning(made(freeze="embed_tokens|lm_head"))
    assert rest == {
        name for name, _ in build_model("llama").named_parameters() if ".layers." in name or ".norm." in name
    }
    assert learning(made(train_layers="last:1", freeze="mlp|norm|lm_head")) == {
        f"model.layers.1.self_attn.{kind}_proj.weight" for kind in "qkvo"
    }


@pytest.mark.parametrize(
    ("options", "status", "words", "hint"),
    [
        ({"train_layers": "last:3"}, ExitCode.USAGE, "the model has 2 blocks", "last:2"),
        ({"train_layers": "first:0"}, ExitCode.USAGE, "2 blocks", "first:1"),
        ({"train_layers": "nothing_of_that"}, ExitCode.MODEL, "no tensor's name matches", "model.layers.N.self_attn"),
        ({"train_layers": "(["}, ExitCode.USAGE, "no regular expression", "--train-layers"),
        ({"freeze": "."}, ExitCode.MODEL, "leaves nothing to train", "tensors: "),
        ({"method": "ln", "targets": "q_proj"}, ExitCode.MODEL, "no norm is called 'q_proj'", "input_layernorm"),
        ({"method": "ia3", "targets": "q_prj"}, ExitCode.MODEL, "no linear layer is called", "q_proj"),
        ({"rank_pattern": "q_prj=2"}, ExitCode.MODEL, "no adapted layer is called 'q_prj'", "did you mean 'q_proj'"),
        ({"rank_pattern": "q_proj"}, ExitCode.USAGE, "is not NAME=RANK", "q_proj=8"),
        ({"rank_pattern": "k_proj=17"}, ExitCode.USAGE, "--r 17 is more than", "--r 16"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_with_what_would(options, status, words, hint):
    with pytest.raises(UserError, match=words.replace("(", r"\(")) as refused:
        made(**options)
    assert refused.value.exit_code == status and hint in refused.value.hint


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "ia3", "dora": True}, "--dora is an option of LoRA, the method is ia3"),
        ({"full": True, "lora_plus": 2.0}, "--lora-plus is an option of LoRA, the method is full"),
        ({"method": "bitfit", "rank_pattern": "q=2"}, "--rank-pattern is an option of LoRA"),
        ({"method": "ia3", "qlora": True}, "--qlora and --method contradict each other"),
        ({"method": "bitfit", "quantize": "nf4"}, "trains the weights themselves"),
        ({"train_layers": "last:1", "quantize": "int8"}, "trains the weights themselves"),
        ({"full": True, "quantize": "nf4"}, "trains the weights themselves"),
        ({"qlora": True, "quantize": "fp4"}, "--qlora and --quantize contradict"),
        ({"double_quant": "off"}, "--double-quant is about 4-bit bases"),
        ({"quantize": "int8", "double_quant": "off"}, "--double-quant is about 4-bit bases"),
        ({"keep_16bit": "q_proj"}, "--keep-16bit leaves layers out"),
        ({"lora_init": "loftq"}, "makes up for the rounding of 4 bits"),
        ({"lora_init": "loftq", "load_in_8bit": True}, "makes up for the rounding of 4 bits"),
        ({"lora_init": "pissa", "qlora": True}, "which are quantised here"),
        ({"dora": True, "load_in_8bit": True}, "--dora on an 8-bit base"),
        ({"lora_init": "pissa", "dora": True}, "--lora-init pissa and --dora contradict"),
        ({"method": "ia3", "freeze": "mlp"}, "--freeze is an option of bitfit and --train-layers, the method is ia3"),
        ({"method": "prompt", "targets": "q_proj"}, "--targets is an option of LoRA, ia3 and ln, the method is prompt"),
        ({"method": "ln", "train_layers": "last:1"}, "--train-layers is a method of its own"),
        ({"qlora": True, "save": "full"}, "--save is an option of bitfit, --train-layers and full, the method is LoRA"),
        ({"init": "folder", "train_layers": "last:1"}, "--init trains every weight"),
        ({"method": "ln", "dtype": "fp16"}, "too narrow"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, words):
    with pytest.raises(UserError, match=words) as refused:
        TrainSettings(**options).check()
    assert refused.value.exit_code == ExitCode.USAGE and refused.value.hint


def test_every_recipe_says_how_its_base_is_held():
    for method in METHODS:
        for kind in (None, "nf4", "nf4-dq", "fp4", "fp4-dq", "int8"):
            assert quantization_of(recipe_of(method, kind)) == kind
    assert TrainSettings(method="ia3", quantize="fp4", double_quant="off").recipe == "ia3/fp4"
    assert TrainSettings(quantize="nf4").recipe == "qlora" and TrainSettings(method="lora").recipe == "lora"


# ---------------------------------------------------------------- learning
@pytest.mark.parametrize("way", WAYS)
def test_every_method_learns_what_it_is_shown_and_nothing_else_moves(way):
    model = made(**WAYS[way])
    settings = TrainSettings(**WAYS[way])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rate = {"ia3": 0.1, "ln": 0.1, "prompt": 0.1, "prefix": 0.3}.get(way, 0.01)
    optimizer = make_optimizer(model, "adamw", rate, 0.0, settings.lora_plus)
    losses = []
    for _ in range(12):
        loss = summed_loss(model, BATCH)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0], losses
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= learning(model)


@pytest.mark.parametrize("way", ["dora", "rslora", "pissa", "ia3", "ln"])
def test_a_new_adapter_changes_nothing(way):
    before = build_model("llama")(BATCH.input_ids).logits
    tuned = made(**WAYS[way]).eval()
    torch.testing.assert_close(tuned(input_ids=BATCH.input_ids).logits, before, rtol=1e-4, atol=1e-4)


def test_lora_plus_lets_the_second_factor_learn_faster():
    model = made(lora_plus=16.0)
    optimizer = make_optimizer(model, "adamw", 0.01, 0.1, 16.0)
    set_learning_rate(optimizer, 0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {group["lr"]: {".lora_B." in names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert rates == {0.5: {False}, 8.0: {True}}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trainable_parameters(model))


# ---------------------------------------------------------------- virtual tokens
@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_a_rows_logits_behind_virtual_tokens_are_pefts_own(architecture, method):
    model = made(architecture, method=method, virtual_tokens=5).eval()
    with torch.no_grad():
        ours = counted_logits(model, BATCH.input_ids, BATCH.counted)
        theirs = torch.cat(
            [model(input_ids=torch.tensor([row.ids[:-1]])).logits[0, -len(row.ids) + 1 :] for row in ROWS]
        )
        plain = torch.cat([model.get_base_model()(torch.tensor([row.ids[:-1]])).logits[0] for row in ROWS])
    where = torch.tensor([at for row, start in zip(ROWS, (0, 4), strict=True) for at in
                          (start + i - 1 for i, is_counted in enumerate(row.counted) if is_counted)])  # fmt: skip
    torch.testing.assert_close(ours, theirs[where], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, plain[where], atol=1e-2)
    with model.disable_adapter(), torch.no_grad():
        assert virtual_tokens(model) == 0
        torch.testing.assert_close(counted_logits(model, BATCH.input_ids, BATCH.counted), plain[where])
    assert virtual_tokens(model) == 5
    assert "virtual tokens" in (packing_fault(model, ROWS, "cpu") or "")


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_answers_are_generated_behind_the_virtual_tokens(method):
    model = made(method=method, virtual_tokens=5).eval()
    prompts = [[7, 8, 9] * 8 + [11, 12], [7, 8, 9] * 8 + [13]]
    start = start_of(model, prompts)
    assert start is None or start.length > 5
    together = Decoding(model, prompts, start).logits()
    for place, prompt in enumerate(prompts):
        decoding = Decoding(model, [prompt])
        alone = decoding.logits()[0]
        with torch.no_grad():
            reference = model(input_ids=torch.tensor([prompt])).logits[0, -1]
            longer = model(input_ids=torch.tensor([[*prompt, 3]])).logits[0, -1]
        torch.testing.assert_close(alone, reference, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together[place], reference, rtol=1e-4, atol=1e-4)
        decoding.append([3])
        torch.testing.assert_close(decoding.logits()[0], longer, rtol=1e-4, atol=1e-4)


def test_factors_that_begin_at_one_do_not_decay():
    model = made(method="ia3")
    groups = make_optimizer(model, "adamw", 0.01, 0.1).param_groups
    assert [group["weight_decay"] for group in groups] == [0.0]
    assert {group["weight_decay"] for group in make_optimizer(made(), "adamw", 0.01, 0.1).param_groups} == {0.1}


# ---------------------------------------------------------------- starts
def test_pissas_factors_are_the_largest_singular_vectors():
    weight = build_model("llama").model.layers[0].self_attn.q_proj.weight.detach()
    layer = made(lora_init="pissa").base_model.model.model.layers[0].self_attn.q_proj
    u, s, v = torch.linalg.svd(weight)
    product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(product.detach(), u[:, :4] * s[:4] @ v[:4], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close((layer.base_layer.weight + product).detach(), weight, rtol=1e-4, atol=1e-4)


def test_loftq_begins_with_the_best_low_rank_form_of_what_was_rounded_away():
    model = made()
    errors = [(name, torch.randn(module.weight.shape)) for name, module in build_model("llama").named_modules()
              if name.endswith(("k_proj", "down_proj"))]  # fmt: skip
    start_from_rounding(model, errors)
    for name, error in errors:
        layer = model.get_submodule(f"base_model.model.{name}")
        product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        left = torch.linalg.svdvals((error - product).detach())
        torch.testing.assert_close(left[: len(left) - 4], torch.linalg.svdvals(error)[4:], rtol=1e-3, atol=1e-4)
        assert layer.lora_A["default"].weight.dtype == torch.float32


def test_one_block_in_n_is_recomputed():
    def recomputed(**options):
        model = make_trainable(build_model("llama"), TrainSettings(r=4, gradient_checkpointing="on", **options))
        return [layer.gradient_checkpointing for layer in model.base_model.model.model.layers]

    assert recomputed() == [True, True] and recomputed(checkpoint_every=2) == [True, False]


def test_gradients_are_the_same_with_one_block_in_two_recomputed():
    found = []
    for options in ({}, {"gradient_checkpointing": "on", "checkpoint_every": 2}):
        torch.manual_seed(1)
        model = make_trainable(build_model("llama"), TrainSettings(full=True, **options)).train()
        summed_loss(model, BATCH).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-5)


def test_gradients_are_the_same_to_the_bit_with_kept_activations_elsewhere(monkeypatch):
    moved, found = [], []
    monkeypatch.setattr(adapters, "to_computer", lambda kept: moved.append(kept) or to_computer(kept))
    for offload in (False, True):
        torch.manual_seed(1)
        settings = TrainSettings(r=4, gradient_checkpointing="on", offload_activations=offload)
        model = make_trainable(build_model("llama"), settings).train()
        summed_loss(model, BATCH).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        assert len(moved) == 2 * offload  # one input for each of the two blocks, and nothing else
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_a_simulation_sees_less_kept_where_it_is_elsewhere():
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    config = LlamaConfig(num_hidden_layers=8, **sizes)
    run = PlannedRun(
        "lora", "fp32", tokens=513, rows=8, micro_steps=1, optimizer="adamw", pack=False, checkpointing=True
    )
    peaks = []
    for offload in (False, True):
        settings = TrainSettings(r=4, gradient_checkpointing="on", offload_activations=offload)
        peaks.append(training_memory(settings, run, config, None).phases[Phase.BACKWARD])
    kept = 8 * 512 * 256 * 4  # of one block; those at work, first and last, are there anyway
    assert peaks[0] - peaks[1] >= 5 * kept
