"""Open anything that prep reads, as records with line numbers: what format it is in is found from its content."""

import io
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Literal

import orjson

from ftkit.errors import ExitCode, UserError
from ftkit.io.compression import Rewound, unpack, what_has_come
from ftkit.io.documents import Unit, read_documents
from ftkit.io.hub_data import read_hub
from ftkit.io.json_array import array_elements
from ftkit.io.jsonl import STDIN, is_cut_off, open_source, parse_row, source_name
from ftkit.io.nested import MISSING, find_list, look_up
from ftkit.io.parquet import MAGIC, read_parquet
from ftkit.io.pieces import Pieces, pieces_of_lines, pieces_of_records, pieces_of_table
from ftkit.io.sources import HUB, inner_suffix
from ftkit.io.tables import DELIMITERS, Fault, Record, Table, TableOptions, find_delimiter, spelled_delimiter
from ftkit.io.text_input import HEAD_BYTES, TextInput, first_lines, open_text

Format = Literal["csv", "json", "jsonl", "parquet", "text", "hub"]
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".md")
LOOKS_LIKE_JSON = re.compile(r'\s*(\[\s*)?\{\s*["}]|\s*\[\s*\]\s*$')
TABBED = 0.95
"""A .txt file is a table if at least this share of its first lines holds equally many tabs."""


@dataclass(frozen=True)
class ReadOptions:
    """How to read the inputs, where they do not say it themselves."""

    format: Literal["auto", "csv", "json", "jsonl", "parquet", "text"] = "auto"
    encoding: str | None = None
    delimiter: str | None = None
    max_field_chars: int = 10_000_000
    columns: tuple[str, ...] = ()
    has_header: bool = True
    skip_lines: int = 0
    has_quotes: bool = True
    records: str | None = None
    """Dotted path of the list of records inside a JSON object."""
    documents: Unit | None = None
    """What a document of a plain text is."""

    @property
    def asks_for_table(self) -> bool:
        """True if an option only makes sense for a table."""
        return bool(self.delimiter or self.columns or self.skip_lines or not (self.has_header and self.has_quotes))


@dataclass(frozen=True)
class OpenInput:
    """An input that is being read."""

    name: str
    records: Iterator[Record | Fault]
    format: Format
    notes: tuple[str, ...] = field(default=())
    """What was found out about it that a person should know."""
    rest: Callable[[], Pieces] | None = None
    """What `records` has not given yet, in pieces that can be read apart; None where one process has to read it."""

    def pieces(self) -> Pieces:
        """What `records` has not given yet, in pieces."""
        return self.rest() if self.rest else pieces_of_records(self.records)


@contextmanager
def open_input(source: str, options: ReadOptions) -> Iterator[OpenInput]:
    """The records of a file, of stdin (`-`) or of a hub data set, read as they are asked for.

    A JSON array is held in memory, and so is Parquet that cannot be read from its end.
    """
    if source.startswith(HUB):
        records, notes = read_hub(source)
        yield OpenInput(source, records, "hub", notes)
        return
    with open_source(source) as given:
        packed = io.BufferedReader(Asked(), HEAD_BYTES) if source == STDIN and not given.seekable() else given
        name = source_name(source)
        stream = unpack(packed, name)
        head = stream.read(len(MAGIC))
        if options.format == "parquet" or (options.format == "auto" and head == MAGIC):
            rewound = packed if is_file(packed, head) else io.BufferedReader(Rewound(head, stream))
            yield OpenInput(name, read_parquet(rewound, name), "parquet")
            return
        yield open_readable(io.BufferedReader(Rewound(head, stream)), name, options)


def is_file(packed: IO[bytes], head: bytes) -> bool:
    """True if a stream can be read again from its start, where it holds what was read of it (it is not packed)."""
    if not packed.seekable():
        return False
    at = packed.tell()
    packed.seek(0)
    if packed.read(len(head)) == head:
        packed.seek(0)
        return True
    packed.seek(at)
    return False


class Asked(io.RawIOBase):
    """stdin; before it is waited for, what was made of it so far goes out. A slow program in front of us may be long."""

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """What has come."""
        if sys.stdout is not None:
            sys.stdout.flush()
        return what_has_come(sys.stdin.buffer, buffer)


def open_readable(stream: IO[bytes], name: str, options: ReadOptions) -> OpenInput:
    """A table, JSON or plain text."""
    head = first_lines(stream)
    if not speaks_for_itself(head, name, options):
        head += stream.read(HEAD_BYTES - len(head))
    text = open_text(stream, name, options.encoding, head)
    beginning = text.beginning()
    if not beginning.strip() and len(text.head) < HEAD_BYTES:
        raise UserError(f"{text.name}: 0 rows", ExitCode.DATA, hint="the input is empty")
    kind, notes = find_format(text.name, beginning, options)
    rest: Callable[[], Pieces] | None = None
    if kind == "csv":
        given = options.delimiter
        delimiter = spelled_delimiter(given) if given else find_delimiter(text, options.skip_lines)
        if delimiter != "," and not given:
            notes += (f"{text.name}: columns are separated by {delimiter!r} ({DELIMITERS[delimiter]})",)
        table = Table(text, table_options(options, delimiter))
        records, rest = table.records(), partial(pieces_of_table, table)
    elif kind == "text":
        records = read_documents(text, options.documents or "file")
    elif kind == "json":
        records = read_array(text, options.records)
    elif options.records is not None:
        records = unfold(JsonLines(text).records(), options.records, text.name)
    else:
        refuse_spread_object(text.name, beginning)
        lines = JsonLines(text)
        records, rest = lines.records(), lines.pieces if text.is_utf8 else None
    return OpenInput(text.name, records, kind, text.notes + notes, rest)


def speaks_for_itself(head: bytes, name: str, options: ReadOptions) -> bool:
    """True if the first line shows what the input is, so that no more of it is waited for.

    It is an object of JSON lines; or column names with only one delimiter among them. Nothing behind the first line would
    change what the input is read as.
    """
    asks_more = options.encoding or options.records or options.documents or options.skip_lines
    if asks_more or not head.endswith(b"\n") or b"\0" in head:
        return False
    if options.format in ("auto", "jsonl") and head.lstrip().startswith(b"{"):
        return is_object(head)
    found = [delimiter for delimiter in DELIMITERS if delimiter.encode() in head]
    is_table = options.format == "csv" or inner_suffix(name) not in (*TEXT_SUFFIXES, *JSON_SUFFIXES)
    return is_table and len(found) == 1 and not any(mark in head for mark in (b'"', b"{", b"["))


def is_object(line: bytes) -> bool:
    """True for one whole JSON object."""
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


def table_options(options: ReadOptions, delimiter: str) -> TableOptions:
    """What the reader of tables has to know."""
    return TableOptions(
        delimiter,
        options.max_field_chars,
        options.columns,
        options.has_header and not options.columns,
        options.skip_lines,
        options.has_quotes,
    )


def find_format(name: str, beginning: str, options: ReadOptions) -> tuple[Format, tuple[str, ...]]:
    """Table, JSON array (or object to look into), JSON lines or plain text; and what to say where it is not obvious."""
    if options.format in ("csv", "json", "jsonl", "text"):
        return options.format, ()
    if options.documents:
        return "text", ()
    suffix = inner_suffix(name)
    kind: Format = "json" if beginning.lstrip().startswith("[") or holds_object(beginning, options) else "jsonl"
    if suffix in JSON_SUFFIXES:
        differs = suffix != ".json" and kind == "json"
        return kind, (f"{name}: holds a JSON array",) if differs else ()
    if LOOKS_LIKE_JSON.match(beginning):
        called = "a JSON array" if kind == "json" else "JSON lines"
        return kind, (f"{name}: holds {called}",) if name != "<stdin>" else ()
    if suffix in TEXT_SUFFIXES and not options.asks_for_table and not is_tabbed(beginning):
        unit = "one document (--documents paragraph or line cuts it; a table: --format csv)"
        return "text", (f"{name}: plain text, {unit}",)
    return "csv", ()


def holds_object(beginning: str, options: ReadOptions) -> bool:
    """True if --records should look into one JSON object, and not into one on each line."""
    if options.records is None:
        return False
    first, _, rest = beginning.lstrip().partition("\n")
    return first.startswith("{") and (is_cut_off(first) or not rest.strip())


def is_tabbed(beginning: str) -> bool:
    """True if most lines hold equally many tabs, at least one: a table under the name of a text."""
    lines = [line for line in beginning.split("\n") if line.strip()]
    tabs = lines[0].count("\t") if lines else 0
    return tabs > 0 and sum(line.count("\t") == tabs for line in lines) >= TABBED * len(lines)


def read_array(text: TextInput, path: str | None) -> Iterator[Record | Fault]:
    """The objects of a JSON array, or of the list at a path of a JSON object; without any it is a data error."""
    whole, found = text.whole(), 0
    start = find_list(whole, path, text.name) if path and not whole.lstrip().startswith("[") else None
    records = (
        record_of(element.encode(), line, text.name) for line, element in array_elements(whole, text.name, start)
    )
    for record in records if path is None or start is not None else unfold(records, path, text.name):
        found += 1
        yield record
    if not found:
        raise UserError(f"{text.name}: 0 rows", ExitCode.DATA, hint="the array is empty")


def unfold(records: Iterator[Record | Fault], path: str, name: str) -> Iterator[Record | Fault]:
    """The records in the lists that lie at a path of other records."""
    for outer in records:
        if isinstance(outer, Fault):
            yield outer
            continue
        inner = look_up(outer.values, path)
        if isinstance(inner, list) and all(isinstance(values, dict) for values in inner):
            yield from (Record(outer.line, values) for values in inner)
            continue
        problem = f"no '{path}' (it has {', '.join(outer.values)})" if inner is MISSING else f"'{path}' is no list"
        error = UserError(
            f"{name}:{outer.line}: {problem} of records", ExitCode.DATA, hint="--records names the key that holds them"
        )
        yield Fault(outer.line, error, orjson.dumps(outer.values).decode())


class JsonLines:
    """The objects of JSON lines; blank lines are passed over."""

    def __init__(self, text: TextInput) -> None:
        self.text, self.line = text, 0

    def records(self) -> Iterator[Record | Fault]:
        """One after the other; no lines at all is a data error."""
        found = False
        for number, line in enumerate(self.text.utf8_lines(), 1):
            self.line = number
            if line.strip():
                found = True
                yield record_of(line, number, self.text.name)
        if not found:
            raise UserError(f"{self.text.name}: 0 rows", ExitCode.DATA, hint="the input holds blank lines only")

    def pieces(self) -> Pieces:
        """Those behind the records that were read."""
        return pieces_of_lines(self.text.raw_blocks(is_start=self.line == 0), self.line + 1, self.parse)

    def parse(self, line: int, content: bytes) -> Iterator[Record | Fault]:
        """The objects in whole lines, the first of them with this number."""
        for number, each in enumerate(io.BytesIO(content), line):
            if each.strip():
                yield record_of(each, number, self.text.name)


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
        key = re.search(r'"([^"]+)"\s*:\s*\[', beginning)
        raise UserError(
            f"{name}:1: one JSON object over several lines, not a list of records",
            ExitCode.DATA,
            hint=f"to take the list under a key: --records {key[1] if key else 'KEY'}; "
            "prep also reads [{...}, {...}] and one object per line",
        )
