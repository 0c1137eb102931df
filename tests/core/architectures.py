"""Small models of many architectures with random weights, for what must hold whatever the architecture is."""

import pytest
import torch
import transformers

torch.set_num_threads(1)  # sums in a fixed order, and no fight for cores between test processes

WIDTHS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CONTEXT = {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
GROUPED = {**WIDTHS, **CONTEXT, "num_key_value_heads": 2}
NEO = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
SOFT_CAPS = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}
UNTIED = {"tie_word_embeddings": False}

# name: (config class, its settings); large initial weights make the logits differ from token to token
ARCHITECTURES = {
    "llama": ("LlamaConfig", {**GROUPED, **UNTIED}),
    "llama-tied": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**GROUPED, **UNTIED, "sliding_window": 6}),
    "qwen2": ("Qwen2Config", {**GROUPED, **UNTIED}),
    "qwen3": ("Qwen3Config", {**GROUPED, **UNTIED, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 8, "sliding_window": 6, **SOFT_CAPS}),
    "granite": ("GraniteConfig", {**GROUPED, "logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "cohere": ("CohereConfig", {**GROUPED, "logit_scale": 0.25}),
    "gpt2": ("GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt-neox": ("GPTNeoXConfig", {**WIDTHS, **CONTEXT, **UNTIED}),
    "gpt-neo": ("GPTNeoConfig", {**NEO, "attention_types": [[["global", "local"], 1]], "window_size": 6}),
    "opt": ("OPTConfig", {**WIDTHS, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "falcon": ("FalconConfig", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
}


def config_of(name):
    kind, values = ARCHITECTURES[name]
    return getattr(transformers, kind)(**values, initializer_range=0.2)


def build_model(name, dtype=torch.float32):
    """The same weights each time, in evaluation mode (GPT-2 has dropout)."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config_of(name), dtype=dtype).eval()


every_architecture = pytest.mark.parametrize("architecture", list(ARCHITECTURES))
