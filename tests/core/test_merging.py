"""The arithmetic of a merge, its proof, and the names of tensors: with numbers small enough to work out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.checkpoint_names import parameter_names
from ftkit.core.merging import LowRank, adapter_rank, adapter_scale, apply_delta, delta, is_zero, merge_rows
from ftkit.core.meta_model import build_meta_model
from ftkit.core.proof import LIMITS, WIDEST, Difference, Limits, broken_limits, compare_logits, widened

A = torch.tensor([[1.0, 2.0, 3.0]])  # r = 1, in = 3
B = torch.tensor([[1.0], [-1.0]])  # out = 2


def test_the_update_is_scale_times_b_times_a():
    assert delta(LowRank(A, B, scale=0.5)).tolist() == [[0.5, 1.0, 1.5], [-0.5, -1.0, -1.5]]


def test_the_update_of_a_weight_that_lies_as_in_out_lies_so_too():
    turned = delta(LowRank(A, B, scale=0.5, transposed=True))
    assert turned.tolist() == [[0.5, -0.5], [1.0, -1.0], [1.5, -1.5]]
    assert turned.is_contiguous()


def test_a_bfloat16_weight_is_added_to_in_float32_and_is_left_as_it_is():
    weight = torch.full((2, 3), 256.0, dtype=torch.bfloat16)  # the next bfloat16 is 258
    merged = apply_delta(weight, LowRank(A, B, scale=0.5))
    assert merged.dtype == torch.float32
    assert merged[0].tolist() == [256.5, 257.0, 257.5]
    assert weight.unique().tolist() == [256.0]


@pytest.mark.parametrize(("rows", "width", "rank"), [(300, 5632, 16), (1000, 2048, 7), (160, 11008, 32), (3, 40, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_in_pieces_are_the_whole_sum_to_the_last_bit(rows, width, rank, dtype):
    generator = torch.Generator().manual_seed(rows)
    a, b = torch.randn(rank, width, generator=generator), torch.randn(rows, rank, generator=generator)
    weight = torch.randn(rows, width, generator=generator).to(dtype)
    merged = torch.empty_like(weight)
    merge_rows(weight, a, b, 2.0, merged)
    assert torch.equal(merged, apply_delta(weight, LowRank(a, b, 2.0)).to(dtype))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**31))
def test_a_zero_adapter_changes_no_bit(outputs, inputs, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    update = LowRank(torch.randn(rank, inputs, generator=generator), torch.zeros(outputs, rank), scale=2.0)
    assert torch.equal(apply_delta(weight, update), weight)


def test_the_scale_is_alpha_over_r_or_over_its_root_for_rslora():
    assert adapter_scale({"r": 16, "lora_alpha": 32}, "x.q_proj") == 2.0
    assert adapter_scale({"r": 16, "lora_alpha": 32, "use_rslora": True}, "x.q_proj") == 8.0


def test_patterns_name_layers_with_a_rank_and_an_alpha_of_their_own():
    config = {"r": 8, "lora_alpha": 16, "rank_pattern": {"layers.0.q_proj": 2}, "alpha_pattern": {"v_proj": 4}}
    assert adapter_rank(config, "model.layers.0.q_proj") == 2
    assert adapter_scale(config, "model.layers.0.q_proj") == 8.0
    assert adapter_scale(config, "model.layers.1.v_proj") == 0.5
    assert adapter_scale(config, "model.layers.10.q_proj") == 2.0, "a pattern ends at a dot, not inside a name"


def test_scales_and_ranks_are_those_that_peft_gives_each_layer():
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["0", "1", "2"],
        rank_pattern={"1": 2},
        alpha_pattern={"^2": 10},
    )
    adapted = get_peft_model(model, config)
    for name in ("0", "1", "2"):
        layer = adapted.base_model.model.get_submodule(name)
        assert adapter_rank(config.to_dict(), name) == layer.r["default"]
        assert adapter_scale(config.to_dict(), name) == pytest.approx(layer.scaling["default"], abs=0)


def test_zero_is_told_from_almost_zero():
    assert is_zero(torch.zeros(3))
    assert not is_zero(torch.tensor([0.0, 1e-30]))


def test_equal_logits_have_no_difference():
    logits = torch.randn(6, 7)
    assert compare_logits([logits], [logits]) == Difference(
        6, compare_logits([logits], [logits]).largest_logit, 0.0, 0.0, 1.0
    )


def test_kl_is_that_of_two_coins():
    fair, biased = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    found = compare_logits([fair], [biased])
    assert found.mean_kl == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), abs=1e-7)
    assert found.largest_difference == pytest.approx(math.log(2), abs=1e-6)


def test_kl_is_the_mean_over_positions_however_many_are_compared_at_once():
    p, q = torch.randn(3, 150_000), torch.randn(3, 150_000)
    together = compare_logits([p[:2], p[2:]], [q[:2], q[2:]])
    apart = [compare_logits([p[at : at + 1]], [q[at : at + 1]]) for at in range(3)]
    assert together.mean_kl == pytest.approx(sum(one.mean_kl for one in apart) / 3)
    assert together.agreement == sum(one.agreement for one in apart) / 3 and together.positions == 3


def test_agreement_counts_positions_with_the_same_likeliest_token():
    p = torch.eye(4)
    assert compare_logits([p], [p[[0, 1, 3, 2]]]).agreement == 0.5


def test_what_is_beyond_its_limit_is_told_with_the_limit():
    limits = Limits(relative=0.01, mean_kl=0.001, agreement=0.9)
    assert broken_limits(Difference(100, 10.0, 0.05, 0.0005, 0.95), limits) == []
    logit, kl, token = broken_limits(Difference(100, 10.0, 0.5, 0.5, 0.5), limits)
    assert "0.5 (limit 0.1)" in logit and "0.5 (limit 0.001)" in kl and "50.0%" in token


@pytest.mark.parametrize("rank", [1, 8, 16, 64, 256])
def test_some_rows_of_an_update_are_those_of_the_whole_to_the_bit(rank):
    """What merge relies on when it adds LoRA row by row."""
    torch.manual_seed(rank)
    for outputs, inputs, rows in ((1000, 777, 64), (512, 2048, 100), (2048, 512, 1024), (300, 64, 77)):
        update = LowRank(torch.randn(rank, inputs), torch.randn(outputs, rank), 2.0)
        weight = torch.randn(outputs, inputs)
        parts = [
            apply_delta(weight[at : at + rows], replace(update, b=update.b[at : at + rows]))
            for at in range(0, outputs, rows)
        ]
        assert torch.equal(torch.cat(parts), apply_delta(weight, update))


def test_nan_is_beyond_every_limit():
    nan = float("nan")
    assert len(broken_limits(Difference(10, 1.0, nan, nan, 1.0), LIMITS["BF16"])) == 2


def test_coarser_formats_have_wider_limits():
    kl = [LIMITS[name].mean_kl for name in ("F32", "F16", "BF16")]
    assert kl == sorted(kl) and len(set(kl)) == 3


def test_limits_follow_what_rounding_does_to_a_model_and_end_where_it_is_another_one():
    usual = LIMITS["BF16"]
    assert widened(usual, Difference(100, 10.0, 0.01, 1e-4, 1.0)) == usual
    assert widened(usual, Difference(100, 10.0, 1.0, 0.005, 0.96875)) == Limits(0.4, 0.02, 0.875)
    assert widened(usual, Difference(100, 10.0, 9.0, 1.0, 0.5)) == WIDEST


def test_a_checkpoint_without_the_models_prefix_is_matched_to_its_parameters():
    from transformers import GPT2Config

    model = build_meta_model(
        GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0), torch.float32
    )
    bare = parameter_names(model, ["h.0.attn.c_attn.weight", "wte.weight", "h.0.attn.masked_bias"])
    assert bare == {
        "h.0.attn.c_attn.weight": "transformer.h.0.attn.c_attn.weight",
        "wte.weight": "transformer.wte.weight",
    }
    full = parameter_names(model, ["transformer.wte.weight", "lm_head.weight"])
    assert full == {"transformer.wte.weight": "transformer.wte.weight", "lm_head.weight": "lm_head.weight"}


def test_tensors_that_loading_joins_are_no_parameters_of_their_own():
    from transformers import MixtralConfig

    config = MixtralConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model = build_meta_model(config, torch.float32)
    attention = "model.layers.0.self_attn.q_proj.weight"
    expert = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert parameter_names(model, [attention, expert]) == {attention: attention}
