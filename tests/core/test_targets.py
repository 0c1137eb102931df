"""`--targets` means what PEFT means, and its keywords divide a model in two."""

import pytest
from architectures import build_model, every_architecture
from peft import LoraConfig, get_peft_model
from torch import nn

from ftkit.core.targets import is_in_attention, linear_layers, resolve_targets, shortest_suffixes
from ftkit.errors import ExitCode, UserError

ATTENTION = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "gpt2": {"attn.c_attn", "attn.c_proj"},
    "gpt-neox": {"attention.query_key_value", "attention.dense"},
    "gpt-neo": {"attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj"},
    "opt": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"},
    "falcon": {"self_attention.query_key_value", "self_attention.dense"},
}
MLP = {
    "llama": {"gate_proj", "up_proj", "down_proj"},
    "gpt2": {"mlp.c_fc", "mlp.c_proj"},
    "gpt-neox": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "gpt-neo": {"mlp.c_fc", "mlp.c_proj"},
    "opt": {"fc1", "fc2"},
    "falcon": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
}


def adapted_layers(model, targets):
    """The layers that PEFT puts an adapter on."""
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    return {
        name.removeprefix("base_model.model.") for name, module in tuned.named_modules() if hasattr(module, "lora_A")
    }


def named(model, ends):
    return {full for full in linear_layers(model) for end in ends if full.endswith("." + end)}


def matched(model, targets):
    return {
        name for name in linear_layers(model) for target in targets if name == target or name.endswith("." + target)
    }


@every_architecture
def test_all_linear_is_what_peft_takes_it_for(architecture):
    theirs = adapted_layers(build_model(architecture), "all-linear")
    targets = resolve_targets(build_model(architecture), "all-linear")
    assert adapted_layers(build_model(architecture), targets) == theirs
    assert len(theirs) >= 8 and not any("head" in name or "embed" in name for name in theirs)


@pytest.mark.parametrize("name", list(ATTENTION))
def test_attention_and_mlp_are_the_two_halves_of_a_model(name):
    model = build_model(name)
    attention, mlp = (matched(model, resolve_targets(model, word)) for word in ("attention", "mlp"))
    assert attention == named(model, ATTENTION[name]) and mlp == named(model, MLP[name])
    assert attention | mlp == matched(model, resolve_targets(model, "all-linear")) and not attention & mlp
    assert resolve_targets(model, "attention,mlp") == resolve_targets(model, "all-linear")


def test_gpt2_has_a_c_proj_in_both_halves_and_each_is_told_from_the_other():
    model = build_model("gpt2")
    assert resolve_targets(model, "attention") == ["attn.c_proj", "c_attn"]
    assert resolve_targets(model, "mlp") == ["c_fc", "mlp.c_proj"]
    assert resolve_targets(model, "attn.c_proj") == ["attn.c_proj"]
    assert resolve_targets(model, "c_proj") == ["c_proj"]
    assert adapted_layers(build_model("gpt2"), resolve_targets(model, "attention")) == {
        f"transformer.h.{layer}.attn.{name}" for layer in (0, 1) for name in ("c_attn", "c_proj")
    }


def test_a_list_mixes_keywords_and_names():
    model = build_model("llama")
    assert resolve_targets(model, "q_proj,v_proj") == ["q_proj", "v_proj"]
    assert resolve_targets(model, " q_proj , mlp ") == ["down_proj", "gate_proj", "q_proj", "up_proj"]
    assert resolve_targets(model, "all-linear,lm_head") == sorted([*ATTENTION["llama"], *MLP["llama"], "lm_head"])
    assert adapted_layers(build_model("llama"), resolve_targets(model, "all-linear,lm_head")) == set(
        linear_layers(model)
    )


def test_a_name_may_mean_one_layer_only():
    model = build_model("llama")
    assert resolve_targets(model, "layers.1.self_attn.q_proj") == ["1.self_attn.q_proj"]
    assert adapted_layers(build_model("llama"), ["1.self_attn.q_proj"]) == {"model.layers.1.self_attn.q_proj"}


def test_an_output_head_that_shares_the_embeddings_weight_is_refused():
    model = build_model("llama-tied")
    for spec in ("lm_head", "all-linear,lm_head"):
        with pytest.raises(UserError, match="lm_head shares its weight") as caught:
            resolve_targets(model, spec)
        assert caught.value.exit_code == ExitCode.MODEL and "all-linear" in caught.value.hint
    assert "lm_head" not in resolve_targets(model, "all-linear")


@pytest.mark.parametrize("spec", ["q_prj", "all-linear,q_prj", "q_prj,v_proj"])
def test_an_unknown_name_is_refused_with_the_nearest_and_all_there_are(spec):
    with pytest.raises(UserError, match="'q_prj'") as caught:
        resolve_targets(build_model("llama"), spec)
    assert caught.value.exit_code == ExitCode.MODEL
    assert (
        "did you mean 'q_proj'?" in caught.value.hint
        and "down_proj" in caught.value.hint
        and "all-linear" in caught.value.hint
    )


@pytest.mark.parametrize("spec", ["", ",", "embed_tokens", "proj", "norm"])
def test_what_is_no_linear_layer_is_refused(spec):
    with pytest.raises(UserError, match="no linear layer"):
        resolve_targets(build_model("llama"), spec)


def test_linear_layers_are_also_those_that_inherit_from_torchs():
    """Falcon has a linear class of its own; PEFT and bitsandbytes go by inheritance."""
    layers = linear_layers(build_model("falcon"))
    assert {type(module).__name__ for module in layers.values()} == {"FalconLinear", "Linear"}
    assert all(isinstance(module, nn.Linear) for module in layers.values()) and len(layers) == 2 * 4 + 1


def test_the_block_decides_what_is_attention():
    assert is_in_attention("model.layers.0.self_attn.q_proj") and is_in_attention("h.0.attn.attention.q_proj")
    assert not is_in_attention("model.layers.0.mlp.up_proj") and not is_in_attention("model.layers.0.attn_like")


def test_shortest_suffixes_by_hand():
    layers = {"a.x.p", "a.y.p", "b.x.p", "b.q"}
    assert shortest_suffixes({"a.x.p", "b.x.p"}, layers) == ["x.p"]
    assert shortest_suffixes({"a.x.p"}, layers) == ["a.x.p"]
    assert shortest_suffixes({"a.x.p", "a.y.p", "b.x.p"}, layers) == ["p"]
    assert shortest_suffixes({"b.q"}, layers) == ["q"]
