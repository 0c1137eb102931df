"""A model that takes its weights from its files while it runs: the same logits as loaded, and nothing kept."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)

from ftkit.commands.merge_proof import file_weights, run_from_files
from ftkit.core.streaming import build_placeholder_model, is_placeholder, linear, stream_weights
from ftkit.io.base_model import Base
from ftkit.io.shards import read_layout
from ftkit.io.tensors import FileWeight

IDS = torch.tensor([[5, 60, 31, 7, 22, 42, 18], [1, 2, 3, 4, 5, 6, 7]])
SMALL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": None,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen with biases": Qwen2Config(**SMALL),
    "gemma, scaled embeddings": Gemma3TextConfig(**SMALL, sliding_window=4),
    "gpt2, turned layers": GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=32, vocab_size=64),
    "gpt-neo, windows": GPTNeoConfig(
        vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
        window_size=3, max_position_embeddings=32,
    ),
    "gpt-neox": GPTNeoXConfig(**{name: value for name, value in SMALL.items() if "key_value" not in name}),
}  # fmt: skip


def saved(config, folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_streamed_model_answers_as_the_loaded_one_and_keeps_no_matrix(name, tmp_path):
    config = CONFIGS[name]
    expected = saved(config, tmp_path)(IDS).logits
    model = run_from_files(Base("x", str(tmp_path)), config)
    for _ in range(2):
        assert torch.allclose(model(IDS).logits, expected, atol=1e-4)
    assert all(is_placeholder(p) for p in model.parameters() if p.ndim > 1)
    assert not any(is_placeholder(p) for p in model.parameters() if p.ndim == 1)


@torch.no_grad()
def test_resident_weights_are_in_memory_on_both_sides_of_a_tie(tmp_path):
    config = CONFIGS["llama tied"]
    expected = saved(config, tmp_path)(IDS).logits
    model = build_placeholder_model(config, torch.float32)
    stream_weights(model, file_weights(model, tmp_path), resident=["model.embed_tokens.weight"])
    assert model.lm_head.weight is model.model.embed_tokens.weight and not is_placeholder(model.lm_head.weight)
    assert torch.allclose(model(IDS).logits, expected, atol=1e-4)


def test_files_that_are_joined_while_loading_cannot_be_streamed(tmp_path):
    config = MixtralConfig(**SMALL, num_local_experts=2)
    saved(config, tmp_path)
    assert file_weights(build_placeholder_model(config, torch.float32), tmp_path) is None


@torch.no_grad()
def test_a_weight_that_is_used_unseen_shows_in_the_logits():
    config = CONFIGS["llama"]
    assert build_placeholder_model(config, torch.float32)(IDS).logits.isnan().all()


@torch.no_grad()
def test_a_linear_layer_is_the_same_whether_threads_share_its_rows(tmp_path):
    save_file({"weight": torch.randn(70, 24)}, tmp_path / "model.safetensors")
    weight = FileWeight(read_layout(tmp_path)["weight"])
    x, layer = torch.randn(2, 3, 24), torch.nn.Linear(24, 70)
    alone = linear(layer, weight, x)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        shared = linear(layer, weight, x)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    right = torch.nn.functional.linear(x, load_file(tmp_path / "model.safetensors")["weight"], layer.bias)
    assert torch.allclose(alone, right, atol=1e-5) and torch.allclose(shared, right, atol=1e-5)
    assert [first for first, _ in weight.split(3)] == [0, 23, 46] and len(weight.split(100)) == 70
