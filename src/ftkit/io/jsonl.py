"""Rows of JSONL in and out; errors carry file and line."""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import orjson

from ftkit.errors import ExitCode, UserError
from ftkit.io.atomic import atomic_file, refuse_existing

STDIN = "-"
DEEPEST_NESTING = 200
LARGEST_INTEGER = 2**64
KEY = re.compile(rb'"\s*:')


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
        if sys.stdin is None:
            raise UserError("stdin is closed", ExitCode.USAGE, hint="give a file")
        yield sys.stdin.buffer
        return
    path = Path(source)
    if path.is_dir():
        raise UserError(f"{source} is a directory", ExitCode.DATA, hint="give a file in it")
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{source}: no such file", ExitCode.DATA, hint=nearest_file(path)) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: {getattr(error, 'strerror', error)}", ExitCode.DATA) from None
    with file:
        yield file


def nearest_file(path: Path) -> str | None:
    """A hint that names the file of the same folder with the most similar name."""
    from difflib import get_close_matches

    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = get_close_matches(path.name, names, n=1)
    return f"did you mean '{folder / near[0]}'?" if near else None


def parse_lines(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of the lines of a JSONL stream."""
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
        raise UserError(
            f"{where}: not a JSON object",
            ExitCode.DATA,
            hint='each line should be one object: {"prompt": "...", "completion": "..."}',
        )
    check_what_parsers_pass_over(row, line, where)
    return row


def check_what_parsers_pass_over(row: dict[str, Any], line: bytes, where: str) -> None:
    """Data errors for what a fast parser accepts and changes: repeated keys, integers that become floats, deep nesting.

    The first look is cheap and may suspect too much (a quoted `":` counts as a key); the second is exact.
    """
    if line.count(b"[") + line.count(b"{") > DEEPEST_NESTING and depth_of(row) > DEEPEST_NESTING:
        raise UserError(f"{where}: nested more than {DEEPEST_NESTING} levels deep", ExitCode.DATA)
    keys, has_large_number = survey(row)
    if has_large_number or len(KEY.findall(line)) != keys:
        parse_exactly(line, where)


def survey(value: Any) -> tuple[int, bool]:
    """How many keys a JSON value has at all levels, and whether it has a number too large for an integer."""
    keys, has_large_number, waiting = 0, False, [value]
    while waiting:
        value = waiting.pop()
        kind = type(value)
        if kind is dict:
            keys += len(value)
            waiting.extend(v for v in value.values() if type(v) is not str)
        elif kind is list:
            waiting.extend(v for v in value if type(v) is not str)
        elif kind is float and abs(value) >= LARGEST_INTEGER / 2:
            has_large_number = True
    return keys, has_large_number


def depth_of(value: Any) -> int:
    """Levels of lists and objects in a JSON value."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return depth


def parse_exactly(line: bytes, where: str) -> None:
    """A repeated key or an integer beyond 64 bits is a data error: JSON readers disagree on what it means."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise UserError(
                    f"{where}: key '{key}' stands twice in one object", ExitCode.DATA, hint="keep one of them"
                )
            seen[key] = value
        return seen

    def refuse_large(digits: str) -> int:
        if len(digits) > 20 or not -LARGEST_INTEGER // 2 <= int(digits) < LARGEST_INTEGER:
            raise UserError(
                f"{where}: {digits[:30]} does not fit in 64 bits", ExitCode.DATA, hint="write it as text, in quotes"
            )
        return int(digits)

    json.loads(line, object_pairs_hook=refuse_duplicates, parse_int=refuse_large)


def explain(line: bytes, where: str, error: orjson.JSONDecodeError) -> UserError:
    """What is wrong with a line that is not JSON, in words, with its column."""
    if b"\x00" in line:
        return UserError(
            f"{where}: holds a NUL byte",
            ExitCode.DATA,
            hint="is this a text file? ftkit prep reads UTF-16 with --encoding",
        )
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as bad:
        hint = "ftkit prep FILE --encoding latin-1 (or what it is), or --on-error skip"
        return UserError(f"{where}: not UTF-8 at byte {bad.start + 1} of the line", ExitCode.DATA, hint=hint)
    if not line.endswith(b"\n") and is_cut_off(text):
        return UserError(
            f"{where}: ends inside a JSON value (file cut off?)",
            ExitCode.DATA,
            hint="get the file again, or remove its last line",
        )
    if text.lstrip().startswith("[") and not text.rstrip().endswith("]"):
        return UserError(
            f"{where}: a JSON array, not JSONL", ExitCode.DATA, hint="ftkit prep reads it: ftkit prep FILE > rows.jsonl"
        )
    place = (
        f"{where}:{error.colno}"
        if error.lineno == 1
        else f"{where}: line {error.lineno} of the record, column {error.colno}"
    )
    return UserError(f"{place}: not JSON: {reason_of(error, text)}", ExitCode.DATA)


def reason_of(error: orjson.JSONDecodeError, text: str) -> str:
    """What the parser did not like, without its own counting of the place."""
    if text[error.pos :].startswith(("NaN", "Infinity", "nan", "inf")):
        return "NaN and Infinity are no JSON values (null is)"
    return error.msg.partition(": line ")[0]


def is_cut_off(text: str) -> bool:
    """True if a JSON text is right as far as it goes, and only its end is missing."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
    except RecursionError:
        return False
    return False


@contextmanager
def rows_output(path: str | None, *, force: bool = False) -> Iterator[Callable[[dict[str, Any]], Any]]:
    """A function that writes one row as one line, where `lines_output` writes lines."""
    with lines_output(path, force=force) as write:
        yield lambda row: write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))


@contextmanager
def lines_output(path: str | None, *, force: bool = False) -> Iterator[Callable[[bytes | memoryview], Any]]:
    """A function that writes a line, or some: to a file that appears whole at the end, or to stdout as it goes."""
    if path is None:
        if sys.stdout is None:
            raise UserError("stdout is closed", ExitCode.IO, hint="give the rows a file: -o FILE")
        yield sys.stdout.buffer.write
        sys.stdout.buffer.flush()
        return
    refuse_existing(Path(path), replace=force)
    with atomic_file(Path(path), "wb") as file:
        yield file.write
