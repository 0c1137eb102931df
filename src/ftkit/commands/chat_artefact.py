"""How answers are made where nobody says it: as the artefact wants it, and a line on what was taken from where."""

from typing import Any

from ftkit import console
from ftkit.core.answer_settings import RANGES, in_words, is_in_range, left_out_of, settings_of
from ftkit.core.chat_settings import ChatSettings
from ftkit.core.conversation import Speaker
from ftkit.core.generation import Sampling
from ftkit.errors import ExitCode, UserError
from ftkit.io.card import FILE
from ftkit.io.trained import Trained

MAX_NEW = 256
"""Tokens of an answer where neither a flag nor the artefact says it."""
THEIRS = "generation_config.json"
Numbers = dict[str, Any]


def settle_sampling(settings: ChatSettings, trained: Trained, speaker: Speaker) -> Sampling:
    """Flags (environment, ftkit.toml) over what training recorded over generation_config.json over the defaults.

    trained, speaker: of several, the first one.
    """
    asked = {name: value for name in RANGES if (value := getattr(settings, name)) is not None}
    recorded = recorded_in(trained)
    theirs = of_makers(trained, speaker)
    found = {"max_new": MAX_NEW, **theirs, **recorded, **asked}
    say_settings(found, {FILE: recorded, THEIRS: theirs}, asked)
    return Sampling(**found, seed=settings.seed)


def recorded_in(trained: Trained) -> Numbers:
    """What the card says of answers; exit 4 for what no training records."""
    recorded = trained.card.generation if trained.card else {}
    for name, value in recorded.items():
        if name not in RANGES or not is_in_range(name, value):
            hint = "copy the folder again from where it was trained"
            raise UserError(f"{trained.name}: {FILE}: generation: {name} = {value}", ExitCode.MODEL, hint=hint)
    return dict(recorded)


def of_makers(trained: Trained, speaker: Speaker) -> Numbers:
    """What generation_config.json of the model, or of an adapter's base, says; what cannot be done is said."""
    config = getattr(speaker.model, "generation_config", None)
    found = settings_of(config)
    wrong = [name for name, value in found.items() if not is_in_range(name, value)]
    if left_out := [*left_out_of(config), *wrong]:
        console.info(f"{THEIRS} of {trained.base.name}: passed over: {', '.join(left_out)}")
    return {name: value for name, value in found.items() if name not in wrong}


def say_settings(found: Numbers, sources: dict[str, Numbers], asked: Numbers) -> None:
    """What comes from the artefact, and from which of its files, as far as it has an effect."""
    taken = set(asked)
    for source, values in sources.items():
        own = {name: value for name, value in values.items() if name not in taken and has_effect(name, found)}
        taken |= set(values)
        if own:
            console.info(f"as {source} says: {in_words(own)}")


def has_effect(name: str, found: Numbers) -> bool:
    """False for how tokens are drawn where none are drawn."""
    return name in ("max_new", "temperature") or found.get("temperature", 0) > 0
