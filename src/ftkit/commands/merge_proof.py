"""The proof of a merge: the files on disk, as transformers loads them, against base + adapter."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ftkit import console
from ftkit.core.encoding import Encoder
from ftkit.core.proof import (
    LIMITS,
    LONGEST_PROBE_TOKENS,
    PLAIN_PROBES,
    Difference,
    Limits,
    broken_limits,
    compare_logits,
    probe_logits,
)
from ftkit.errors import ExitCode, UserError
from ftkit.io.base_model import Base, context_length, load_tokenizer, load_weights
from ftkit.io.jsonl import read_rows
from ftkit.io.quantization import dequantize_weight, quantization_config, quantized_layers
from ftkit.io.run_folder import RunFolder
from ftkit.io.trained import Trained, load_trained, put_adapter


@dataclass(frozen=True)
class Proof:
    """The merged folder against base + adapter, and against the live quantised model where there was one."""

    probes: int
    found: Difference
    limits: Limits
    live: Difference | None


def prove(trained: Trained, config: Any, folder: Path, *, onto: str, dtype: str, count: int) -> Proof:
    """Compare next-token logits of base + adapter with those of the merged files; beyond the limits exit 8.

    Both compute in float32 on the CPU. Where training saw a quantised base and the merge is onto that, the reference
    has the values that the live quantised layers stand for. dtype: the coarsest that values were rounded to.
    """
    console.info("proving: base + adapter against the merged files, on probe prompts")
    probes = probe_ids(trained, config, count)
    live, seen = run_live(trained, probes) if was_quantised(trained) else (None, {})
    expected = reference_logits(trained, seen if onto == "trained" else {}, probes)
    given = merged_logits(folder, probes)
    found, limits = compare_logits(expected, given), LIMITS[dtype]
    broken = broken_limits(found, limits)
    if broken:
        hint = "this is a bug of ftkit: please report it" if dtype == "F32" else "--dtype fp32 rounds least"
        what = f"the merged model is not base + adapter, so it is not published: {'; '.join(broken)}"
        raise UserError(what, ExitCode.GATE, hint=hint)
    return Proof(len(probes), found, limits, compare_logits(live, given) if live is not None else None)


def was_quantised(trained: Trained) -> bool:
    """True if training ran on a base that was quantised while loading."""
    return trained.card is not None and quantization_config(trained.card.method, torch.float32) is not None


def probe_ids(trained: Trained, config: Any, count: int) -> list[list[int]]:
    """Ids of the probe prompts: held-out rows of the run with their answers, else plain texts; 256 tokens at most."""
    own = trained.adapter is not None and (trained.adapter / "tokenizer_config.json").is_file()
    source = trained.adapter if trained.adapter is not None and own else trained.base
    tokenizer = load_tokenizer(source, config.get_text_config().vocab_size)
    encoder = Encoder(tokenizer, trained.card.template if trained.card else None)
    probes = [encoder.example(row).ids for row in held_out_rows(trained.run, count)]
    probes = probes or [encoder.prompt_ids(text) for text in PLAIN_PROBES[:count]]
    longest = min(LONGEST_PROBE_TOKENS, context_length(config) or LONGEST_PROBE_TOKENS)
    return [ids[:longest] for ids in probes]


def held_out_rows(run: RunFolder | None, count: int) -> list[dict[str, Any]]:
    """The first rows that a run held out; none without a run."""
    if run is None or not run.valid.is_file():
        return []
    return [row for _, (_, row) in zip(range(count), read_rows(str(run.valid)), strict=False)]


def run_live(trained: Trained, probes: list[list[int]]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Logits of the quantised base + adapter as training ran it, and the values that its quantised layers stand for."""
    model = load_trained(trained, "cpu").model
    # before the first pass: it moves the scales of LLM.int8 elsewhere
    seen = {name: dequantize_weight(layer.weight) for name, layer in quantized_layers(model)}
    return probe_logits(model, probes), seen


def reference_logits(trained: Trained, seen: dict[str, Tensor], probes: list[list[int]]) -> list[Tensor]:
    """Logits of base + adapter in float32, PEFT's own; `seen` replaces weights (out, in) of the base, by layer."""
    assert trained.adapter is not None
    model = load_weights(trained.base, dtype=torch.float32, device="cpu")
    for name, values in seen.items():
        layer = model.get_submodule(name)
        layer.weight.data.copy_(values.T if isinstance(layer, Conv1D) else values)
    return probe_logits(put_adapter(model, trained.adapter).eval(), probes)


def merged_logits(folder: Path, probes: list[list[int]]) -> list[Tensor]:
    """Logits of the merged files in float32, as anyone's transformers loads them."""
    return probe_logits(
        load_weights(Base("the merged model", str(folder.resolve())), dtype=torch.float32, device="cpu"), probes
    )
