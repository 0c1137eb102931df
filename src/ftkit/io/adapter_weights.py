"""The tensors of an adapter in PEFT's layout, by layer: found, named and checked, not yet read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftkit.errors import ExitCode, UserError
from ftkit.io.shards import TensorPlace, read_header
from ftkit.io.trained import read_adapter_config

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = {".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_embedding_A": "a", ".lora_embedding_B": "b"}
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
NOT_MERGED = {
    "use_dora": "DoRA",
    "alora_invocation_tokens": "activated LoRA",
    "lora_bias": "LoRA with biases",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trainable tokens",
    "layer_replication": "repeated layers",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow",
}


@dataclass(frozen=True)
class Pair:
    """Where the two factors of one layer's update lie: a (r, in), b (out, r)."""

    a: TensorPlace
    b: TensorPlace


@dataclass(frozen=True)
class Adapter:
    """What an adapter folder holds.

    pairs: layer name in the base model -> its factors. saved: parameter name -> the whole tensor that replaces the
    base's (before an update of the same layer is added).
    """

    folder: Path
    config: dict[str, Any]
    pairs: dict[str, Pair]
    saved: dict[str, TensorPlace]


def open_adapter_weights(folder: Path) -> Adapter:
    """The adapter of a folder; what ftkit does not merge, or what is no part of an adapter, is exit 4."""
    config = read_adapter_config(folder)
    refuse_unmerged(folder, config)
    halves: dict[str, dict[str, TensorPlace]] = {}
    saved: dict[str, TensorPlace] = {}
    for key, place in read_header(folder / WEIGHTS).items():
        name = key.removeprefix(PREFIX)
        part = next((end for end in PARTS if name.endswith(end)), None)
        if part is not None:
            halves.setdefault(name.removesuffix(part), {})[PARTS[part]] = place
        elif is_saved_whole(name, config):
            saved[name.replace(".base_layer.", ".")] = place
        else:
            raise UserError(f"{folder}: its tensor '{key}' belongs to nothing that ftkit merges", ExitCode.MODEL)
    if not halves and not saved:
        raise UserError(f"{folder / WEIGHTS}: holds no tensors", ExitCode.MODEL)
    return Adapter(folder, config, {name: whole_pair(folder, name, parts) for name, parts in halves.items()}, saved)


def is_saved_whole(name: str, config: dict[str, Any]) -> bool:
    """True for a tensor of `modules_to_save`, or the weight of an adapted embedding or head, which PEFT saves along."""
    modules = config.get("modules_to_save") or ()
    return ".base_layer." in name or any(f".{module}." in f".{name}" for module in modules)


def refuse_unmerged(folder: Path, config: dict[str, Any]) -> None:
    """Kinds of adapters that cannot be merged truly (yet) are refused, never merged in part."""
    for key, name in NOT_MERGED.items():
        if config.get(key):
            raise unmerged(folder, f"{name} ({key})")
    if config.get("bias", "none") != "none":
        raise unmerged(folder, f"trained biases (bias: {config['bias']})")
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:  # such a start changes the base, so base + adapter is not what was trained
        raise unmerged(folder, f"an adapter that changed its base at the start (init_lora_weights: {start})")


def unmerged(folder: Path, what: str) -> UserError:
    """The refusal of one kind of adapter."""
    return UserError(
        f"{folder}: ftkit does not merge {what}", ExitCode.MODEL, hint="merge it with PEFT: model.merge_and_unload()"
    )


def whole_pair(folder: Path, layer: str, parts: dict[str, TensorPlace]) -> Pair:
    """Both factors of a layer, of one rank."""
    if len(parts) < 2:
        missing = "B" if "a" in parts else "A"
        raise UserError(
            f"{folder / WEIGHTS}: layer '{layer}' has no lora_{missing}", ExitCode.MODEL, hint="the file is damaged"
        )
    pair = Pair(parts["a"], parts["b"])
    if len(pair.a.shape) != 2 or len(pair.b.shape) != 2:
        raise UserError(
            f"{folder}: ftkit does not merge LoRA on '{layer}': its factors are no matrices", ExitCode.MODEL
        )
    if pair.a.shape[0] != pair.b.shape[1]:
        raise UserError(
            f"{folder / WEIGHTS}: layer '{layer}': A has rank {pair.a.shape[0]}, B has {pair.b.shape[1]}",
            ExitCode.MODEL,
        )
    return pair
