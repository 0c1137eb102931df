"""Reading what a person types: line editing, a history across sessions, completion; plain lines where that is all."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ftkit import console
from ftkit.errors import ExitCode, UserError

PROMPT = "> "
LineReader = Callable[[], str]
"""Returns what was typed; raises EOFError at Ctrl-D and KeyboardInterrupt at Ctrl-C."""
WORDS = Mapping[str, Sequence[str]]
"""A command's name -> the words that may follow it."""


def line_reader(words: WORDS) -> LineReader:
    """Line editing with a history across sessions; plain lines where the terminal can do no more."""
    return read_plain_line if console.is_dumb() else editing_reader(words)


def read_plain_line() -> str:
    """A line without editing."""
    try:
        return input(PROMPT)
    except (EOFError, KeyboardInterrupt):
        sys.stdout.write("\n")
        raise
    except UnicodeDecodeError as error:  # told by `whole_text`, as what line editing gives for such bytes
        return bytes(error.object).decode("utf-8", "surrogateescape")


def whole_text(typed: str, what: str) -> str:
    """What was typed as text: where the locale knows no UTF-8, Python gives its bytes as halves of surrogates."""
    try:
        return typed.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise UserError(f"{what} is not UTF-8", ExitCode.DATA, hint="set the terminal's encoding to UTF-8") from None


def editing_reader(words: WORDS) -> LineReader:
    """A reader with prompt_toolkit: arrow keys, search in the history, several lines (typed or pasted), completion."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    class LenientHistory(FileHistory):
        """What was typed before; a disk that becomes full or read-only costs the history, not the conversation."""

        def store_string(self, string: str) -> None:
            with suppress(OSError, UserError):
                super().store_string(whole_text(string, "this line"))

    class Commands(Completer):
        """Commands, and what may follow them."""

        def get_completions(self, document: Any, complete_event: Any) -> Iterator[Completion]:
            typed = document.text_before_cursor
            word = typed.removeprefix("/").rpartition(" ")[2]
            for found in completions(typed, words):
                yield Completion(found, start_position=-len(word))

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def begin_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    path = writable_history()
    history: History = LenientHistory(path) if path else InMemoryHistory()
    session: PromptSession[str] = PromptSession(
        history=history, completer=Commands(), complete_while_typing=False, key_bindings=keys
    )
    return lambda: session.prompt(PROMPT)


def completions(typed: str, words: WORDS) -> list[str]:
    """What may stand where the cursor is: the name of a command behind a slash, or a word that belongs to it."""
    if not typed.startswith("/") or "\n" in typed:
        return []
    name, space, word = typed[1:].partition(" ")
    return [found for found in (words.get(name, ()) if space else words) if found.startswith(word if space else name)]


def writable_history() -> Path | None:
    """The history file, readable by its owner only; None if it cannot be written. A damaged one is moved aside."""
    path = history_path(os.environ)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
        if is_damaged(path):
            aside = next(
                name for n in range(1, 1000) if not (name := path.with_name(f"{path.name}.damaged-{n}")).exists()
            )
            path.rename(aside)
            console.warn(f"the history of what you typed was damaged: moved to {aside}, a new one begins")
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError as error:
        console.detail(f"no history: {path}: {error.strerror}")
        return None
    return path


def is_damaged(path: Path) -> bool:
    """True if a file is no history as prompt_toolkit writes it: UTF-8, lines that begin with # or +, or are empty.

    The last line may lack its end: a kill can come in the middle of it.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return True
    return "\x00" in text or any(line and line[0] not in "#+" for line in text.split("\n"))


def history_path(environment: Mapping[str, str]) -> Path:
    """ftkit/chat_history in XDG_STATE_HOME or ~/.local/state.

    XDG base directory specification: a path that is not absolute is passed over.
    """
    state = Path(environment.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():
        state = Path(environment.get("HOME") or "~").expanduser() / ".local" / "state"
    return state / "ftkit" / "chat_history"
