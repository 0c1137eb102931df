"""A base that is quantised on disk, as plain numbers beside the output for as long as a merge lasts."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from ftkit import console
from ftkit.core.checkpoint_names import parameter_names
from ftkit.core.merge_plan import find_layer
from ftkit.core.meta_model import build_meta_model
from ftkit.core.methods import technique_of
from ftkit.errors import ExitCode, UserError
from ftkit.io.atomic import scratch_folder
from ftkit.io.base_model import Base, local_files, read_config, transformers_config
from ftkit.io.free_space import require_disk
from ftkit.io.merged_folder import refuse_harm
from ftkit.io.model_folder import copy_beside
from ftkit.io.packed_weights import dequantise_folder, packed_weights, plain_tensors
from ftkit.io.shards import read_layout
from ftkit.io.trained import Trained


@contextmanager
def plain_base(trained: Trained, out: Path, *, asked: bool) -> Iterator[Trained]:
    """The same adapter on a base of plain numbers: its own, or what its packed weights stand for (only if asked)."""
    config = read_config(trained.base)
    if "quantization_config" not in config:
        yield trained
        return
    require_dequantisable(config["quantization_config"], trained.base, asked)
    assert trained.adapter is not None
    base = local_files(trained.base, weights=True)
    refuse_harm(out, trained.adapter, base)
    size = sum(tensor.nbytes for tensor in plain_tensors(base))
    require_disk(
        out, 2 * size, "the base without its quantisation and the merged model need", hint="give -o on another disk"
    )
    with scratch_folder(out.with_name(f"{out.name}-base")) as folder:
        console.info(f"{trained.base.name}: dequantising {size / 1e9:.1f} GB")
        copy_beside(base, base, folder)
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        (folder / "config.json").write_text(json.dumps(plain, indent=2), encoding="utf-8")
        dequantise_folder(base, folder, upside_down(trained.base, base))
        card = trained.card and replace(trained.card, method=technique_of(trained.card.method), quantized_sha256={})
        yield replace(trained, base=Base(trained.base.name, str(folder.resolve())), card=card)


def require_dequantisable(quantization: Any, base: Base, asked: bool) -> None:
    """Exit 4 for a base that is quantised on disk in another way than bitsandbytes', or that nobody asked to unpack."""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    source = "give the adapter the model that this one was quantised from"
    if method != "bitsandbytes":
        what = f"{base.name}: quantised on disk by {method!r}; ftkit takes bitsandbytes' packing apart, no other"
        raise UserError(what, ExitCode.MODEL, hint=source)
    if not asked:
        what = f"{base.name}: quantised on disk; ftkit merges onto 16- or 32-bit numbers"
        raise UserError(what, ExitCode.MODEL, hint=f"--dequantise merges onto what its weights stand for; or {source}")


def upside_down(base: Base, folder: Path) -> set[str]:
    """Packed weights of layers that have theirs as (in, out): bitsandbytes turns them."""
    with console.quiet_libraries():
        model = build_meta_model(transformers_config(base), torch.float32)
    layout = read_layout(folder)
    packed = packed_weights(layout)
    names = parameter_names(model, layout)
    return {
        name
        for name, parameter in names.items()
        if name in packed and isinstance(find_layer(parameter.removesuffix(".weight"), model), Conv1D)
    }
