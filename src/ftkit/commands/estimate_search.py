"""What else one could run: the largest micro-batch and length, changes that save memory, settings that fit a card."""

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from ftkit.commands.estimate_run import CLEAR, Estimates, Verdict, process_bytes
from ftkit.core.estimate_settings import EstimateSettings
from ftkit.core.gpus import Gpu
from ftkit.core.model_settings import ModelSettings
from ftkit.core.options import flag_of

MOST_ROWS = 1024
LENGTH_STEP = 64
"""Lengths are searched in multiples of so many tokens."""
SHORTEST = 128
LINE_SIMULATIONS = 3
"""Of guesses along a line; what none of them confirms is halved until a simulation does."""
PRICES = {
    "gradient_checkpointing": "a second forward pass: about a third more time",
    "micro_batch": "more and smaller passes, slower for short rows; same result",
    "optimizer": "the optimizer's means are rounded to 8 bits",
    "lora": "adapters are trained instead of every weight",
    "qlora": "the base is rounded to 4 bits, unpacked at every use",
    "max_length": "longer rows are dropped",
}
"""What each change costs, besides being a change."""


@dataclass(frozen=True)
class Change:
    """Options to change together: as one would type them, their values, their price."""

    words: str
    options: dict[str, Any]
    price: str


@dataclass(frozen=True)
class Suggestion:
    """A change, what the process takes then, what that saves, and whether the card holds it."""

    change: str
    price: str
    process_bytes: int
    saved_bytes: int
    fits: bool
    is_rough: bool


@dataclass(frozen=True)
class Largest:
    """The most that a card holds, other settings being equal: rows at this length, tokens of a row alone. 0: not even one."""

    micro_batch: int
    max_length: int


# ---------------------------------------------------------------- largest
def largest(estimates: Estimates, settings: EstimateSettings, gpu: Gpu) -> Largest:
    """Found by the closed form, then confirmed by the simulation; checkpointing as settled."""
    context = estimates.model.context or settings.max_length
    longest = estimates.plan(settings, gpu).tokens

    def rows(count: int) -> EstimateSettings:
        batch = max(count * settings.gpus, settings.batch)
        return replace(settings, micro_batch=str(count), micro_tokens="auto", batch=batch, max_length=longest)

    def tokens(steps: int) -> EstimateSettings:
        length = min(context, steps * LENGTH_STEP)
        return replace(settings, micro_batch="1", micro_tokens="auto", max_length=length)

    most_steps = max(1, -(-context // LENGTH_STEP))
    found = most(estimates, tokens, most_steps, gpu)
    return Largest(most(estimates, rows, MOST_ROWS, gpu), min(context, found * LENGTH_STEP))


def most(estimates: Estimates, settings_of: Callable[[int], EstimateSettings], highest: int, gpu: Gpu) -> int:
    """The largest count from 1 to `highest` whose settings the card holds; 0 if none.

    A guess that stays far below the card's limit needs no simulation. One that the simulation refuses is corrected along
    the line between it and one row: what grows faster than a straight line lies below that, so that the next guess holds.
    """
    guess = guessed(estimates, settings_of, highest, gpu)
    limit = gpu.usable_bytes - gpu.margin_bytes
    low, high = 0, highest
    while low < high:
        middle = (low + high + 1) // 2
        if guess(middle) <= limit:
            low = middle
        else:
            high = middle - 1
    if estimates.is_described(settings_of(1), gpu) and guess(low) < limit - CLEAR * gpu.usable_bytes:
        return low
    first = guess(1)
    for _ in range(LINE_SIMULATIONS):
        taken = process_bytes(estimates.exact(settings_of(low), gpu), gpu) if low else 0
        if taken <= limit:
            return low
        low = max(0, min(low - 1, 1 + int((limit - first) / max(1, taken - first) * (low - 1))))
    while low and process_bytes(estimates.exact(settings_of(low), gpu), gpu) > limit:
        low //= 2
    return low


def guessed(
    estimates: Estimates, settings_of: Callable[[int], EstimateSettings], highest: int, gpu: Gpu
) -> Callable[[int], float]:
    """The process's bytes by count: of the closed form, or a straight line through two simulations.

    The share that the allocator's holes add is taken from what was simulated already.
    """
    if estimates.is_described(settings_of(1), gpu):
        ratio = estimates.holes(gpu)
        return lambda count: ratio * estimates.rough(settings_of(count), gpu).allocated_bytes + gpu.context_bytes
    other = min(4, highest)
    first, second = (process_bytes(estimates.exact(settings_of(count), gpu), gpu) for count in (1, other))
    return lambda count: first + (second - first) / max(1, other - 1) * (count - 1)


# ---------------------------------------------------------------- changes
def changes(settings: EstimateSettings, rows: int, tokens: int) -> list[Change]:
    """The options worth changing, one at a time, the least loss first."""
    found = []
    if settings.gradient_checkpointing != "on":
        found.append(change("--gradient-checkpointing on", gradient_checkpointing="on"))
    if rows > 1:
        found.append(change("--micro-batch 1", micro_batch="1", micro_tokens="auto"))
    if settings.optimizer == "adamw" and settings.technique == "full":
        found.append(change("--optimizer adamw-8bit", optimizer="adamw-8bit"))
    full = f" instead of {'--method full' if settings.method else '--full'}"
    others = {"lora": False, "full": False, "load_in_8bit": False, "method": None}
    if settings.technique == "full":
        found.append(change(f"--lora{full}", **others | {"lora": True}))
    instead = {"int8": " instead of --load-in-8bit", "full": full, "lora": ""}.get(settings.recipe)
    if instead is not None and settings.quantize is None:
        found.append(change(f"--qlora{instead}", qlora=True, dtype="auto", **others))
    if tokens // 2 >= SHORTEST:
        found.append(change(f"--max-length {tokens // 2}", max_length=tokens // 2))
    return found


def change(words: str, **options: Any) -> Change:
    """A single change with its price."""
    return Change(words, options, PRICES[next(name for name in options if name in PRICES)])


def steps_down(settings: EstimateSettings, rows: int, tokens: int) -> Iterator[list[Change]]:
    """The changes one on top of the other, the least loss first, then ever shorter rows."""
    singles = changes(settings, rows, tokens)
    for count in range(1, len(singles) + 1):
        yield singles[:count]
    others = [each for each in singles if "max_length" not in each.options]
    while (tokens := tokens // 2) // 2 >= SHORTEST:
        yield [*others, change(f"--max-length {tokens // 2}", max_length=tokens // 2)]


def smallest_step(estimates: Estimates, settings: EstimateSettings, gpu: Gpu) -> Change | None:
    """The first step down that the card holds, without those of its changes that it holds without; None if there is none."""

    def fits(several: list[Change]) -> bool:
        return estimates.judge_as_asked(replace(settings, **joined(several).options), gpu).word == "fits"

    run = estimates.plan(settings, gpu)
    enough = next(filter(fits, steps_down(settings, run.rows, run.tokens)), None)
    for each in enough or []:
        rest = [other for other in enough or [] if other is not each]
        if rest and fits(rest):
            enough = rest
    return joined(enough) if enough else None


def joined(several: list[Change]) -> Change:
    """All changes together."""
    options = {name: value for each in several for name, value in each.options.items()}
    return Change(" ".join(each.words for each in several), options, "; ".join(each.price for each in several))


def suggest(estimates: Estimates, settings: EstimateSettings, gpu: Gpu, before: Verdict) -> list[Suggestion]:
    """What each change would save, and the smallest combination that is enough; the largest saving first."""
    run = estimates.plan(settings, gpu)
    singles = changes(settings, run.rows, run.tokens)
    found = [priced(estimates, settings, each, gpu, before) for each in singles]
    if not any(each.fits for each in found) and (together := smallest_step(estimates, settings, gpu)) is not None:
        found.append(priced(estimates, settings, together, gpu, before))
    return sorted((each for each in found if each.saved_bytes > 0), key=lambda each: each.process_bytes)


def priced(estimates: Estimates, settings: EstimateSettings, each: Change, gpu: Gpu, before: Verdict) -> Suggestion:
    """A change with what it saves."""
    after = estimates.judge_as_asked(replace(settings, **each.options), gpu)
    saved = before.process_bytes - after.process_bytes
    return Suggestion(each.words, each.price, after.process_bytes, saved, after.word == "fits", after.is_rough)


# ---------------------------------------------------------------- settings that fit
def settings_that_fit(estimates: Estimates, settings: EstimateSettings, gpu: Gpu) -> EstimateSettings | None:
    """The settings as asked if the card holds them, else with as few losses as it takes; None if nothing is enough.

    The answer is simulated (with --fast: the closed form's).
    """
    settled = estimates.with_settled_checkpointing(settings, gpu)
    if estimates.judge_as_asked(settled, gpu).word != "fits":
        step = smallest_step(estimates, settled, gpu)
        if step is None:
            return None
        settled = replace(settled, **step.options)
    return settled if is_confirmed(estimates, settled, gpu) else None


def is_confirmed(estimates: Estimates, settings: EstimateSettings, gpu: Gpu) -> bool:
    """The simulation says so too."""
    return gpu.holds(estimates.exact(settings, gpu).reserved_bytes)


def train_command(settings: EstimateSettings) -> str:
    """`ftkit train train.jsonl --model M --qlora ...`: the options that differ from train's defaults."""
    words = ["ftkit", "train", settings.data or "train.jsonl"]
    for each in fields(ModelSettings):
        value = getattr(settings, each.name)
        if value != each.default:
            words += [flag_of(each.name)] if value is True else [flag_of(each.name), f"{value}"]
    return shlex.join(words)
