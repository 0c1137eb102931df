"""The models of bench/gpu.py: published shapes, random weights, a tokenizer of their own; and what a token costs them."""

import gc
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from train_jobs import write_json
from transformers import AutoModelForCausalLM, LlamaConfig

LLAMA = {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072, "vocab_size": 128256}
SIZES: dict[str, dict[str, Any]] = {
    "1B": {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "tie_word_embeddings": True},
    "8B": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "tie_word_embeddings": False},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": False},
}  # fmt: skip
"""Of Llama-3.2-1B and Llama-3.1-8B (their config.json), and one to try the command with."""


def make_model(folder: Path, size: str) -> Path:
    """A folder with bfloat16 weights and a byte-level tokenizer."""
    folder.mkdir(parents=True)
    config = LlamaConfig(**SIZES[size], pad_token_id=256, bos_token_id=256, eos_token_id=257)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    del model
    gc.collect()
    torch.cuda.empty_cache()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<s>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **marks})
    return folder


def model_flops(size: str, length: int, rank: int = 8) -> float:
    """FLOPs a token of a training step of LoRA, in a row of `length` tokens that all attend causally.

    4 a frozen weight (forward, and the gradient of its input), 6 a trained one, 12 a layer, width and pair for attention
    (arXiv:2204.02311, appendix B, with causal halves left out); nothing is computed twice.
    """
    shape = SIZES[size]
    width, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    narrow = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    linears = [
        (width, width),
        (width, narrow),
        (width, narrow),
        (width, width),
        (width, inner),
        (width, inner),
        (inner, width),
    ]
    frozen = layers * sum(a * b for a, b in linears) + width * shape["vocab_size"]
    trained = layers * sum(rank * (a + b) for a, b in linears)
    return 4.0 * frozen + 6.0 * trained + 12.0 * layers * width * length / 2
