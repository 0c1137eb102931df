"""ftkit chat: open what was trained, talk to it at a terminal, or answer lines from a pipe."""

import sys
from dataclasses import replace

from ftkit import console
from ftkit.commands import chat_terminal
from ftkit.commands.chat_artefact import settle_sampling
from ftkit.commands.chat_classes import refuse_for_classes, tell_classes
from ftkit.commands.chat_editing import whole_text
from ftkit.commands.chat_pipe import Questions, answer_questions, one_question, read_stdin
from ftkit.commands.chat_session import Session
from ftkit.commands.chat_subjects import introduce, load_speakers, open_asked
from ftkit.core.chat_settings import ChatSettings
from ftkit.core.conversation import Conversation, Speaker
from ftkit.core.generation import Sampling
from ftkit.errors import ExitCode, UserError
from ftkit.io.devices import pick_device
from ftkit.io.trained import load_trained


def run(settings: ChatSettings) -> None:
    """Talk to runs, adapters, a merged model or any model."""
    settings = with_whole_texts(settings)
    asked = questions(settings)
    opened = open_asked(settings.runs)
    if any(trained.classes for trained in opened):
        refuse_for_classes(settings)
        tell_classes(asked, settings, load_trained(opened[0], pick_device(settings.device)))
        return
    speakers = load_speakers(opened, settings.template, pick_device(settings.device))
    check_system(settings.system, speakers[0])
    introduce(opened, speakers, settings.system)
    sampling = settle_sampling(settings, opened[0], speakers[0])
    if asked is None:
        chat_terminal.talk(Session(Conversation(speakers[0], sampling, settings.system), speakers))
    else:
        answer_questions(asked, settings, sampling, speakers)


def with_whole_texts(settings: ChatSettings) -> ChatSettings:
    """The settings with what was typed as Unicode, whatever the locale made of it."""
    prompt, system = settings.prompt, settings.system
    return replace(
        settings,
        prompt=None if prompt is None else whole_text(prompt, "-p"),
        system=None if system is None else whole_text(system, "--system"),
    )


def questions(settings: ChatSettings) -> Questions | None:
    """What to answer: -p, or the lines of stdin; None where a person sits at the terminal.

    The first line is read, and refused if it is wrong, before anything is loaded.
    """
    if settings.prompt is not None:
        if not settings.prompt.strip():
            raise UserError("-p is empty", ExitCode.USAGE, hint='ftkit chat -p "Write a haiku."')
        return one_question(settings.prompt)
    if console.is_terminal(sys.stdin):
        if settings.json or not console.is_terminal(sys.stdout):
            what = "--json needs" if settings.json else "stdout is no terminal, so chat needs"
            raise UserError(f"{what} -p or lines on stdin", ExitCode.USAGE, hint='ftkit chat -p "Write a haiku."')
        return None
    return read_stdin()


def check_system(system: str | None, speaker: Speaker) -> None:
    """A system message needs a chat template that has a place for it."""
    if system is None:
        return
    try:
        Conversation(speaker, Sampling(1), system)
    except UserError as error:
        raise UserError(f"--system: {error.message}", ExitCode.USAGE, hint=error.hint) from None
