"""What is asked on a pipe: one question a line, as text or as a JSON object."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ftkit.errors import ExitCode, UserError
from ftkit.io.jsonl import parse_row
from ftkit.io.records import check_messages, check_tools, type_name


@dataclass(frozen=True)
class Question:
    """One thing to answer and where it stood (`<stdin>:3`).

    messages: what was said, the last by the user. rendered: a prompt that `ftkit prep` rendered, instead.
    template: fingerprint of the template that the row was made with, if it names one. adapter: who should answer.
    tools: functions that may be called.
    """

    where: str
    messages: list[dict[str, Any]]
    rendered: str | None = None
    template: str | None = None
    adapter: str | None = None
    tools: list[dict[str, Any]] | None = None

    @property
    def text(self) -> str:
        """What is asked, as people would say it."""
        return self.rendered if self.rendered is not None else str(self.messages[-1]["content"])


def typed(text: str, where: str) -> Question:
    """A text as a question."""
    return Question(where, [{"role": "user", "content": text}])


def read_questions(lines: Iterable[bytes], name: str) -> Iterator[Question]:
    """The questions of a stream, as its lines come; blank lines are passed over. Errors carry `name:line`."""
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            yield parse_question(line, f"{name}:{number}")


def parse_question(line: bytes, where: str) -> Question:
    """A line that begins with `{` is a row; any other is text."""
    if not line.lstrip().startswith(b"{"):
        return typed(decode(line, where), where)
    try:
        row = parse_row(line, where)
    except UserError as error:
        hint = error.hint or 'a line that begins with { is read as JSON; to ask such a text: {"prompt": "{..."}'
        raise UserError(error.message, error.exit_code, hint=hint) from None
    return question_of_row(row, where)


def decode(line: bytes, where: str) -> str:
    """The text of a line without its end."""
    if b"\x00" in line:
        raise UserError(f"{where}: holds a NUL byte", ExitCode.DATA, hint="give UTF-8 text, one question a line")
    try:
        return line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        message = f"{where}: not UTF-8 at byte {error.start}"
        raise UserError(message, ExitCode.DATA, hint="iconv -t UTF-8 converts it") from None


def question_of_row(row: dict[str, Any], where: str) -> Question:
    """A row with a prompt, a text or messages; the answer that a training row has at its end is left out.

    A prompt beside the name of a template is as that template rendered it; without, it is what a person would type.
    """
    template = text_or_none(row, "template", "text like alpaca@0123456789ab", where)
    adapter = text_or_none(row, "adapter", "the name of an adapter", where)
    if "messages" in row:
        asked = asked_messages(row["messages"], where)
        check_tools({**row, "messages": asked}, where)
        return Question(where, asked, template=template, adapter=adapter, tools=row.get("tools"))
    row = {"prompt": row["text"], **row} if "text" in row else row
    if "prompt" not in row:
        has = ", ".join(map(str, row)) or "no keys"
        hint = 'a row has "prompt", "messages" or "text"'
        raise UserError(f"{where}: no question in this row (it has {has})", ExitCode.DATA, hint=hint)
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        raise UserError(f"{where}: 'prompt' is {type_name(prompt)}, should be text", ExitCode.DATA)
    if not prompt.strip():
        raise UserError(f"{where}: 'prompt' is empty", ExitCode.DATA, hint="leave the row out")
    if template is None:
        return replace(typed(prompt, where), adapter=adapter)
    return Question(where, [], prompt, template, adapter)


def text_or_none(row: dict[str, Any], key: str, wanted: str, where: str) -> str | None:
    """The text under a key that a row may have."""
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: '{key}' is {type_name(value)}, should be {wanted}", ExitCode.DATA)
    return value


def asked_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """The turns up to the one that awaits an answer; whatever a conversation may not be is a data error."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    awaits = isinstance(last, dict) and last.get("role") in ("user", "tool")
    whole = [*messages, {"role": "assistant", "content": "?"}] if awaits else messages
    check_messages(whole, where)
    asked: list[dict[str, Any]] = whole[:-1]
    if not any(message["role"] == "user" for message in asked):
        raise UserError(f"{where}: the user asks nothing before the last answer", ExitCode.DATA)
    return asked
