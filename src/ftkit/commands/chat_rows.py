"""Conversations and votes as rows in a file, in the shapes that `ftkit prep` reads."""

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
    """Add rows to the end of a file, in one write."""
    try:
        with open(path, "ab") as file:
            file.write(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", ExitCode.IO, hint="name another file") from None
