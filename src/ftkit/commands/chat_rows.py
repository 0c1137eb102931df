"""Conversations and votes as rows in a file, in the shapes that `ftkit prep` reads."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from ftkit.commands.chat_session import Vote
from ftkit.core.conversation import Message, Speaker
from ftkit.errors import ExitCode, UserError

Row = dict[str, Any]


def training_rows(turns: Sequence[Message], opening: Sequence[Message], speaker: Speaker) -> list[Row]:
    """A conversation as one row of messages; questions that were asked alone as a row each."""
    if speaker.keeps_history:
        return [{"messages": [*opening, *turns]}]
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return [{"prompt": asked["content"], "completion": said["content"]} for asked, said in pairs]


def preference_rows(vote: Vote, letter: str) -> list[Row]:
    """The chosen answer beside each of the others; whose they are stands beside them. Nothing is learnt from none."""
    rows = []
    for other in vote.answers:
        if vote.answers[other] != vote.answers[letter] and vote.answers[other] and vote.answers[letter]:
            sides = {"chosen": vote.answers[letter], "rejected": vote.answers[other]}
            whose = {"chosen_by": vote.speakers[letter], "rejected_by": vote.speakers[other]}
            rows.append({"prompt": asked_of(vote), **{key: said(vote, text) for key, text in sides.items()}, **whose})
    return rows


def asked_of(vote: Vote) -> Any:
    """The question as a text, or as turns where the model takes turns."""
    return vote.question if vote.takes_turns else vote.question[-1]["content"]


def said(vote: Vote, text: str) -> Any:
    """An answer in the same form."""
    return [{"role": "assistant", "content": text}] if vote.takes_turns else text


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to the end of a file of rows, in one write; a last line that was cut off stays a line of its own."""
    try:
        with open(path, "a+b") as file:
            file.seek(0)
            if not holds_rows(file.readline()):
                raise UserError(f"{path}: is there and holds no rows", ExitCode.EXISTS, hint="name another file")
            is_cut = file.seek(0, os.SEEK_END) > 0 and file.seek(-1, os.SEEK_END) and file.read() != b"\n"
            file.write(b"\n" * bool(is_cut) + b"".join(orjson.dumps(row) + b"\n" for row in rows))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", ExitCode.IO, hint="name another file") from None


def holds_rows(first_line: bytes) -> bool:
    """True for the first line of a file of rows, or of an empty one."""
    try:
        return not first_line.strip() or isinstance(orjson.loads(first_line), dict)
    except ValueError:
        return False
