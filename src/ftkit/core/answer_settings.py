"""How an artefact wants its answers made: from generation_config.json, and from what training recorded."""

from collections.abc import Mapping
from typing import Any

Numbers = Mapping[str, int | float]
MOST = 2**63 - 1
RANGES = {"max_new": (1, MOST), "temperature": (0, 1e9), "top_k": (0, MOST), "top_p": (1e-9, 1)}
"""The settings of answers, as `Sampling` calls them, and the least and the most that each may be."""
THEIR_NAMES = {"max_new": "max_new_tokens", "temperature": "temperature", "top_k": "top_k", "top_p": "top_p"}
"""As `Sampling` and as transformers call them."""
OTHERS = {
    "min_p": 0, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0, "repetition_penalty": 1, "no_repeat_ngram_size": 0,
    "num_beams": 1,
}  # fmt: skip
"""What transformers would do besides, and at which value it does nothing."""


def settings_of(config: Any) -> dict[str, Any]:
    """What a generation config of transformers says, in our names; nothing of sampling where it does not sample."""
    found = {name: getattr(config, theirs, None) for name, theirs in THEIR_NAMES.items()}
    if getattr(config, "do_sample", None) is not True:
        found = {"max_new": found["max_new"]}
    elif found["temperature"] is None:
        found["temperature"] = 1.0  # transformers' own, where it samples
    return {name: value for name, value in found.items() if value is not None}


def is_in_range(name: str, value: Any) -> bool:
    """True for a number that the setting (or the seed) takes."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    least, most = (0, MOST) if name == "seed" else RANGES[name]
    return least <= value <= most and (isinstance(value, int) or name in ("temperature", "top_p"))


def left_out_of(config: Any) -> list[str]:
    """Settings of a generation config that change answers and that ftkit does not know."""
    return [name for name, nothing in OTHERS.items() if getattr(config, name, None) not in (None, nothing)]


def as_theirs(recorded: Numbers) -> dict[str, Any]:
    """Recorded settings as generation_config.json says them: how tokens are drawn only where some are drawn."""
    draws = recorded.get("temperature", 0) > 0
    names = THEIR_NAMES if draws else ("max_new",)
    found: dict[str, Any] = {THEIR_NAMES[name]: recorded[name] for name in names if name in recorded}
    return found | ({"do_sample": draws} if "temperature" in recorded else {})


def in_words(settings: Numbers) -> str:
    """`temperature 0.6, top-p 0.95`, as /set and the options call them."""
    numbers = {name: f"{value:g}" if isinstance(value, float) else value for name, value in settings.items()}
    return ", ".join(f"{name.replace('_', '-')} {number}" for name, number in numbers.items())
