"""Several adapters of one base -> one adapter folder, which merge then treats as any other."""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ftkit.core.combining import EQUAL_RANKS, combine_updates
from ftkit.core.merge_settings import MergeSettings
from ftkit.core.merging import LowRank, adapter_scale
from ftkit.core.options import require
from ftkit.errors import ExitCode, UserError
from ftkit.io.adapter_weights import CONFIG, PREFIX, WEIGHTS, Adapter, open_adapter_weights
from ftkit.io.tensors import read_finite
from ftkit.io.trained import Trained, open_trained


@dataclass(frozen=True)
class Part:
    """One adapter with its weight in the sum."""

    trained: Trained
    adapter: Adapter
    weight: float


@contextmanager
def combined_adapter(settings: MergeSettings) -> Iterator[Trained]:
    """What `--adapter a=0.7 --adapter b=0.3` names, as one adapter in a folder that is there while the block lasts."""
    require(settings.run is None, "RUN", settings.run, "left out where --adapter is given")
    require(settings.output is not None, "--output", None, "given where --adapter is")
    require(0 < settings.density <= 1, "--density", settings.density, "above 0, at most 1")
    parts = [open_part(text) for text in settings.adapter]
    require_one_base(parts)
    with TemporaryDirectory(prefix="ftkit-merge-") as name:
        folder = Path(name)
        write_combined(parts, settings, folder)
        yield replace(parts[0].trained, name=" + ".join(settings.adapter), adapter=folder, run=None)


def open_part(text: str) -> Part:
    """`path=weight`; without a weight, 1."""
    path, sign, number = text.rpartition("=")
    try:
        name, weight = (path, float(number)) if sign else (text, 1.0)
    except ValueError:
        raise UserError(
            f"--adapter {text}: '{number}' is no number", ExitCode.USAGE, hint="--adapter PATH=0.7"
        ) from None
    trained = open_trained(name)
    if trained.adapter is None:
        raise UserError(f"--adapter {name}: a model, not an adapter", ExitCode.MODEL)
    adapter = open_adapter_weights(trained.adapter)
    if adapter.others or not adapter.is_plain:
        what = f"{name}: only plain LoRA can be combined, without DoRA, biases, trained tokens or whole modules"
        raise UserError(what, ExitCode.MODEL, hint="merge it alone")
    return Part(trained, adapter, weight)


def require_one_base(parts: Sequence[Part]) -> None:
    """Exit 4 for adapters that were not trained on one and the same base."""
    first = parts[0].trained
    for part in parts[1:]:
        cards = [(t.card and (t.card.method, t.card.dtype, t.card.quantized_sha256)) for t in (first, part.trained)]
        if part.trained.base.location != first.base.location or cards[0] != cards[1]:
            what = f"{part.trained.name} and {first.name} were not trained on the same base in the same way"
            raise UserError(what, ExitCode.MODEL, hint="combine adapters of one base")


def write_combined(parts: Sequence[Part], settings: MergeSettings, folder: Path) -> None:
    """Write the combined adapter in PEFT's layout, with what lies beside the first one."""
    assert parts[0].trained.adapter is not None
    for file in parts[0].trained.adapter.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja", ".model", ".txt") and file.name != "manifest.json":
            shutil.copyfile(file, folder / file.name)
    torch.manual_seed(settings.seed)
    layers = sorted({layer for part in parts for layer in part.adapter.pairs})
    tensors: dict[str, Tensor] = {}
    ranks = {}
    for layer in layers:
        a, b = combine_layer(layer, parts, settings)
        ranks[layer] = a.shape[0]
        for part, end in zip((a, b), key_ends(layer, parts), strict=True):
            tensors[f"{PREFIX}{layer}{end}"] = part.contiguous()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(combined_config(parts, ranks), indent=1), encoding="utf-8")


def combine_layer(layer: str, parts: Sequence[Part], settings: MergeSettings) -> tuple[Tensor, Tensor]:
    """A and B of one layer from those adapters that change it."""
    chosen = [part for part in parts if layer in part.adapter.pairs]
    updates = []
    for part in chosen:
        pair = part.adapter.pairs[layer]
        a, b = read_finite(pair.a, f"{layer}.lora_A"), read_finite(pair.b, f"{layer}.lora_B")
        updates.append(LowRank(a, b, adapter_scale(part.adapter.config, layer)))
    ranks = [update.a.shape[0] for update in updates]
    if settings.combine in EQUAL_RANKS and len(set(ranks)) > 1:
        what = f"--combine {settings.combine}: the adapters' ranks differ at '{layer}': {', '.join(map(str, ranks))}"
        raise UserError(what, ExitCode.MODEL, hint="--combine cat sums them exactly")
    weights = [part.weight for part in chosen]
    return combine_updates(updates, weights, settings.combine, rank=max(ranks), density=settings.density)


def key_ends(layer: str, parts: Sequence[Part]) -> tuple[str, str]:
    """How a layer's tensors are called: embeddings have names of their own."""
    embeddings = layer.rpartition(".")[2] in ("embed_tokens", "wte", "embed_in", "word_embeddings")
    return (".lora_embedding_A", ".lora_embedding_B") if embeddings else (".lora_A.weight", ".lora_B.weight")


def combined_config(parts: Sequence[Part], ranks: dict[str, int]) -> dict[str, Any]:
    """adapter_config.json of the sum: every layer by name, with its rank, of scale 1."""
    exact = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items()}
    changes = {
        "r": max(ranks.values()), "lora_alpha": max(ranks.values()), "rank_pattern": exact, "alpha_pattern": exact,
        "target_modules": sorted(ranks), "use_rslora": False, "layers_to_transform": None, "layers_pattern": None,
        "exclude_modules": None,
    }  # fmt: skip
    return {**parts[0].adapter.config, **changes}
