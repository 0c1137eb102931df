"""Talking at a terminal: reads what a person types, shows answers as they come, obeys commands like /help."""

import sys

from ftkit import console
from ftkit.commands.chat_answer import show_answer
from ftkit.commands.chat_commands import COMMANDS, SETTINGS, cast_vote, obey
from ftkit.commands.chat_editing import LineReader, line_reader, whole_text
from ftkit.commands.chat_session import Session
from ftkit.errors import UserError


def talk(session: Session) -> None:
    """The whole conversation."""
    words: dict[str, list[str]] = {name: [] for name in COMMANDS}
    words |= {"adapter": session.names, "set": list(SETTINGS), "system": ["none"]}
    if len(session.names) > 1:
        console.info(
            f"{session.conversation.speaker.name} answers; /adapter and /compare know {', '.join(session.names)}"
        )
    console.info("/help lists the commands, Ctrl-D leaves")
    converse(session, line_reader(words))


def converse(session: Session, read_line: LineReader) -> None:
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
            follow(session, line)
        except UserError as error:
            console.error(error.message, error.hint)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def follow(session: Session, line: str) -> None:
    """One line: a vote, a command, or something to answer (`//` in front of a text that begins with a slash)."""
    line = whole_text(line, "this line")
    if cast_vote(session, line):
        return
    if line.startswith("/") and not line.startswith("//"):
        obey(session, line[1:])
    elif line:
        show_answer(session.conversation, line.removeprefix("/") if line.startswith("//") else line)
