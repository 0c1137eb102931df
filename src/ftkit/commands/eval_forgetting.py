"""General text and what training did to it: --forgetting."""

from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

from ftkit import console
from ftkit.core.encoding import Encoder, Example
from ftkit.core.examples import checked_example
from ftkit.core.forgetting import (
    TOO_MUCH,
    Forgetting,
    Predictions,
    divergence_of_two,
    keep_predictions,
    mean_divergence,
    measure_forgetting,
)  # fmt: skip
from ftkit.core.likelihood import Likelihood, row_likelihoods
from ftkit.core.packing_check import packing_fault
from ftkit.errors import ExitCode, UserError
from ftkit.io.row_file import RowFile, read_row_file
from ftkit.io.trained import Loaded, without_adapter

DEFAULT = "default"


@dataclass(frozen=True)
class GeneralText:
    """Rows of text, read before a model is loaded."""

    name: str
    data: RowFile

    def examples(self, loaded: Loaded) -> list[Example]:
        """The rows as a model reads them."""
        encoder = Encoder(loaded.tokenizer)
        return [checked_example(encoder, *pair) for pair in zip(self.data.rows, self.data.places, strict=True)]


def read_general_text(name: str) -> GeneralText:
    """The rows of a file, or `default`: those that come with ftkit."""
    source = str(Path(str(files("ftkit"))) / "texts" / "general.jsonl") if name == DEFAULT else name
    data = read_row_file(source, "eval")
    if data.kind != "text":
        what = f"{data.places[0]}: --forgetting needs rows of text, not of {data.kind}"
        raise UserError(what, ExitCode.DATA, hint='{"text": "..."}, one a line; or --forgetting default')
    return GeneralText(name, data)


def packs(loaded: Loaded, examples: list[Example]) -> bool:
    """Whether rows can be packed for this model."""
    return packing_fault(loaded.model, examples, loaded.device, console.info) is None


def forgetting_of_adapter(general: GeneralText, loaded: Loaded, seed: int) -> Forgetting:
    """Before and after in the same loaded model, with the adapter off and on."""
    examples = general.examples(loaded)
    packed = packs(loaded, examples)
    after = row_likelihoods(loaded.model, examples, loaded.context, packed=packed)
    with without_adapter(loaded.model) as model:
        before = row_likelihoods(model, examples, loaded.context, packed=packed)
    switch = partial(without_adapter, loaded.model)
    divergence = mean_divergence(loaded.model, switch, examples, loaded.context, packed=packed)
    return warned(measure_forgetting(general.name, before, after, divergence, seed=seed))


@dataclass(frozen=True)
class Remembered:
    """A model on general text, once its body is gone: how likely it found each row, and what it predicted."""

    likelihoods: list[Likelihood]
    predictions: Predictions | None


def remember(general: GeneralText, loaded: Loaded) -> Remembered:
    """What a model makes of general text. Its body's weights are given up: the next model needs the room."""
    examples = general.examples(loaded)
    packed = packs(loaded, examples)
    likelihoods = row_likelihoods(loaded.model, examples, loaded.context, packed=packed)
    return Remembered(likelihoods, keep_predictions(loaded.model, examples, loaded.context, packed=packed))


def forgetting_of_two(general: GeneralText, before: Remembered, after: Remembered, seed: int) -> Forgetting:
    """Of a model whose every weight was trained: base and tuned model were in memory one after the other."""
    divergence = None
    if before.predictions is not None and after.predictions is not None:
        divergence = divergence_of_two(before.predictions, after.predictions)
    if divergence is None:
        console.info("divergence left out: this architecture's predictions cannot be kept, or the vocabularies differ")
    found = measure_forgetting(general.name, before.likelihoods, after.likelihoods, divergence, seed=seed)
    return warned(found)


def warned(found: Forgetting) -> Forgetting:
    """The same, with a warning where it is too much."""
    if found.is_too_much:
        rise = f"{found.before:.4f} -> {found.after:.4f} nats per token"
        why = f"the model has forgotten: loss on general text {rise} (more than {TOO_MUCH} is warned of)"
        console.warn(f"{why}; fewer epochs, a lower --lr, or general rows mixed in help")
    return found
