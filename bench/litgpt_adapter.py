"""A LoRA that LitGPT trained, as PEFT saves one."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from train_ways import ALPHA, LINEAR, RANK

PLAIN = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}


def convert_adapter(checkpoint: Path, model: Path, folder: Path) -> Path:
    """Write the adapter of a lit_model.pth.lora into a folder; its path."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    groups = config["hidden_size"] * config["num_key_value_heads"] // config["num_attention_heads"]
    found = torch.load(checkpoint, weights_only=True)["model"]
    tensors: dict[str, Tensor] = {}
    for name, tensor in found.items():
        _, _, layer, block, linear, part = name.split(".")
        kind = f"{block}.{linear}"
        if kind in PLAIN:
            pieces = {PLAIN[kind]: tensor}
        else:  # q, k and v lie one below the other, in A (3 r, in) and in B (out, r)
            sizes = [RANK] * 3 if part == "lora_A" else [config["hidden_size"], groups, groups]
            names = [f"self_attn.{letter}_proj" for letter in "qkv"]
            pieces = dict(zip(names, torch.split(tensor, sizes), strict=True))
        for target, piece in pieces.items():
            tensors[f"base_model.model.model.layers.{layer}.{target}.{part}.weight"] = piece.float().contiguous()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    facts = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": LINEAR,
             "base_model_name_or_path": str(model)}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder
