"""ftkit chat: open what was trained, talk to it at a terminal, or answer lines from a pipe."""

import os
import sys
from collections.abc import Iterator
from itertools import chain
from typing import Any

import orjson

from ftkit import console
from ftkit.commands.chat_classes import refuse_for_classes, tell_classes
from ftkit.core.conversation import Conversation, Prompt, Speaker
from ftkit.core.encoding import Encoder
from ftkit.core.generation import Answer, Sampling
from ftkit.core.settings import ChatSettings
from ftkit.errors import ExitCode, UserError
from ftkit.io.base_model import BUILTIN
from ftkit.io.devices import pick_device
from ftkit.io.questions import Question, read_questions, typed
from ftkit.io.run_folder import latest_run
from ftkit.io.template import Template
from ftkit.io.template_files import load_template
from ftkit.io.trained import Loaded, Trained, load_trained, open_trained, open_trained_run

STDIN = "<stdin>"


def run(settings: ChatSettings) -> None:
    """Talk to a run, a merged model or any model."""
    asked = questions(settings)
    trained = open_asked(settings.run)
    if trained.classes:
        refuse_for_classes(settings)
        tell_classes(asked, settings, load_trained(trained, pick_device(settings.device)))
        return
    template = choose_template(settings.template, trained)
    speaker = make_speaker(load_trained(trained, pick_device(settings.device)), template)
    check_system(settings.system, speaker)
    introduce(trained, speaker)
    if asked is None:
        talk(settings, speaker)
    else:
        answer_all(asked, settings, speaker)


def questions(settings: ChatSettings) -> Iterator[Question] | None:
    """What to answer: -p, or the lines of stdin; None where a person sits at the terminal.

    The first line is read, and refused if it is wrong, before anything is loaded.
    """
    if settings.prompt is not None:
        if not settings.prompt.strip():
            raise UserError("-p is empty", ExitCode.USAGE, hint='ftkit chat -p "Write a haiku."')
        return iter([typed(settings.prompt, "-p")])
    if console.is_terminal(sys.stdin):
        if settings.json or not console.is_terminal(sys.stdout):
            what = "--json needs" if settings.json else "stdout is no terminal, so chat needs"
            raise UserError(f"{what} -p or lines on stdin", ExitCode.USAGE, hint='ftkit chat -p "Write a haiku."')
        return None
    lines = read_questions(sys.stdin.buffer, STDIN) if sys.stdin else iter(())
    first = next(lines, None)
    if first is None:
        raise UserError(f"{STDIN}: 0 prompts", ExitCode.DATA, hint='echo "Write a haiku." | ftkit chat')
    return chain([first], lines)


def open_asked(name: str | None) -> Trained:
    """What was named; else the run that completed last; else the base model, said."""
    if name is not None:
        return open_trained(name)
    latest = latest_run()
    if latest is not None:
        return open_trained_run(latest)
    base = os.environ.get("FTKIT_MODEL", BUILTIN)
    console.info(f"no run here yet, so this is the untuned base {base}; to tune it: ftkit train train.jsonl")
    return open_trained(base)


def choose_template(given: str | None, trained: Trained) -> Template | None:
    """The template that --template names, else the one that training stored. A difference is said even with -q."""
    stored = trained.card.template if trained.card else None
    if given is None:
        return stored
    template = load_template(given)
    if stored is not None and template.sha256 != stored.sha256:
        console.warn(
            f"{trained.name} was trained with template {stored.fingerprint}, --template is {template.fingerprint}: "
            "expect worse answers"
        )
    return template


def make_speaker(loaded: Loaded, template: Template | None) -> Speaker:
    """The loaded model with its template and everything that ends an answer."""
    encoder = Encoder(loaded.tokenizer, template)
    stop_ids = {*encoder.stop_ids, *(loaded.card.stop_tokens if loaded.card else own_stop_ids(loaded.model))}
    stored = loaded.card if loaded.card and template == loaded.template else None
    strings = dict.fromkeys([*(template.stop if template else ()), *(stored.stop_strings if stored else ())])
    return Speaker(loaded.model, encoder, sorted(stop_ids), tuple(strings), loaded.context)


def own_stop_ids(model: Any) -> list[int]:
    """The end tokens that a model's makers wrote into generation_config.json."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def check_system(system: str | None, speaker: Speaker) -> None:
    """A system message needs a chat template that has a place for it."""
    if system is None:
        return
    try:
        Conversation(speaker, Sampling(1), system)
    except UserError as error:
        raise UserError(f"--system: {error.message}", ExitCode.USAGE, hint=error.hint) from None


def introduce(trained: Trained, speaker: Speaker) -> None:
    """Who answers and in which form it likes to be asked."""
    base = f" on {trained.base.name}" if trained.adapter else ""
    console.info(f"{trained.name}{base}: {form_of(speaker)}")
    if trained.card is None or trained.card.pattern is None:
        return
    example = f"; for example: {trained.card.example}" if trained.card.example else ""
    console.info(f"trained on prompts of the form: {trained.card.pattern}{example}")


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


def talk(settings: ChatSettings, speaker: Speaker) -> None:
    """The conversation at the terminal."""
    from ftkit import terminal  # with prompt_toolkit, which pipes do not need

    console.info("/help lists the commands, Ctrl-D leaves")
    conversation = Conversation(speaker, sampling_of(settings), settings.system)
    terminal.converse(conversation, terminal.line_reader())


def answer_all(asked: Iterator[Question], settings: ChatSettings, speaker: Speaker) -> None:
    """Answer each question as a conversation of its own, in order, as it comes."""
    sampling = sampling_of(settings)
    answered = cut = 0
    for question in asked:
        prompt = prompt_for(question, settings, speaker)
        answer = speaker.answer(prompt, sampling)
        write_answer(question, answer, speaker, as_json=settings.json)
        answered, cut = answered + 1, cut + (answer.finish == "length")
    if cut:
        console.info(f"{cut} of {answered} answers ended by length (--max-new {settings.max_new})")


def prompt_for(question: Question, settings: ChatSettings, speaker: Speaker) -> Prompt:
    """The prompt of a question; what is wrong with it is told at its place."""
    require_same_template(question, speaker)
    try:
        if question.rendered is not None:
            return speaker.rendered_prompt(question.rendered)
        messages = question.messages
        if settings.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": settings.system}, *messages]
        prompt = speaker.prompt(messages, settings.max_new)
    except UserError as error:
        raise UserError(f"{question.where}: {error.message}", error.exit_code, hint=error.hint) from None
    if prompt.dropped:
        console.info(f"{question.where}: the context is full, the {prompt.dropped} oldest exchanges are left out")
    return prompt


def require_same_template(question: Question, speaker: Speaker) -> None:
    """A row that was rendered with one template is not for a model that was trained with another."""
    template = speaker.encoder.template
    if question.template is None or template is None or question.template == template.fingerprint:
        return
    raise UserError(
        f"{question.where}: the row was made with template {question.template}, the model's is {template.fingerprint}",
        ExitCode.DATA, hint="prepare the rows with the model's template, or choose theirs with --template",
    )  # fmt: skip


def write_answer(question: Question, answer: Answer, speaker: Speaker, *, as_json: bool) -> None:
    """One answer on stdout, at once."""
    text = speaker.content(answer.text)
    if as_json:
        row = {"prompt": question.text, "answer": text, "finish": answer.finish, "tokens": len(answer.ids)}
        line = orjson.dumps(row)
    else:
        line = console.safe(text, sys.stdout).encode("utf-8", "replace")
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def sampling_of(settings: ChatSettings) -> Sampling:
    """How answers are chosen."""
    return Sampling(settings.max_new, settings.temperature, settings.seed)
