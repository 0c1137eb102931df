"""A Llama folder as a LitGPT checkpoint, by LitGPT's own functions: VENV/bin/python bench/litgpt_checkpoint.py FOLDER OUT

`litgpt convert_to_litgpt` knows models by their published names only; this one has none.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from litgpt.config import Config
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import save_config
from safetensors.torch import load_file


def main(source: Path, out: Path) -> None:
    """Write lit_model.pth, model_config.yaml and the tokenizer."""
    facts = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = Config(
        name=out.name, block_size=facts["max_position_embeddings"], vocab_size=facts["vocab_size"],
        padded_vocab_size=facts["vocab_size"], n_layer=facts["num_hidden_layers"], n_head=facts["num_attention_heads"],
        n_query_groups=facts["num_key_value_heads"], n_embd=facts["hidden_size"], rotary_percentage=1.0, bias=False,
        parallel_residual=False, norm_class_name="RMSNorm", norm_eps=facts["rms_norm_eps"],
        mlp_class_name="LLaMAMLP", intermediate_size=facts["intermediate_size"],
    )  # fmt: skip
    weights: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, weights, load_file(source / "model.safetensors"))
    out.mkdir(parents=True, exist_ok=True)
    torch.save(weights, out / "lit_model.pth")
    save_config(config, out)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
