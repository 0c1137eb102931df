"""The commands of a conversation at the terminal: `/name argument`."""

import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftkit import console
from ftkit.commands.chat_answer import show_answer
from ftkit.commands.chat_rows import append_rows, preference_rows, training_rows
from ftkit.commands.chat_session import Session, Vote
from ftkit.commands.chat_subjects import find_speaker
from ftkit.core.answer_settings import RANGES, in_words, is_in_range
from ftkit.errors import ExitCode, UserError, did_you_mean

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SAVED, VOTES = "chat.jsonl", "votes.jsonl"


@dataclass(frozen=True)
class Command:
    """A command of the conversation: what it takes, what it does."""

    takes: str
    help: str
    obey: Callable[[Session, str], None]


def obey(session: Session, typed: str) -> None:
    """Run `name argument`."""
    name, _, argument = typed.partition(" ")
    if name not in COMMANDS:
        near = did_you_mean(name, list(COMMANDS))
        hint = f"{near}/help lists them; // begins a text that starts with a slash"
        raise UserError(f"no command /{name}", ExitCode.USAGE, hint=hint)
    COMMANDS[name].obey(session, argument.strip())


def show_help(session: Session, argument: str) -> None:
    """The commands, each with one line."""
    for name, command in COMMANDS.items():
        console.write_line(f"  {f'/{name} {command.takes}'.rstrip():<20} {command.help}")
    for keys, what in KEYS.items():
        console.write_line(f"  {keys:<20} {what}")


def begin_again(session: Session, argument: str) -> None:
    """Forget the turns."""
    session.conversation.reset()
    session.saved.clear()
    console.info("begun again" + (", the system message stays" if session.conversation.system else ""))


def change_system(session: Session, argument: str) -> None:
    """Set, show or (with `none`) remove the system message."""
    if argument:
        session.conversation.set_system("" if argument == "none" else argument)
    console.info(f"system message: {session.conversation.system or 'none'}")


def answer_again(session: Session, argument: str) -> None:
    """Another answer to the last question; the earlier one stays if none comes."""
    conversation = session.conversation
    before = list(conversation.turns)
    question = conversation.undo()
    if question is None:
        raise UserError("nothing has been answered yet", ExitCode.USAGE, hint="type something")
    if conversation.sampling.temperature == 0:
        console.info("temperature is 0, so the answer will be the same (/set temperature 0.8 varies it)")
    is_kept = False
    try:
        is_kept = show_answer(conversation, question)
    finally:
        if not is_kept:
            conversation.turns = before


def take_back(session: Session, argument: str) -> None:
    """Remove the last question and answer."""
    question = session.conversation.undo()
    if question is None:
        raise UserError("nothing to take back", ExitCode.USAGE, hint="type something")
    console.info(f"taken back: {console.shortened(question)}")


def change_adapter(session: Session, argument: str) -> None:
    """Let another adapter answer from now on, the same conversation behind it; without a name, list them."""
    conversation = session.conversation
    if not argument:
        for name in session.names:
            console.write_line(f"  {name}{' (answers now)' if name == conversation.speaker.name else ''}")
        return
    speaker = find_speaker(session.speakers, argument)
    conversation.speaker = speaker
    console.info(f"{speaker.name} answers" + (", and sees the conversation so far" if conversation.turns else ""))
    if conversation.turns and not speaker.keeps_history:
        console.info("its template takes each prompt on its own: it does not see the conversation so far")
    if conversation.system and not speaker.keeps_history:
        console.info("its template has no place for the system message: it does not see it")


def compare(session: Session, argument: str) -> None:
    """What all of them answer to one question, with the same seed; the conversation stays as it is."""
    answers = answers_of_all(session, argument, "compare")
    console.side_by_side(answers)
    same = len(set(answers.values())) == 1
    console.info("all say the same" if same else "none of this is in the conversation; /adapter NAME goes on with one")


def answers_of_all(session: Session, question: str, command: str) -> dict[str, str]:
    """Name -> answer."""
    if not question:
        raise UserError(f"/{command} needs a question", ExitCode.USAGE, hint=f"/{command} Write a haiku.")
    if len(session.speakers) < 2:
        what = "a whole model is loaded, there is nothing to compare it with"
        raise UserError(what, ExitCode.USAGE, hint="ftkit chat RUN RUN holds several adapters of one base")
    began = time.perf_counter()
    answers = session.conversation.compare(question, session.speakers)
    console.detail(f"{len(answers)} answers in {time.perf_counter() - began:.2f} s")
    pairs = zip(session.speakers, answers, strict=True)
    return {speaker.name: speaker.content(answer.text) for speaker, answer in pairs}


def open_vote(session: Session, argument: str) -> None:
    """Answers under letters, in an order that the seed decides; the next line may be the letter of the best."""
    conversation, speaker = session.conversation, session.conversation.speaker
    answers = answers_of_all(session, argument, "vote")
    if len(set(answers.values())) == 1:
        console.info("all say the same: nothing to vote on")
        return
    names = list(answers)
    random.Random(f"{conversation.sampling.seed}:{sum(session.wins.values())}:{argument}").shuffle(names)
    letters = dict(zip(LETTERS, names, strict=False))
    message = {"role": "user", "content": argument}
    turns = [*conversation.opening, *conversation.turns, message] if speaker.keeps_history else [message]
    by_letter = {letter: answers[name] for letter, name in letters.items()}
    session.vote = Vote(turns, speaker.keeps_history, by_letter, letters)
    console.side_by_side(by_letter)
    console.info(f"which is best? {', '.join(letters)}; anything else casts no vote")


def cast_vote(session: Session, line: str) -> bool:
    """Close the open vote; True if the line was one of its letters, which is then written down."""
    vote, session.vote = session.vote, None
    letter = line.strip().lower()
    if vote is None or letter not in vote.answers:
        return False
    rows = preference_rows(vote, letter)
    if rows:
        append_rows(Path(VOTES), rows)
    winner = vote.speakers[letter]
    session.wins[winner] = session.wins.get(winner, 0) + 1
    whose = ", ".join(f"{letter} was {name}" for letter, name in vote.speakers.items())
    won = ", ".join(f"{name} {session.wins.get(name, 0)}" for name in session.names)
    console.info(f"{whose}; votes so far: {won} ({len(rows)} row{'' if len(rows) == 1 else 's'} added to {VOTES})")
    return True


def save(session: Session, argument: str) -> None:
    """Add the conversation to a file of training rows."""
    conversation, path = session.conversation, argument or SAVED
    begun = session.saved.get(path, 0)
    if len(conversation.turns) <= begun:
        what = "nothing has been said since the last /save" if begun else "nothing has been said yet"
        raise UserError(what, ExitCode.USAGE, hint="type something")
    whole = conversation.speaker.keeps_history
    turns = conversation.turns if whole else conversation.turns[begun:]
    rows = training_rows(turns, conversation.opening, conversation.speaker)
    append_rows(Path(path), rows)
    session.saved[path] = len(conversation.turns)
    again = "; its beginning is there already, from the /save before" if whole and begun else ""
    console.info(f"{len(rows)} row{'' if len(rows) == 1 else 's'} added to {path}{again} (ftkit prep {path})")


def change_setting(session: Session, argument: str) -> None:
    """`max-new N`, `temperature X` and so on; without anything, show all."""
    name, _, value = argument.partition(" ")
    sampling = session.conversation.sampling
    if name:
        hint = "/set max-new 256, /set temperature 0.8, /set top-p 0.9, /set top-k 20, or /set seed 7"
        if name not in SETTINGS:
            raise UserError(f"no setting '{name}'", ExitCode.USAGE, hint=hint)
        number = number_of(SETTINGS[name], value.strip())
        if number is None:
            raise UserError(f"{name} {value.strip() or 'without a number'} is out of range", ExitCode.USAGE, hint=hint)
        changed: dict[str, Any] = {SETTINGS[name]: number}
        sampling = replace(sampling, **changed)
        session.conversation.sampling = sampling
    console.info(in_words({field: getattr(sampling, field) for field in SETTINGS.values()}))


def number_of(setting: str, text: str) -> float | int | None:
    """A number that the setting takes; None for anything else."""
    for kind in (int, float):
        with suppress(ValueError):
            number = kind(text)
            return number if is_in_range(setting, number) else None
    return None


def leave(session: Session, argument: str) -> None:
    """End as Ctrl-D does."""
    raise EOFError


SETTINGS = {name.replace("_", "-"): name for name in (*RANGES, "seed")}
COMMANDS = {
    "help": Command("", "this list", show_help),
    "reset": Command("", "forget the conversation so far", begin_again),
    "system": Command("TEXT", "set the system message (none removes it)", change_system),
    "retry": Command("", "answer the last question again", answer_again),
    "undo": Command("", "take the last question and its answer back", take_back),
    "adapter": Command("NAME", "let another one answer (without: list them)", change_adapter),
    "compare": Command("TEXT", "answers of all adapters and the base", compare),
    "vote": Command("TEXT", f"the same without names: you choose ({VOTES})", open_vote),
    "save": Command("FILE", f"add this to a file of training rows ({SAVED})", save),
    "set": Command("NAME VALUE", "max-new, temperature, top-k, top-p, seed (without: show)", change_setting),
    "quit": Command("", "leave", leave),
}
KEYS = {"Alt-Enter": "a new line in what you type", "Ctrl-C": "stop the answer, or leave the line", "Ctrl-D": "leave"}
