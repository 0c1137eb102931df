"""The proof of a merge: the files on disk against base + adapter, both run layer by layer from where their weights lie."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftkit import console
from ftkit.core.checkpoint_names import parameter_names
from ftkit.core.encoding import Encoder
from ftkit.core.heap import give_back_freed_memory
from ftkit.core.merge_plan import tied_parameters
from ftkit.core.proof import (
    LIMITS,
    MANTISSA_BITS,
    PLAIN_PROBES,
    Difference,
    Limits,
    broken_limits,
    compare_logits,
    other_logits,
    plan_probes,
    reference_logits,
    same_continuations,
    widened,
)
from ftkit.core.streaming import Weight, adapt_streamed, build_placeholder_model, stream_weights
from ftkit.errors import ExitCode, UserError
from ftkit.io.adapter_weights import Adapter
from ftkit.io.base_model import Base, load_tokenizer, load_weights, local_files, transformers_config
from ftkit.io.card import Card
from ftkit.io.devices import DTYPES
from ftkit.io.jsonl import read_rows
from ftkit.io.quantization import quantised_forward, quantization_config, seen_in_training
from ftkit.io.run_folder import RunFolder
from ftkit.io.shards import read_layout
from ftkit.io.tensors import FileWeight, is_finite, read_tensor
from ftkit.io.trained import Trained, put_adapter

Layers = Mapping[str, bool]
"""Layers that training saw quantised -> whether their weight lies as (in, out)."""


@dataclass(frozen=True)
class Proof:
    """The merged folder against base + adapter, and against the live quantised model where there was one.

    probes: texts. same_greedy: prompts, of as many, that both continue with the same tokens.
    """

    probes: int
    same_greedy: int
    found: Difference
    limits: Limits
    live: Difference | None


@dataclass(frozen=True)
class SeenWeight:
    """A weight that training held quantised, as the values that it saw, made anew whenever a layer runs."""

    file: FileWeight
    card: Card
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the base's tensor."""
        return self.file.shape

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """All rows at once: scales of scales reach over the whole tensor."""
        weight, card = read_tensor(self.file.place), self.card
        yield 0, seen_in_training(weight, card.method, DTYPES[card.dtype], None, transposed=self.transposed)[0].float()

    def pick(self, rows: Tensor) -> Tensor:
        """The rows of these numbers (n,)."""
        return next(self.blocks())[1][rows]


@dataclass(frozen=True)
class Reshaken:
    """A weight of a file whose values are moved at random, as far as rounding to its format may have moved them.

    bits: of the format's mantissa. The distance of two neighbours is 2**(1 - bits) / sqrt(2) of a value, rms.
    """

    file: FileWeight
    bits: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.file.shape

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """As the file's; the same in every pass."""
        numbers = torch.Generator().manual_seed(self.file.place.start)
        for start, block in self.file.blocks():
            yield start, self.moved(block, numbers)

    def pick(self, rows: Tensor) -> Tensor:
        """The rows of these numbers (n,)."""
        return self.moved(self.file.pick(rows), torch.Generator().manual_seed(self.file.place.start))

    def moved(self, values: Tensor, numbers: torch.Generator) -> Tensor:
        """Each value by up to half the distance to its neighbour, either way."""
        part = torch.rand(values.shape, generator=numbers).sub_(0.5)
        return part.mul_(2 ** (0.5 - self.bits)).add_(1).mul_(values)


@dataclass(frozen=True)
class GrownWeight:
    """A base's embeddings in a larger vocabulary: what is beyond them is zero, until an adapter puts its rows there."""

    own: Weight
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the larger tensor."""
        return (self.count, *self.own.shape[1:])

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Those of the base, then one of zeros."""
        yield from self.own.blocks()
        yield self.own.shape[0], torch.zeros(self.count - self.own.shape[0], *self.own.shape[1:])

    def pick(self, rows: Tensor) -> Tensor:
        """The rows of these numbers (n,)."""
        is_known = (rows < self.own.shape[0]).unsqueeze(1)
        return torch.where(is_known, self.own.pick(torch.where(is_known.squeeze(1), rows, 0)), 0.0)


def prove(
    trained: Trained,
    adapter: Adapter,
    config: Any,
    folder: Path,
    changed: Collection[str],
    *,
    seen: Layers,
    live: Layers,
    dtype: str,
    count: int,
) -> Proof:
    """Compare next-token logits of base + adapter with those of the merged files; beyond the limits exit 8.

    Both compute in float32 on the CPU. seen: layers of the base to take with the values that training saw. live: layers
    to run quantised, as training ran them, for a comparison that decides nothing. dtype: the coarsest that values were
    rounded to.
    """
    give_back_freed_memory(above=1 << 20)
    console.info("proving: base + adapter against the merged files, on probe prompts")
    probes = plan_probes(probe_ids(trained, config, count), config.get_text_config().vocab_size)
    expected, continued = reference_logits(base_and_adapter(trained, adapter, config, seen=seen), probes)
    streams = all(is_finite(part) for part in expected)
    if not streams:  # the placeholders' NaN: some layer's weight is used by another
        console.info("this architecture does not run layer by layer from its files: the proof loads it whole")
        model = base_and_adapter(trained, adapter, config, seen=seen, streams=False)
        expected, continued = reference_logits(model, probes)
        del model
    merged = Base("the merged model", str(folder.resolve()))
    model = run_from_files(merged, transformers_config(merged), streams=streams)
    given = other_logits(model, probes, continued)
    del model
    found, limits = compare_logits(expected, given), LIMITS[dtype]
    broken = broken_limits(found, limits)
    if broken and dtype in MANTISSA_BITS and streams:
        console.info("more than rounding mostly changes: measuring what it changes in this model")
        moved = other_logits(rounded_otherwise(merged, changed), probes, continued)
        limits = widened(limits, compare_logits(given, moved))
        broken = broken_limits(found, limits)
    if broken:
        hint = "this is a bug of ftkit: please report it" if dtype == "F32" else "--dtype fp32 rounds least"
        what = f"the merged model is not base + adapter, so it is not published: {'; '.join(broken)}"
        raise UserError(what, ExitCode.GATE, hint=hint)
    del expected
    seen_live = None
    if live:
        model = base_and_adapter(trained, adapter, config, seen=live, kernels=True, streams=streams)
        seen_live = compare_logits(other_logits(model, probes, continued), given)
    return Proof(len(probes.texts), same_continuations(given, continued), found, limits, seen_live)


def was_quantised(trained: Trained) -> bool:
    """True if training ran on a base that was quantised while loading."""
    return trained.card is not None and quantization_config(trained.card.method, torch.float32) is not None


def probe_ids(trained: Trained, config: Any, count: int) -> list[list[int]]:
    """Ids of the probe texts: held-out rows of the run with their answers, else plain texts."""
    own = trained.adapter is not None and (trained.adapter / "tokenizer_config.json").is_file()
    source = trained.adapter if trained.adapter is not None and own else trained.base
    tokenizer = load_tokenizer(source, config.get_text_config().vocab_size)
    encoder = Encoder(tokenizer, trained.card.template if trained.card else None)
    texts = [encoder.example(row).ids for row in held_out_rows(trained.run, count)]
    return texts or [encoder.prompt_ids(text) for text in PLAIN_PROBES[:count]]


def held_out_rows(run: RunFolder | None, count: int) -> list[dict[str, Any]]:
    """The first rows that a run held out; none without a run."""
    if run is None or not run.valid.is_file():
        return []
    return [row for _, (_, row) in zip(range(count), read_rows(str(run.valid)), strict=False)]


def base_and_adapter(
    trained: Trained, adapter: Adapter, config: Any, *, seen: Layers, kernels: bool = False, streams: bool = True
) -> Any:
    """The base with its adapter on it, as PEFT runs them: float32, or with `kernels` in the format of the training and
    with its quantised layers. If it `streams`, what PEFT replaces as a whole is in memory, nothing else is."""
    assert trained.adapter is not None
    dtype = DTYPES[trained.card.dtype] if kernels and trained.card else torch.float32
    with console.quiet_libraries():
        model = build_placeholder_model(config, dtype)
    weights = file_weights(model, local_files(trained.base, weights=True))
    if (
        not streams or weights is None or adapter.config.get("target_parameters")
    ):  # PEFT swaps such parameters while layers run
        return put_adapter(whole_base(trained, config, dtype, seen), trained.adapter).eval()
    take_resized(model, weights, adapter)
    for layer, transposed in seen.items():
        assert trained.card is not None
        weights[f"{layer}.weight"] = SeenWeight(weights[f"{layer}.weight"], trained.card, transposed)  # type: ignore[arg-type]
    forwards = {}
    if kernels and trained.card:
        forwards = {
            layer: partial(run_quantised, trained.card, weights[f"{layer}.weight"].file.place, transposed)  # type: ignore[attr-defined]
            for layer, transposed in seen.items()
        }
    stream_weights(model, weights, resident=adapter.saved, forwards=forwards)
    streamed = dict(model.named_modules())
    tuned = put_adapter(model, trained.adapter).eval()
    adapt_streamed(tuned, weights, streamed)
    return tuned


def run_quantised(card: Card, place: Any, transposed: bool, module: Any, x: Tensor) -> Tensor:
    """A layer as training ran it, its weight quantised anew."""
    weight = read_tensor(place)
    return quantised_forward(weight.T if transposed else weight, module.bias, x, card.method, DTYPES[card.dtype])


def run_from_files(base: Base, config: Any, *, streams: bool = True) -> Any:
    """A model in float32 whose weights stay in its files until a layer runs, if it `streams`."""
    folder = local_files(base, weights=True)
    with console.quiet_libraries():
        model = build_placeholder_model(config, torch.float32)
    weights = file_weights(model, folder)
    if not streams or weights is None:
        return load_weights(base, dtype=torch.float32, device="cpu")
    stream_weights(model, weights)
    return model


def rounded_otherwise(merged: Base, changed: Collection[str]) -> Any:
    """The merged model with the tensors that the merge rounded moved at random, as far as rounding moves them."""
    folder = local_files(merged, weights=True)
    with console.quiet_libraries():
        model = build_placeholder_model(transformers_config(merged), torch.float32)
    layout = read_layout(folder)
    rounded = {layout[name] for name in changed}
    weights = file_weights(model, folder) or {}
    for name, weight in weights.items():
        if isinstance(weight, FileWeight) and weight.place in rounded and weight.place.dtype in MANTISSA_BITS:
            weights[name] = Reshaken(weight, MANTISSA_BITS[weight.place.dtype])
    stream_weights(model, weights)
    return model


def file_weights(model: Any, folder: Path) -> dict[str, Weight] | None:
    """Parameter name -> its tensor in a model folder; None where loading joins, splits or renames beyond one to one."""
    layout = read_layout(folder)
    found: dict[str, Weight] = {
        parameter: FileWeight(layout[name]) for name, parameter in parameter_names(model, layout).items()
    }
    for name, source in dict(model.all_tied_weights_keys or {}).items():
        for missing, present in ((name, source), (source, name)):
            if missing not in found and present in found:
                found[missing] = found[present]
    needed = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return found if needed <= set(found) else None


def take_resized(model: Any, weights: dict[str, Weight], adapter: Adapter) -> None:
    """Where training resized the vocabulary, embeddings and head are the adapter's: the base has none of that size."""
    resized = {name for name, p in model.named_parameters(remove_duplicate=False) if weights[name].shape != p.shape}
    ties = tied_parameters(model)
    partners = ties | {source: name for name, source in ties.items()}
    for name in resized:
        place = adapter.saved.get(name) or adapter.saved.get(partners.get(name, ""))
        if place is None:  # new tokens, whose rows are the adapter's
            weights[name] = GrownWeight(
                weights[name], dict(model.named_parameters(remove_duplicate=False))[name].shape[0]
            )
        else:
            weights[name] = FileWeight(place)


def whole_base(trained: Trained, config: Any, dtype: torch.dtype, seen: Layers) -> Any:
    """The base in memory, for architectures whose files are not the model's parameters one to one."""
    model = load_weights(trained.base, dtype=dtype, device="cpu")
    if config.get_text_config().vocab_size != model.config.get_text_config().vocab_size:
        model.resize_token_embeddings(config.get_text_config().vocab_size, mean_resizing=False)
    for layer, transposed in seen.items():
        assert trained.card is not None
        module = model.get_submodule(layer)
        asked = trained.card.method, DTYPES[trained.card.dtype], None
        values, _ = seen_in_training(module.weight.data, *asked, transposed=transposed)
        module.weight.data.copy_(values)
    return model
