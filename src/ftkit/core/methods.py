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
LORA, TRAINING_WEIGHTS = ("lora",), ("bitfit", "layers", "full")
OPTIONS_OF: dict[str, tuple[str, ...]] = {
    "r": LORA,
    "alpha": LORA,
    "dropout": LORA,
    "dora": LORA,
    "rslora": LORA,
    "lora_init": LORA,
    "rank_pattern": LORA,
    "lora_plus": LORA,
    "targets": ("lora", "ia3", "ln"),
    "virtual_tokens": ("prompt", "prefix"),
    "add_tokens": ("lora", "full"),
    "freeze": ("bitfit", "layers"),
    "save": TRAINING_WEIGHTS,
}
"""Methods that have an option, for each option that not all of them have."""
TOLD = {"lora": "LoRA", "layers": "--train-layers"}
"""Methods by other names than their own, where a person reads them."""
TYPED = {"lora": "--lora", "layers": "--train-layers last:2", "full": "--full"}
"""How one asks for a method, where it is not --method."""


def why_unused(option: str, method: str, told: str | None = None) -> tuple[str, str] | None:
    """(what is wrong, what would work) with an option beside a method that does not have it; None where it has.

    told: the method in the user's words, if it was not asked for by its name.
    """
    owners = OPTIONS_OF.get(option, (method,))
    if method in owners:
        return None
    names = [TOLD.get(owner, owner) for owner in owners]
    listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    what = f"is an option of {listed}, {told or f'the method is {TOLD.get(method, method)}'}"
    if option == "freeze":
        return what, "leave it out, or leave out the method: then all other weights are trained"
    ways = " or ".join(TYPED.get(owner, f"--method {owner}") for owner in owners)
    return what, f"leave it out, or take another method: {ways}"


def recipe_of(method: str, quantization: str | None) -> str:
    """Method and quantisation in one word, as runs, cards and tables name them: qlora, int8, ia3/nf4-dq, lora."""
    if quantization is None:
        return method
    return SHORT_NAMES.get((method, quantization), f"{method}/{quantization}")


def technique_of(recipe: str) -> str:
    """The method alone: qlora -> lora, ia3/nf4-dq -> ia3."""
    return {short: method for (method, _), short in SHORT_NAMES.items()}.get(recipe, recipe.partition("/")[0])
