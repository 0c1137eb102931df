"""The tensors of an adapter in PEFT's layout, by layer: found, named and checked, not yet read."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftkit.errors import ExitCode, UserError
from ftkit.io.shards import TensorPlace, read_header
from ftkit.io.trained import CHANGED, read_adapter_config

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = {
    ".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_embedding_A": "a", ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude", ".lora_B.bias": "bias",
}  # fmt: skip
EMBEDDINGS = (".embed_tokens.weight", ".lm_head.weight")
"""What PEFT saves along where embeddings were trained or resized, and puts in place of the base's."""
WRAPPERS = (".token_adapter.base_layer.", ".base_layer.", ".modules_to_save.")
UNTRAINED = ".original_module."
"""The base's own tensor beside one of `modules_to_save`: PEFT saves it along where the vocabulary was resized."""
ROWS = ".token_adapter.trainable_tokens_delta"
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
NORM = ".ln_tuning_layers"
KINDS_NOT_MERGED = {
    "PROMPT_TUNING": "prompt tuning: virtual tokens are no weights",
    "PREFIX_TUNING": "prefix tuning: keys and values in front of a row are no weights",
}
NOT_MERGED = {
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "repeated layers",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow",
}


@dataclass(frozen=True)
class Pair:
    """Where the two factors of one layer's update lie: a (r, in), b (out, r).

    magnitude: DoRA's norms (out,). bias: an update of the layer's bias (out,), scaled as the weight's.
    """

    a: TensorPlace
    b: TensorPlace
    magnitude: TensorPlace | None = None
    bias: TensorPlace | None = None


@dataclass(frozen=True)
class Rows:
    """Trained rows of an embedding: their numbers, and where their values (n, width) lie."""

    numbers: tuple[int, ...]
    place: TensorPlace


@dataclass(frozen=True)
class Adapter:
    """What an adapter folder holds.

    pairs: layer name in the base model -> its factors. saved: parameter name -> the whole tensor that replaces the
    base's (before an update of the same layer is added). rows: embedding -> which of its rows are replaced, and by what.
    others: the tensors of updates that only PEFT itself can merge (then there are no pairs), by their names in the file.
    """

    folder: Path
    config: dict[str, Any]
    pairs: dict[str, Pair]
    saved: dict[str, TensorPlace]
    rows: dict[str, Rows] = field(default_factory=dict)
    others: dict[str, TensorPlace] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """True if it is nothing but updates of weights: then it does nothing where all of these are zero."""
        extra = any(pair.magnitude or pair.bias for pair in self.pairs.values())
        return not (self.saved or self.rows or extra)


def open_adapter_weights(folder: Path) -> Adapter:
    """The adapter of a folder; what ftkit does not merge, or what is no part of an adapter, is exit 4."""
    config = read_adapter_config(folder)
    refuse_unmerged(folder, config)
    if config["peft_type"] == CHANGED:
        return Adapter(folder, config, {}, read_header(folder / WEIGHTS))
    halves: dict[str, dict[str, TensorPlace]] = {}
    saved: dict[str, TensorPlace] = {}
    rows: dict[str, Rows] = {}
    others: dict[str, TensorPlace] = {}
    header = read_header(folder / WEIGHTS)
    by_peft = is_left_to_peft(config, header)
    for key, place in header.items():
        name = key.removeprefix(PREFIX).replace(NORM, "")
        part = next((end for end in PARTS if name.endswith(end)), None)
        if UNTRAINED in name:
            continue
        if part is not None and by_peft:
            others[key] = place
        elif part is not None:
            halves.setdefault(name.removesuffix(part), {})[PARTS[part]] = place
        elif name.endswith(ROWS):
            layer = name.removesuffix(ROWS)
            rows[layer] = trained_rows(folder, layer, config, place)
        elif config["peft_type"] == "LN_TUNING" or is_saved_whole(name, config):
            saved[without_wrapper(name)] = place
        elif by_peft:
            others[key] = place
        else:
            raise UserError(f"{folder}: its tensor '{key}' belongs to nothing that ftkit merges", ExitCode.MODEL)
    if not header:
        raise UserError(f"{folder / WEIGHTS}: holds no tensors", ExitCode.MODEL)
    pairs = {name: whole_pair(folder, name, parts) for name, parts in halves.items()}
    return Adapter(folder, config, pairs, saved, rows, others)


def without_wrapper(name: str) -> str:
    """The base's name of a tensor that PEFT names by the layers which it put around the base's."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, ".")
    return name


def is_left_to_peft(config: dict[str, Any], header: dict[str, TensorPlace]) -> bool:
    """True for all but LoRA on matrices: other methods, packed experts (bare parameters), convolutions."""
    factors = (place for key, place in header.items() if PARTS.get("." + ".".join(key.split(".")[-2:])) in ("a", "b"))
    return (
        config["peft_type"] not in ("LORA", "LN_TUNING")
        or bool(config.get("target_parameters"))
        or any(len(place.shape) > 2 for place in factors)
    )


def is_saved_whole(name: str, config: dict[str, Any]) -> bool:
    """True for a tensor of `modules_to_save`, a trained bias, or an adapted embedding or head, which PEFT saves along."""
    modules = config.get("modules_to_save") or ()
    is_bias = config.get("bias", "none") != "none" and name.endswith(".bias")
    return (
        is_bias
        or f".{name}".endswith(EMBEDDINGS)
        or ".base_layer." in name
        or any(f".{module}." in f".{name}" for module in modules)
    )


def refuse_unmerged(folder: Path, config: dict[str, Any]) -> None:
    """Kinds of adapters that cannot be merged truly (yet) are refused, never merged in part."""
    if kind := KINDS_NOT_MERGED.get(config["peft_type"]):
        raise unmerged(folder, kind, "serve base and adapter together: ftkit chat")
    for key, name in NOT_MERGED.items():
        if config.get(key):
            raise unmerged(folder, f"{name} ({key})")
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:  # such a start changes the base, so base + adapter is not what was trained
        hint = (
            "save it as plain LoRA where it was trained: save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
        what = f"an adapter that changed its base at the start (init_lora_weights: {start})"
        raise unmerged(folder, what, f"{hint}; or merge it there: model.merge_and_unload()")


def unmerged(folder: Path, what: str, hint: str = "merge it with PEFT: model.merge_and_unload()") -> UserError:
    """The refusal of one kind of adapter."""
    return UserError(f"{folder}: ftkit does not merge {what}", ExitCode.MODEL, hint=hint)


def whole_pair(folder: Path, layer: str, parts: dict[str, TensorPlace]) -> Pair:
    """Both factors of a layer, of one rank."""
    missing = [half.upper() for half in ("a", "b") if half not in parts]
    if missing:
        raise UserError(
            f"{folder / WEIGHTS}: layer '{layer}' has no lora_{missing[0]}", ExitCode.MODEL, hint="the file is damaged"
        )
    pair = Pair(**parts)
    if len(pair.a.shape) != 2 or len(pair.b.shape) != 2 or pair.a.shape[0] != pair.b.shape[1]:
        raise UserError(
            f"{folder / WEIGHTS}: layer '{layer}': A is {list(pair.a.shape)}, B is {list(pair.b.shape)}: of no one rank",
            ExitCode.MODEL,
        )
    return pair


def trained_rows(folder: Path, layer: str, config: dict[str, Any], place: TensorPlace) -> Rows:
    """The rows of an embedding that `trainable_token_indices` names, for all embeddings or by the end of their names."""
    named = config.get("trainable_token_indices") or []
    if isinstance(named, dict):
        named = next((rows for key, rows in named.items() if f".{layer}".endswith(f".{key}")), [])
    if len(named) != place.shape[0] or not all(type(number) is int for number in named):
        what = f"holds {place.shape[0]} trained rows of '{layer}', its config names {len(named)}"
        raise UserError(f"{folder / WEIGHTS}: {what}", ExitCode.MODEL, hint="the file is damaged")
    return Rows(tuple(named), place)
