"""Dialogues written as one text (`### Human: ... ### Assistant: ...`) -> messages."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftkit.errors import ExitCode, UserError


@dataclass(frozen=True)
class Marks:
    """What the turns of user and assistant begin with, as a pattern and as a person would write it."""

    user: str
    assistant: str
    pattern: re.Pattern[str]


HUMAN_ASSISTANT = Marks("Human:", "Assistant:", re.compile(r"(?:^|\n\n)(Human:|Assistant:)"))
"""As in hh-rlhf."""
HASH_MARKS = Marks("### Human:", "### Assistant:", re.compile(r"(### Human:|### Assistant:)"))
"""As in the flattened OpenAssistant sets."""
KNOWN = (HASH_MARKS, HUMAN_ASSISTANT)


def parse_marks(text: str) -> Marks:
    """`User:,Bot:` as the beginnings of lines that open turns."""
    marks = [mark.strip() for mark in text.split(",")]
    if len(marks) != 2 or not all(marks) or marks[0] == marks[1]:
        raise UserError(f"--turns {text}: should be two marks", ExitCode.USAGE, hint="for example --turns User:,Bot:")
    either = "|".join(map(re.escape, marks))
    return Marks(marks[0], marks[1], re.compile(rf"^({either})", re.MULTILINE))


def find_marks(texts: Sequence[Any]) -> Marks | None:
    """The well-known marks that all of the texts use for a user's turn at their beginning; None if there are none."""
    for marks in KNOWN:
        if texts and all(isinstance(text, str) and begins_with_user(text, marks) for text in texts):
            return marks
    return None


def begins_with_user(text: str, marks: Marks) -> bool:
    """True if the first thing in a text is a user's turn, and an assistant's turn follows somewhere."""
    found = [match[1] for match in marks.pattern.finditer(text)]
    return text.lstrip().startswith(marks.user) and marks.assistant in found


def split_turns(text: str, marks: Marks, where: str) -> list[dict[str, str]]:
    """The turns of a dialogue without the space around them; text before the first mark is the system's.

    An empty turn at the end is kept: it is where an answer belongs.
    """
    pieces = marks.pattern.split(text)
    if len(pieces) < 3:
        raise UserError(
            f"{where}: no line begins with {marks.user} or {marks.assistant}",
            ExitCode.DATA,
            hint="--turns says what turns begin with; leave such texts out: --on-error skip",
        )
    turns = [{"role": "system", "content": pieces[0].strip()}] if pieces[0].strip() else []
    for mark, content in zip(pieces[1::2], pieces[2::2], strict=True):
        turns.append({"role": "user" if mark == marks.user else "assistant", "content": content.strip()})
    return turns
