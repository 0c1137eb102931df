"""Several adapters opened on one base, which is loaded once."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ftkit.errors import ExitCode, UserError
from ftkit.io.base_model import check_base, config_sha256, weights_sha256
from ftkit.io.card import Card
from ftkit.io.devices import DTYPES
from ftkit.io.quantization import quantization_config
from ftkit.io.trained import (
    CHANGED,
    Loaded,
    Trained,
    load_own_tokenizer,
    load_trained,
    put_adapter,
    read_adapter_config,
)

VIRTUAL = "puts virtual tokens in front of every prompt"
PLAIN_FOLDERS = ("adapter", "model", "merged", "checkpoints")
"""Folders whose name says what is in them and not whose it is."""


def load_several(opened: Sequence[Trained], device: str) -> list[Loaded]:
    """Each of the opened models ready to answer, all on one base in memory; each adapter is called `adapter_name`.

    A whole model among them is the base itself. The first adapter decides in which format the base is loaded: the
    others were trained on the same, or are refused.
    """
    first = next((number for number, one in enumerate(opened) if one.adapter), 0)
    loaded = load_trained(opened[first], device, adapter_name=adapter_name(first))
    model = loaded.model
    found = []
    for number, one in enumerate(opened):
        if one.adapter is not None and number != first:
            put_adapter(model, one.adapter, adapter_name(number))
        tokenizer = loaded.tokenizer if number == first else load_own_tokenizer(one, check_base(one.base))
        template = one.card.template if one.card else None
        found.append(replace(loaded, model=model, tokenizer=tokenizer, card=one.card, template=template))
    model.eval()
    return found


def adapter_name(number: int) -> str:
    """What PEFT calls the adapter of the model with this number. A bare number it would find in names of layers too."""
    return f"adapter{number}"


def require_one_base(opened: Sequence[Trained]) -> None:
    """Exit 4 names what was trained on another base than the first, or on the same in another format."""
    for one in opened if len(opened) > 1 else ():
        if why := why_alone(one):
            raise UserError(
                f"{one.name} {why}, so nothing else can be on that base", ExitCode.MODEL, hint=f"ftkit chat {one.name}"
            )
    first = next((one for one in opened if one.adapter), opened[0])
    for one in opened:
        if fault := difference(first, one):
            hint = "adapters of one base can be held together; open the others in a chat of their own"
            raise UserError(f"{first.name} and {one.name} do not go together: {fault}", ExitCode.MODEL, hint=hint)


def why_alone(trained: Trained) -> str | None:
    """Why an adapter cannot be switched off and on with others of the same base; None if it can."""
    config = read_adapter_config(trained.adapter) if trained.adapter else {}
    if config.get("bias") not in (None, "none"):  # PEFT writes them into the base's layers
        return "changes the base's own biases"
    kind = config.get("peft_type", "LORA")
    reasons = {CHANGED: "changes the base's own weights", "PROMPT_TUNING": VIRTUAL, "PREFIX_TUNING": VIRTUAL}
    return reasons.get(kind)


def difference(one: Trained, other: Trained) -> str | None:
    """Why two cannot share a base in memory, in words; None if they can."""
    if one.base.location != other.base.location and not is_same_base(one, other):
        return f"their bases are {one.base.name} and {other.base.name}"
    kinds = {read_adapter_config(trained.adapter)["peft_type"] for trained in (one, other) if trained.adapter}
    if len(kinds) > 1:
        return f"adapters of different kinds ({' and '.join(sorted(kinds))}) cannot be held together"
    formats = {format_of(trained.card) for trained in (one, other) if trained.adapter and trained.card}
    if len(formats) > 1:
        return f"they were trained on {' and '.join(sorted(formats))} weights"
    added = [trained.card.added_tokens if trained.adapter and trained.card else [] for trained in (one, other)]
    return None if added[0] == added[1] else "their vocabularies differ (--add-tokens)"


def format_of(card: Card) -> str:
    """How the base was held in training: a quantised method's name, else its number format."""
    return card.method if quantization_config(card.method, DTYPES[card.dtype]) else card.dtype


def is_same_base(one: Trained, other: Trained) -> bool:
    """True for copies of one model: equal config and weights."""
    weights = weights_sha256(one.base), weights_sha256(other.base)
    return weights[0] is not None and weights[0] == weights[1] and config_sha256(one.base) == config_sha256(other.base)


def short_names(names: Sequence[str]) -> list[str]:
    """What to call them: the last part of each path that says whose it is, with more of the path where two are equal."""
    parts = [[part for part in Path(name).parts if part not in PLAIN_FOLDERS] or [name] for name in names]
    for length in range(1, max(map(len, parts)) + 1):
        short = ["/".join(some[-length:]) for some in parts]
        if len(set(short)) == len(short):
            return short
    return list(names)
