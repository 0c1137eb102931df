"""Open anything that prep reads, as records with line numbers: what format it is in is found from its content."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal

from ftkit.errors import ExitCode, UserError
from ftkit.io.json_array import array_elements
from ftkit.io.jsonl import is_cut_off, open_source, parse_row, source_name
from ftkit.io.tables import DELIMITERS, Fault, Record, find_delimiter, read_table, spelled_delimiter
from ftkit.io.text_input import HEAD_BYTES, TextInput, open_text

Format = Literal["csv", "json", "jsonl"]
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
LOOKS_LIKE_JSON = re.compile(r'\s*(\[\s*)?\{\s*["}]|\s*\[\s*\]\s*$')


@dataclass(frozen=True)
class ReadOptions:
    """How to read the inputs, where they do not say it themselves."""

    format: Literal["auto", "csv", "json", "jsonl"] = "auto"
    encoding: str | None = None
    delimiter: str | None = None
    max_field_chars: int = 10_000_000


@dataclass(frozen=True)
class OpenInput:
    """An input that is being read."""

    name: str
    records: Iterator[Record | Fault]
    format: Format
    notes: tuple[str, ...] = field(default=())
    """What was found out about it that a person should know."""


@contextmanager
def open_input(source: str, options: ReadOptions) -> Iterator[OpenInput]:
    """The records of a file or of stdin (`-`), read as they are asked for (a JSON array is held in memory)."""
    with open_source(source) as stream:
        text = open_text(stream, source_name(source), options.encoding)
        beginning = text.beginning()
        if not beginning.strip() and len(text.head) < HEAD_BYTES:
            raise UserError(f"{text.name}: 0 rows", ExitCode.DATA, hint="the input is empty")
        kind, notes = find_format(text.name, beginning, options.format)
        if kind == "csv":
            delimiter = spelled_delimiter(options.delimiter) if options.delimiter else find_delimiter(text)
            if delimiter != "," and not options.delimiter:
                notes += (f"{text.name}: columns are separated by {delimiter!r} ({DELIMITERS[delimiter]})",)
            records = read_table(text, delimiter, options.max_field_chars)
        elif kind == "json":
            records = read_array(text)
        else:
            refuse_spread_object(text.name, beginning)
            records = read_lines(text)
        yield OpenInput(text.name, records, kind, text.notes + notes)


def find_format(name: str, beginning: str, asked: str) -> tuple[Format, tuple[str, ...]]:
    """Table, JSON array or JSON lines; and what to say where name and content differ."""
    if asked in ("csv", "json", "jsonl"):
        return asked, ()  # type: ignore[return-value]
    suffix = PurePath(name).suffix.lower()
    kind: Format = "json" if beginning.lstrip().startswith("[") else "jsonl"
    if suffix in JSON_SUFFIXES:
        differs = suffix != ".json" and kind == "json"
        return kind, (f"{name}: holds a JSON array",) if differs else ()
    if LOOKS_LIKE_JSON.match(beginning):
        called = "a JSON array" if kind == "json" else "JSON lines"
        return kind, (f"{name}: holds {called}",) if name != "<stdin>" else ()
    return "csv", ()


def read_array(text: TextInput) -> Iterator[Record | Fault]:
    """The objects of a JSON array; an array without any is a data error."""
    found = 0
    for line, element in array_elements(text.whole(), text.name):
        found += 1
        yield record_of(element.encode(), line, text.name)
    if not found:
        raise UserError(f"{text.name}: 0 rows", ExitCode.DATA, hint="the array is empty")


def read_lines(text: TextInput) -> Iterator[Record | Fault]:
    """The objects of JSON lines; blank lines are passed over, no lines at all is a data error."""
    found = 0
    for number, line in enumerate(text.utf8_lines(), 1):
        if line.strip():
            found += 1
            yield record_of(line, number, text.name)
    if not found:
        raise UserError(f"{text.name}: 0 rows", ExitCode.DATA, hint="the input holds blank lines only")


def record_of(element: bytes, line: int, name: str) -> Record | Fault:
    """A JSON object as a record; anything else as a fault."""
    try:
        return Record(line, parse_row(element, f"{name}:{line}"))
    except UserError as bad:
        hint = bad.hint or "mend it, or leave such rows out: --on-error skip"
        error = UserError(bad.message, bad.exit_code, hint=hint)
        return Fault(line, error, element.decode("utf-8", "replace"))


def refuse_spread_object(name: str, beginning: str) -> None:
    """A data error for one JSON object written over many lines: it is neither a list of records nor JSON lines."""
    first, newline, rest = beginning.lstrip().partition("\n")
    if newline and first.startswith("{") and is_cut_off(first) and not rest.lstrip().startswith("{"):
        raise UserError(
            f"{name}:1: one JSON object over several lines, not a list of records",
            ExitCode.DATA,
            hint="prep reads [{...}, {...}] or one object per line; "
            f"to take the list under a key: jq -c '.KEY[]' {name} | ftkit prep -",
        )
