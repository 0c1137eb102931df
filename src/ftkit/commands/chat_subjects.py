"""Whom chat talks to: what was named is opened on one base, each with its template and what ends its answers."""

import os
from collections.abc import Sequence
from dataclasses import replace

from ftkit import console
from ftkit.core.adapter_choice import BASE, unmixable
from ftkit.core.conversation import Speaker
from ftkit.core.encoding import Encoder
from ftkit.core.generation import own_stop_ids
from ftkit.core.kept_cache import KeptCaches
from ftkit.errors import ExitCode, UserError, did_you_mean
from ftkit.io.base_model import BUILTIN
from ftkit.io.card import Card
from ftkit.io.run_folder import latest_run
from ftkit.io.several_adapters import adapter_name, load_several, require_one_base, short_names, why_alone
from ftkit.io.template import Template
from ftkit.io.template_files import load_template
from ftkit.io.trained import Loaded, Trained, open_trained, open_trained_run

UNTUNED = "base"
"""What the base without its adapters is called."""


def open_asked(names: Sequence[str]) -> list[Trained]:
    """What was named; else the run that completed last; else the base model, said."""
    if names:
        opened = [open_trained(name) for name in dict.fromkeys(names)]
        require_one_base(opened)
        return opened
    latest = latest_run()
    if latest is not None:
        return [open_trained_run(latest)]
    base = os.environ.get("FTKIT_MODEL", BUILTIN)
    console.info(f"no run here yet, so this is the untuned base {base}; to tune it: ftkit train train.jsonl")
    return [open_trained(base)]


def load_speakers(opened: Sequence[Trained], template: str | None, device: str) -> list[Speaker]:
    """One speaker for each, all on one model in memory; where there are adapters, their base is one more."""
    templates = [choose_template(template, trained) for trained in opened]
    names, kept = short_names([trained.name for trained in opened]), KeptCaches()
    speakers = [
        replace(make_speaker(loaded, form), name=name, adapter=adapter, kept=kept)
        for loaded, form, name, adapter in zip(
            load_several(opened, device), templates, names, adapters_of(opened), strict=True
        )
    ]
    tuned = [speaker for speaker in speakers if speaker.adapter not in (None, BASE)]
    if tuned and len(tuned) == len(speakers) and why_alone(opened[0]) is None:
        speakers.append(replace(tuned[0], name=UNTUNED, adapter=BASE))  # the same prompts as the tuned one
    say_alone(speakers)
    return speakers


def adapters_of(opened: Sequence[Trained]) -> list[str | None]:
    """What `load_several` calls their adapters; None for a model that has no adapters on it."""
    if not any(trained.adapter for trained in opened):
        return [None] * len(opened)
    return [adapter_name(number) if trained.adapter else BASE for number, trained in enumerate(opened)]


def say_alone(speakers: Sequence[Speaker]) -> None:
    """Which adapters answer in passes of their own, where several might have shared one."""
    adapters = {speaker.adapter: speaker.name for speaker in speakers if speaker.adapter not in (None, BASE)}
    if len(adapters) < 2:
        return
    if alone := unmixable(speakers[0].model, [name for name in adapters if name is not None]):
        named = ", ".join(adapters[name] for name in alone)
        console.info(f"{named}: more than plain LoRA (DoRA, experts, saved layers), so answered one by one, not mixed")


def choose_template(given: str | None, trained: Trained) -> Template | None:
    """The template that --template names, else the one that training stored. A difference is said even with -q."""
    stored = trained.card.template if trained.card else None
    if given is None:
        return stored
    template = load_template(given)
    if trained.card is not None and (stored is None or template.sha256 != stored.sha256):
        learnt = learnt_form(trained.card)
        console.warn(
            f"{trained.name} was trained with {learnt}, --template is {template.fingerprint}: expect worse answers"
        )
    return template


def learnt_form(card: Card) -> str:
    """What made the prompts of the training, in words: the rows' template, else what train takes without one."""
    if card.template_fingerprint:
        return f"template {card.template_fingerprint}"
    return "no template" if card.objective == "text" else "the tokenizer's chat template"


def make_speaker(loaded: Loaded, template: Template | None) -> Speaker:
    """The loaded model with its template and everything that ends an answer."""
    encoder = Encoder(loaded.tokenizer, template)
    stop_ids = {*encoder.stop_ids, *(loaded.card.stop_tokens if loaded.card else own_stop_ids(loaded.model))}
    stored = loaded.card if loaded.card and template == loaded.template else None
    strings = dict.fromkeys([*(template.stop if template else ()), *(stored.stop_strings if stored else ())])
    system = loaded.card.system if loaded.card and encoder.renders_chat else None
    learnt = learnt_form(loaded.card) if loaded.card else None
    ends = (sorted(stop_ids), tuple(strings))
    return Speaker(loaded.model, encoder, *ends, loaded.context, system=system, learnt=learnt)


def find_speaker(speakers: Sequence[Speaker], name: str) -> Speaker:
    """The speaker of this name."""
    names = [speaker.name for speaker in speakers]
    if name not in names:
        hint = f"{did_you_mean(name, names)}there is {', '.join(names)}"
        raise UserError(f"no adapter '{name}' here", ExitCode.USAGE, hint=hint)
    return speakers[names.index(name)]


def introduce(opened: Sequence[Trained], speakers: Sequence[Speaker], system: str | None) -> None:
    """Who answers and in which form it likes to be asked. system: what is said instead of what training said."""
    for trained, speaker in zip(opened, speakers, strict=False):
        base = f" on {trained.base.name}" if trained.adapter else ""
        called = f"{speaker.name} is " if len(opened) > 1 else ""
        console.info(f"{called}{trained.name}{base}: {form_of(speaker)}")
        if trained.card is not None and trained.card.pattern is not None:
            example = f"; for example: {trained.card.example}" if trained.card.example else ""
            console.info(f"trained on prompts of the form: {trained.card.pattern}{example}")
        if speaker.system is not None and system is None:
            console.info(f"system message, as in training (/system, --system): {console.shortened(speaker.system)}")


def form_of(speaker: Speaker) -> str:
    """How a text becomes a prompt, in words."""
    template = speaker.encoder.template
    if speaker.keeps_history:
        return f"template {template.fingerprint}" if template else "the tokenizer's chat template"
    if template is None:
        return "no template, it continues your text (--template NAME gives it a form)"
    if template.typed is None and template.prompt is not None:
        return f"template {template.fingerprint}, which names no `typed` field: type whole prompts"
    return f"template {template.fingerprint}, each prompt on its own"
