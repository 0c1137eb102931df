"""Plain text as records: one document a file, a paragraph or a line."""

from collections.abc import Iterator
from typing import Literal

from ftkit.errors import ExitCode, UserError
from ftkit.io.tables import Fault, Record, damage
from ftkit.io.text_input import TextInput

Unit = Literal["file", "paragraph", "line"]


def read_documents(text: TextInput, unit: Unit) -> Iterator[Record | Fault]:
    """`{"text": ...}` for each document; what holds nothing but space is passed over."""
    pieces = whole_file(text) if unit == "file" else cut(text, by_line=unit == "line")
    found = False
    for line, lines in pieces:
        found = True
        problem = damage(lines, text, line)
        content = "".join(lines)
        if problem:
            yield Fault(line, problem, content.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))
        else:
            yield Record(line, {"text": content if unit == "file" else content.rstrip("\r\n")})
    if not found:
        raise UserError(f"{text.name}: 0 rows", ExitCode.DATA, hint="the text is blank")


def whole_file(text: TextInput) -> Iterator[tuple[int, list[str]]]:
    """All of the text as one piece."""
    lines = list(text.lines())
    if any(line.strip() for line in lines):
        yield 1, lines


def cut(text: TextInput, *, by_line: bool) -> Iterator[tuple[int, list[str]]]:
    """(first line's number, lines) of each paragraph or line; blank lines stand between paragraphs."""
    start, kept = 1, list[str]()
    for number, line in enumerate(text.lines(), 1):
        if line.strip():
            start = start if kept else number
            kept.append(line)
        if kept and (by_line or not line.strip()):
            yield start, kept
            kept = []
    if kept:
        yield start, kept
