"""Rows of JSONL in and out; errors carry file and line."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import jsonlines
import orjson

from ftkit.errors import ExitCode, UserError
from ftkit.io.atomic import atomic_file, refuse_existing

STDIN = "-"


def source_name(source: str) -> str:
    """How a source is called in messages."""
    return "<stdin>" if source == STDIN else source


def read_rows(source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, row) of a JSONL file or of stdin (`-`); blank lines are passed over.

    Anything that is not one JSON object on a line is a data error at file:line.
    """
    with open_source(source) as lines:
        yield from parse_lines(lines, source_name(source))


@contextmanager
def open_source(source: str) -> Iterator[IO[bytes]]:
    """The bytes of a file or of stdin; what cannot be opened is a data error that names the nearest file."""
    if source == STDIN:
        yield sys.stdin.buffer
        return
    path = Path(source)
    if path.is_dir():
        raise UserError(f"{source} is a directory", ExitCode.DATA, hint="give a file in it")
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{source}: no such file", ExitCode.DATA, hint=nearest_file(path)) from None
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}", ExitCode.DATA) from None
    with file:
        yield file


def nearest_file(path: Path) -> str | None:
    """A hint that names the file of the same folder with the most similar name."""
    from difflib import get_close_matches

    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = get_close_matches(path.name, names, n=1)
    return f"did you mean '{folder / near[0]}'?" if near else None


def parse_lines(lines: IO[bytes], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of the lines of a JSONL stream."""
    number = 0
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            yield number, parse_row(line, f"{name}:{number}")


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """One JSON object; otherwise a data error at `where` that says what is wrong with it."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise explain(line, where, error) from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object", ExitCode.DATA, hint='each line should be one object: {"prompt": "...", "completion": "..."}')
    if line.count(b'":') > len(row):
        check_keys(line, where)
    return row


def check_keys(line: bytes, where: str) -> None:
    """A key that stands twice in an object is an error: JSON readers disagree on which value counts."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise UserError(f"{where}: key '{key}' stands twice in one object", ExitCode.DATA)
            seen[key] = value
        return seen

    json.loads(line, object_pairs_hook=refuse_duplicates)


def explain(line: bytes, where: str, error: orjson.JSONDecodeError) -> UserError:
    """What is wrong with a line that is not JSON, in words, with its column."""
    if b"\x00" in line:
        return UserError(f"{where}: holds a NUL byte", ExitCode.DATA, hint="is this a text file? ftkit prep reads UTF-16 with --encoding")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as bad:
        return UserError(f"{where}: not UTF-8 at byte {bad.start}", ExitCode.DATA, hint="ftkit prep FILE --encoding latin-1 (or what it is)")
    if not line.endswith(b"\n") and is_cut_off(text):
        return UserError(f"{where}: ends inside a JSON value (file cut off?)", ExitCode.DATA)
    if text.lstrip().startswith("[") and not text.rstrip().endswith("]"):
        return UserError(f"{where}: a JSON array, not JSONL", ExitCode.DATA, hint="ftkit prep reads it: ftkit prep FILE > rows.jsonl")
    reason = error.msg.partition(":")[0] if hasattr(error, "msg") else str(error)
    return UserError(f"{where}:{getattr(error, 'colno', 1)}: not JSON: {reason}", ExitCode.DATA)


def is_cut_off(text: str) -> bool:
    """True if a JSON text is right as far as it goes, and only its end is missing."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
    return False


@contextmanager
def rows_output(path: str | None, *, force: bool = False) -> Iterator[Callable[[dict[str, Any]], Any]]:
    """A function that writes one row as one line: to a file that appears whole at the end, or to stdout as it goes."""
    if path is None:
        with jsonlines.Writer(sys.stdout.buffer, dumps=orjson.dumps) as writer:
            yield writer.write
            sys.stdout.buffer.flush()
        return
    refuse_existing(Path(path), replace=force)
    with atomic_file(Path(path), "wb") as file, jsonlines.Writer(file, dumps=orjson.dumps) as writer:
        yield writer.write
