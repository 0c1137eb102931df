"""Talking at a terminal: reads what a person types, shows answers as they come, obeys commands like /help."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ftkit import console
from ftkit.core.conversation import Conversation, Reply
from ftkit.errors import ExitCode, UserError, did_you_mean

PROMPT = "> "
LineReader = Callable[[], str]
"""Returns what was typed; raises EOFError at Ctrl-D and KeyboardInterrupt at Ctrl-C."""


def converse(conversation: Conversation, read_line: LineReader) -> None:
    """Question and answer until Ctrl-D or /quit; a mistake costs one line, not the conversation."""
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    while True:
        try:
            line = read_line().strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        try:
            follow(conversation, line)
        except UserError as error:
            console.error(error.message, error.hint)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def follow(conversation: Conversation, line: str) -> None:
    """One line: a command, or something to answer (`//` in front of a text that begins with a slash)."""
    if line.startswith("/") and not line.startswith("//"):
        obey(conversation, line[1:])
    elif line:
        show_answer(conversation, line.removeprefix("/") if line.startswith("//") else line)


def show_answer(conversation: Conversation, text: str) -> bool:
    """Answer aloud; Ctrl-C ends the answer, and what was said by then is kept. False if nothing was said.

    The turn is kept before the status says that it ended: whoever reads that may press Ctrl-C again at once.
    """
    reply = conversation.ask(text)
    say_dropped(conversation, reply)
    began = time.perf_counter()
    with ctrl_c_calls(reply.stop) as pressed:
        try:
            for piece in reply:
                sys.stdout.write(console.safe(piece, sys.stdout))
                sys.stdout.flush()
        except KeyboardInterrupt:
            pressed.append(signal.SIGINT)
        finally:
            sys.stdout.write("\n")
            sys.stdout.flush()
        stopped = bool(pressed)
        is_kept = bool(reply.content) or not stopped
        if is_kept:
            conversation.keep(text, reply)
    with suppress(KeyboardInterrupt):  # one more press stops nothing
        say_status(conversation, reply, time.perf_counter() - began, stopped=stopped)
    return is_kept


@contextmanager
def ctrl_c_calls(stop: Callable[[], None]) -> Iterator[list[int]]:
    """While open, the first Ctrl-C calls `stop`, a second one interrupts; the list holds those that were pressed.

    An exception in the middle of a forward pass can get lost: libraries call back into Python where none may pass.
    """
    pressed: list[int] = []

    def handle(number: int, _: object) -> None:
        pressed.append(number)
        stop()
        if len(pressed) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def say_dropped(conversation: Conversation, reply: Reply) -> None:
    """The turns that the model no longer sees."""
    if dropped := reply.prompt.dropped:
        turns = "turn is" if dropped == 1 else f"{dropped} turns are"
        full = f"the context of {conversation.speaker.context:,} tokens is full (/reset begins again)"
        console.info(f"the oldest {turns} left out: {full}")


def say_status(conversation: Conversation, reply: Reply, seconds: float, *, stopped: bool) -> None:
    """Length and speed of an answer, and why it ended where the model did not end it."""
    tokens = len(reply.answer.ids)
    parts = [f"{tokens} token{'' if tokens == 1 else 's'}", f"{tokens / max(seconds, 1e-9):.0f} tokens/s"]
    if stopped:
        parts.append("stopped by you")
    elif reply.answer.finish == "length":
        limit = conversation.sampling.max_new
        full = "ended by length: the context is full"
        parts.append(f"ended by length (/set max-new {2 * limit})" if tokens >= limit else full)
    console.faint(f"[{', '.join(parts)}]")


@dataclass(frozen=True)
class Command:
    """A command of the conversation: what it takes, what it does."""

    takes: str
    help: str
    obey: Callable[[Conversation, str], None]


def obey(conversation: Conversation, typed: str) -> None:
    """Run `name argument`."""
    name, _, argument = typed.partition(" ")
    if name not in COMMANDS:
        near = did_you_mean(name, list(COMMANDS))
        hint = f"{near}/help lists them; // begins a text that starts with a slash"
        raise UserError(f"no command /{name}", ExitCode.USAGE, hint=hint)
    COMMANDS[name].obey(conversation, argument.strip())


def show_help(conversation: Conversation, argument: str) -> None:
    """The commands, each with one line."""
    for name, command in COMMANDS.items():
        console.write_line(f"  {f'/{name} {command.takes}'.rstrip():<32} {command.help}")
    console.write_line(f"  {'Ctrl-C':<32} stop the answer, or leave the line")
    console.write_line(f"  {'Ctrl-D':<32} leave")


def begin_again(conversation: Conversation, argument: str) -> None:
    """Forget the turns."""
    conversation.reset()
    console.info("begun again" + (", the system message stays" if conversation.system else ""))


def change_system(conversation: Conversation, argument: str) -> None:
    """Set, show or (with `none`) remove the system message."""
    if argument:
        conversation.set_system(None if argument == "none" else argument)
    console.info(f"system message: {conversation.system or 'none'}")


def answer_again(conversation: Conversation, argument: str) -> None:
    """Another answer to the last question; the earlier one stays if none comes."""
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


def take_back(conversation: Conversation, argument: str) -> None:
    """Remove the last question and answer."""
    question = conversation.undo()
    if question is None:
        raise UserError("nothing to take back", ExitCode.USAGE, hint="type something")
    console.info(f"taken back: {shortened(question)}")


def shortened(text: str, longest: int = 60) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def change_setting(conversation: Conversation, argument: str) -> None:
    """`max-new N` or `temperature X`; without anything, show both."""
    name, _, value = argument.partition(" ")
    sampling = conversation.sampling
    if name:
        hint = "/set max-new 256, or /set temperature 0.8"
        if name not in ("max-new", "temperature"):
            raise UserError(f"no setting '{name}'", ExitCode.USAGE, hint=hint)
        number = number_of(value.strip(), whole=name == "max-new")
        if number is None:
            raise UserError(f"{name} {value.strip() or 'without a number'} is out of range", ExitCode.USAGE, hint=hint)
        is_length = name == "max-new"
        sampling = replace(sampling, max_new=int(number)) if is_length else replace(sampling, temperature=number)
        conversation.sampling = sampling
    console.info(f"max-new {sampling.max_new}, temperature {sampling.temperature:g}")


def number_of(text: str, *, whole: bool) -> float | int | None:
    """A count of 1 or more, or a number of 0 or more; None for anything else."""
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        return None
    return number if (1 if whole else 0) <= number < float("inf") else None


def leave(conversation: Conversation, argument: str) -> None:
    """End as Ctrl-D does."""
    raise EOFError


COMMANDS = {
    "help": Command("", "this list", show_help),
    "reset": Command("", "forget the conversation so far", begin_again),
    "system": Command("TEXT", "set the system message (none removes it)", change_system),
    "retry": Command("", "answer the last question again", answer_again),
    "undo": Command("", "take the last question and its answer back", take_back),
    "set": Command("max-new N|temperature X", "change how answers are made", change_setting),
    "quit": Command("", "leave", leave),
}


def line_reader() -> LineReader:
    """Line editing with a history across sessions; plain lines where the terminal can do no more."""
    if os.environ.get("TERM", "dumb") in ("dumb", "unknown", ""):
        return read_plain_line
    return editing_reader()


def read_plain_line() -> str:
    """A line without editing."""
    try:
        return input(PROMPT)
    except (EOFError, KeyboardInterrupt):
        sys.stdout.write("\n")
        raise
    except UnicodeDecodeError:
        console.error("this line is not UTF-8", "set the terminal's encoding to UTF-8")
        return ""


def editing_reader() -> LineReader:
    """A reader with prompt_toolkit: arrow keys, search in the history, pasting of several lines."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory

    class LenientHistory(FileHistory):
        """What was typed before; a disk that becomes full or read-only costs the history, not the conversation."""

        def store_string(self, string: str) -> None:
            with suppress(OSError):
                super().store_string(string)

    path = writable_history()
    history: History = LenientHistory(path) if path else InMemoryHistory()
    session: PromptSession[str] = PromptSession(history=history)
    return lambda: session.prompt(PROMPT)


def writable_history() -> Path | None:
    """The history file, readable by its owner only; None if it cannot be written."""
    path = history_path(os.environ)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError as error:
        console.detail(f"no history: {path}: {error.strerror}")
        return None
    return path


def history_path(environment: Mapping[str, str]) -> Path:
    """ftkit/chat_history in XDG_STATE_HOME or ~/.local/state.

    XDG base directory specification: a path that is not absolute is passed over.
    """
    state = Path(environment.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():
        state = Path(environment.get("HOME") or "~").expanduser() / ".local" / "state"
    return state / "ftkit" / "chat_history"
