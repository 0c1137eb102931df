"""An adapter changes nothing until it is trained, and trains as many parameters as PEFT says."""

import pytest
import torch
from architectures import build_model, every_architecture
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from ftkit.core.adapters import check_rank, count_parameters, layer_shape, make_trainable, trainable_parameters
from ftkit.core.batching import make_batch
from ftkit.core.encoding import Example
from ftkit.core.loss import summed_loss
from ftkit.core.meta_model import build_meta_model
from ftkit.core.train_settings import TrainSettings
from ftkit.errors import ExitCode, UserError
from ftkit.io.quantization import quantization_config

BATCH = make_batch(
    [Example([3, 9, 27, 17, 51], [False, False, True, True, True]), Example([5, 25, 61], [False, True, True])]
)


def open_llama():
    """OpenLLaMA-3b-v2, from its config alone."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=3200,
        intermediate_size=8640,
        num_hidden_layers=26,
        num_attention_heads=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )


def on_meta(**settings):
    settings = TrainSettings(**settings)
    model = build_meta_model(
        open_llama(), torch.bfloat16, quantization=quantization_config(settings.recipe, torch.bfloat16)
    )
    with torch.device("meta"):
        return make_trainable(model, settings)


# design, section 11: the counts of the Databricks article
@pytest.mark.parametrize(
    ("rank", "targets", "trainable"),
    [
        (8, "q_proj,v_proj", 2_662_400),
        (16, "q_proj,v_proj", 5_324_800),
        (8, "all-linear", 12_712_960),
        (8, "all-linear,lm_head", 12_994_560),
    ],
)
def test_the_counts_of_openllama_come_out(rank, targets, trainable):
    assert count_parameters(on_meta(r=rank, targets=targets)) == (trainable, 3_426_473_600 + trainable)


def test_four_bit_weights_count_as_the_weights_they_hold():
    assert count_parameters(on_meta(r=8, qlora=True)) == (12_712_960, 3_426_473_600 + 12_712_960)
    assert count_parameters(on_meta(r=8, load_in_8bit=True)) == (12_712_960, 3_426_473_600 + 12_712_960)


def test_full_training_frees_every_weight():
    assert count_parameters(on_meta(full=True)) == (3_426_473_600, 3_426_473_600)


@every_architecture
def test_counts_are_pefts(architecture):
    ours = make_trainable(build_model(architecture), TrainSettings(r=4))
    theirs = get_peft_model(
        build_model(architecture), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    assert count_parameters(ours) == ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@every_architecture
def test_a_new_adapter_changes_nothing(architecture):
    base = build_model(architecture)
    with torch.no_grad():
        before = base(BATCH.input_ids).logits.clone()
        tuned = make_trainable(base, TrainSettings(r=4)).eval()
        assert torch.equal(tuned(input_ids=BATCH.input_ids).logits, before)
        b_weights = [p for name, p in tuned.named_parameters() if "lora_B" in name]
        assert b_weights and not any(p.any() for p in b_weights)
        for weight in b_weights:  # and once B is not zero, it changes something
            torch.nn.init.normal_(weight)
        assert not torch.allclose(tuned(input_ids=BATCH.input_ids).logits, before, atol=1e-3)


def test_the_scale_is_alpha_over_rank_and_only_targets_learn():
    tuned = make_trainable(build_model("llama"), TrainSettings(r=4, alpha=32.0, targets="q_proj", dropout=0.25))
    config = tuned.peft_config["default"]
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 8.0 and layer.lora_dropout["default"].p == 0.25
    assert (config.r, config.lora_alpha, config.bias, config.task_type) == (4, 32.0, "none", "CAUSAL_LM")
    learning = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert len(learning) == 4 and all(".q_proj.lora_" in name for name in learning)
    assert sum(p.numel() for p in trainable_parameters(tuned)) == 2 * (4 * 32 + 32 * 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_adapters_are_float32_whatever_the_base_is(dtype):
    tuned = make_trainable(build_model("llama", dtype), TrainSettings(r=4))
    assert {p.dtype for p in trainable_parameters(tuned)} == {torch.float32}
    assert {p.dtype for p in tuned.parameters() if not p.requires_grad} == {dtype}


@pytest.mark.parametrize("settings", [TrainSettings(r=4), TrainSettings(full=True)], ids=["lora", "full"])
def test_recomputing_activations_changes_no_gradient(settings):
    def gradients(checkpointing):
        options = {**vars(settings), "gradient_checkpointing": checkpointing}
        model = make_trainable(build_model("llama"), TrainSettings(**options)).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.01)
        summed_loss(model, BATCH).backward()
        is_on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        return is_on, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    (is_on, recomputed), (is_on_otherwise, kept) = gradients("on"), gradients("off")
    assert is_on and not is_on_otherwise
    assert recomputed.keys() == kept.keys() and len(kept) > 2
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


def test_a_rank_above_a_layers_width_is_refused_with_the_layer():
    with pytest.raises(
        UserError, match=r"--r 17 is more than model\.layers\.0\.self_attn\.k_proj is wide \(16\)"
    ) as caught:
        make_trainable(build_model("llama"), TrainSettings(r=17))
    assert caught.value.exit_code == ExitCode.USAGE and caught.value.hint == "--r 16 or less"
    check_rank(build_model("llama"), ["q_proj"], 32)  # the narrow layer is no target


def test_layer_shapes_are_inputs_then_outputs_for_conv1d_too():
    gpt2 = build_model("gpt2").transformer.h[0]
    assert layer_shape(gpt2.attn.c_attn) == (32, 96) and layer_shape(gpt2.mlp.c_fc) == (32, 128)
    assert layer_shape(build_model("llama").model.layers[0].self_attn.k_proj) == (32, 16)
