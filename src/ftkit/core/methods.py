"""Training methods: what each one trains, its usual learning rate, and what it cannot do. Nothing heavy is imported."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """What is known of a method before there is a model.

    lr: the usual learning rate. trains_weights: the model's own weights are trained, so they are float32 by default.
    is_adapter: PEFT adds parameters. virtual: it puts virtual tokens in front of every row, so rows cannot be packed.
    """

    lr: float
    trains_weights: bool = False
    is_adapter: bool = True
    virtual: bool = False


METHODS = {
    "lora": Method(2e-4),  # arXiv:2106.09685
    "ia3": Method(3e-3),  # arXiv:2205.05638
    "prompt": Method(1e-2, virtual=True),  # arXiv:2104.08691
    "prefix": Method(1e-2, virtual=True),  # arXiv:2101.00190
    "ln": Method(1e-3, trains_weights=True),  # arXiv:2312.11420
    "bitfit": Method(1e-3, trains_weights=True, is_adapter=False),  # arXiv:2106.10199
    "layers": Method(2e-5, trains_weights=True, is_adapter=False),
    "full": Method(2e-5, trains_weights=True, is_adapter=False),
}
SHORT_NAMES = {("lora", "nf4-dq"): "qlora", ("lora", "int8"): "int8"}
"""Names that were there before bases could be quantised in other ways."""
OF_LORA = ("dora", "rslora", "lora_init", "rank_pattern", "lora_plus")
"""Options that only LoRA has."""


def recipe_of(method: str, quantization: str | None) -> str:
    """Method and quantisation in one word, as runs, cards and tables name them: qlora, int8, ia3/nf4-dq, lora."""
    if quantization is None:
        return method
    return SHORT_NAMES.get((method, quantization), f"{method}/{quantization}")


def technique_of(recipe: str) -> str:
    """The method alone: qlora -> lora, ia3/nf4-dq -> ia3."""
    return {short: method for (method, _), short in SHORT_NAMES.items()}.get(recipe, recipe.partition("/")[0])
