"""Tables in text: records with the line they start on, the delimiter found by looking at the first rows."""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

from ftkit.errors import ExitCode, UserError
from ftkit.io.column_names import nameless, numbered, stand_ins
from ftkit.io.sources import inner_suffix
from ftkit.io.text_input import TextInput, lines_in, not_text, unreadable

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}
BY_SUFFIX = {".tsv": "\t", ".tab": "\t", ".psv": "|", ".ssv": ";", ".csv": ","}
SPELLINGS = {"\\t": "\t", "tab": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}
FORGOTTEN_LINES = 2_000
LOOKED_AT_ROWS = 100
FITS = 0.5
"""A delimiter is a candidate if at least this share of the first rows has as many values as the header."""


@dataclass(frozen=True)
class TableOptions:
    """How a table is written, where its file does not show it."""

    delimiter: str = ","
    max_field_chars: int = 10_000_000
    columns: tuple[str, ...] = ()
    """Names for the columns of a table without a line of them."""
    has_header: bool = True
    skip_lines: int = 0
    """Lines above the table that are no part of it."""
    has_quotes: bool = True
    """False: a quote is a character like any other."""


class Record(NamedTuple):
    """One record of an input: its first line (from 1) and its values by column name, all of them text in a table."""

    line: int
    values: dict[str, Any]


class Fault(NamedTuple):
    """A record that cannot be read: why, and its text as it stands in the file."""

    line: int
    error: UserError
    raw: str


class OpenQuote(UserError):
    """A piece of a table ends inside quotes: it was cut at a line end that is part of a value."""


class Lines:
    """Lines on their way to csv.reader, a block at a time; those of the record that is being read can be had again.

    `is_clean` says that no block so far holds anything that must not be in a text.
    """

    def __init__(self, blocks: Iterable[list[str]], skip: int, before: int = 0) -> None:
        self.blocks, self.skip = blocks, skip
        self.kept: list[str] = []
        self.dropped = before + skip
        """Lines of the file that lie before the kept ones."""
        self.is_clean = True

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self.checked_blocks())

    def checked_blocks(self) -> Iterator[list[str]]:
        """The blocks without the skipped lines."""
        to_skip = self.skip
        for block in self.blocks:
            block, to_skip = block[to_skip:], max(0, to_skip - len(block))
            self.kept += block
            whole = "".join(block)
            self.is_clean = self.is_clean and "\x00" not in whole and (whole.isascii() or is_encodable(whole))
            yield block

    def of(self, first: int, last: int) -> list[str]:
        """Lines by their numbers."""
        return self.kept[first - 1 - self.dropped : last - self.dropped]

    def after(self, last: int) -> list[str]:
        """The lines behind this number that have come already."""
        return self.kept[last - self.dropped :]

    def forget(self, before: int) -> None:
        """Drop lines before this number."""
        self.kept, self.dropped = self.kept[before - 1 - self.dropped :], before - 1


def is_encodable(text: str) -> bool:
    """False for text with lone surrogates: bytes that were no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Table:
    """A table that is being read; its rest can be had as bytes, to be read in pieces."""

    def __init__(self, text: TextInput, options: TableOptions) -> None:
        self.text, self.options = text, options
        self.header = list(options.columns)
        self.raw = text.raw_blocks() if text.is_utf8 else None
        """What has not been read of a file in UTF-8."""
        self.blocks = text.blocks() if self.raw is None else map(lines_in, self.raw)
        self.lines = Lines(self.blocks, options.skip_lines)
        self.errors = "surrogateescape" if text.is_utf8 else "surrogatepass"
        """How pieces hold what is no text: as it stands in the file, or by the surrogate that stands for it."""
        self.reader = csv_reader(iter(self.lines), options)

    @property
    def line(self) -> int:
        """The line behind the record that was read last."""
        return int(self.reader.line_num) + self.options.skip_lines + 1

    def records(self) -> Iterator[Record | Fault]:
        """The records below the header; a table without a header or without records is a data error.

        Line numbers are physical lines; a record with line ends inside quotes is named by the line it starts on.
        """
        start = self.line
        if not self.header:
            start = read_header(self.reader, self.lines, self.text, self.options, self.header)
        found = False
        if not self.options.has_header and not self.options.columns:  # the line that was counted is the first record
            found = True
            held = self.lines.of(start, self.line - 1)
            yield record_of(held, self.header, self.text, self.options, start)
            start = self.line
        for record in self.read(self.reader, self.lines, start, is_first=not found):
            found = True
            yield record
        if not found:
            raise UserError(
                f"{self.text.name}: {'header but no rows' if self.header else '0 rows'}",
                ExitCode.DATA,
                hint="a table is a line of column names and rows below it",
            )

    def read(
        self, reader: Any, lines: Lines, start: int, *, is_first: bool = False, is_piece: bool = False
    ) -> Iterator[Record | Fault]:
        """The records that a reader finds from line `start` on; a piece that ends inside quotes is an OpenQuote."""
        text, options, header = self.text, self.options, self.header
        width, forget_at, before = len(header), start + FORGOTTEN_LINES, start - 1 - reader.line_num
        new_record = partial(tuple.__new__, Record)  # what Record(...) does, in half the time
        while True:
            try:
                for cells in reader:
                    if len(cells) == width and lines.is_clean and (width > 1 or cells[0].strip()):
                        yield new_record((start, dict(zip(header, cells))))  # noqa: B905 (the hot place; as long)
                        is_first = False
                    elif cells and (len(cells) > 1 or cells[0].strip()):  # not a blank line
                        held = lines.of(start, reader.line_num + before)
                        yield checked(cells, held, header, text, options, start, lines if is_first else None)
                        is_first = False
                    start = reader.line_num + before + 1
                    if start > forget_at:
                        lines.forget(start)
                        forget_at = start + FORGOTTEN_LINES
                return
            except csv.Error as error:
                held = lines.of(start, reader.line_num + before)
                if is_piece and "unexpected end" in str(error):
                    raise OpenQuote(f"{text.name}:{start}: the piece ends inside quotes", ExitCode.DATA) from None
                fault = explain(error, held, f"{text.name}:{start}", start, options)
                if not fault.is_local:
                    raise fault.error from None
                yield Fault(start, fault.error, printable(held))
                start, is_first = reader.line_num + before + 1, False

    def read_piece(self, line: int, blocks: Iterable[bytes], *, is_piece: bool = True) -> Iterator[Record | Fault]:
        """The records in a piece of the file that begins with a record, on this line; or in all that follows."""
        lines = Lines((lines_in(block, self.errors) for block in blocks), 0, before=line - 1)
        return self.read(csv_reader(iter(lines), self.options), lines, line, is_piece=is_piece)

    def rest(self) -> Iterator[bytes]:
        """What comes behind the record that was read last, which begins on `line`: whole lines, in UTF-8."""
        come = "".join(self.lines.after(self.line - 1)).encode("utf-8", self.errors)
        raw = self.raw or ("".join(block).encode("utf-8", self.errors) for block in self.blocks)
        return chain([come] if come else [], raw)


def read_table(text: TextInput, options: TableOptions) -> Iterator[Record | Fault]:
    """The records of a table, from its start to its end."""
    return Table(text, options).records()


def csv_reader(lines: Iterator[str], options: TableOptions) -> Any:
    """csv.reader for a table: strict, so that what is wrong is told and not repaired."""
    csv.field_size_limit(options.max_field_chars)
    quoting = csv.QUOTE_MINIMAL if options.has_quotes else csv.QUOTE_NONE
    return csv.reader(lines, delimiter=options.delimiter, strict=True, quoting=quoting)  # type: ignore[arg-type]


def read_header(reader: Any, lines: Lines, text: TextInput, options: TableOptions, header: list[str]) -> int:
    """Put the names of the columns into `header`; the line after it, or the header's own where it is a record."""
    start = options.skip_lines + 1
    try:
        for cells in reader:
            end = reader.line_num + options.skip_lines
            if cells and (len(cells) > 1 or cells[0].strip()):
                if problem := damage(lines.of(start, end), text, start, is_row=False):
                    raise problem
                header += check_header(cells, f"{text.name}:{start}") if options.has_header else numbered(cells)
                return end + 1 if options.has_header else start
            start = end + 1
    except csv.Error as error:
        held = lines.of(start, reader.line_num + options.skip_lines)
        raise explain(error, held, f"{text.name}:{start}", start, options).error from None
    return start


def record_of(held: list[str], header: list[str], text: TextInput, options: TableOptions, start: int) -> Record | Fault:
    """The record that these lines hold."""
    return checked(next(csv_reader(iter(held), options)), held, header, text, options, start)


def checked(
    cells: list[str],
    held: list[str],
    header: list[str],
    text: TextInput,
    options: TableOptions,
    start: int,
    first_of: Lines | None = None,
) -> Record | Fault:
    """A record, if it is as long as the header and holds nothing but text; the first one of these lines, or a later one."""
    problem = damage(held, text, start) or ragged(cells, header, f"{text.name}:{start}", options, first_of)
    return Fault(start, problem, printable(held)) if problem else Record(start, dict(zip(header, cells, strict=True)))


def printable(lines: list[str]) -> str:
    """The lines of a record with bytes that are no text written as \\x.."""
    return "".join(lines).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def check_header(cells: list[str], where: str) -> list[str]:
    """Column names without the space around them; a nameless column is called by its number, names stand once."""
    names = [cell.strip() or nameless(number) for number, cell in enumerate(cells, 1)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(
            f"{where}: columns with the same name: {', '.join(twice)}",
            ExitCode.DATA,
            hint=f"rename one of them; if this line is no header: --columns {stand_ins(len(names))} names the columns",
        )
    return names


def ragged(
    cells: list[str], header: list[str], where: str, options: TableOptions, first_of: Lines | None
) -> UserError | None:
    """The error for a row with more or fewer values than the header; the first row casts doubt on the header."""
    if len(cells) == len(header):
        return None
    if options.columns:
        hint = "--columns should name every column; leave single such rows out: --on-error skip"
    elif len(header) == 1:
        above = lines_above(first_of, len(header)) if first_of else None
        hint = (
            "if it is plain text: --documents paragraph (or line, file); "
            f"if the header stands further down: --skip-lines {above or 'N'}; or --delimiter"
        )
    elif first_of and (above := lines_above(first_of, len(header))):
        hint = f"the table seems to begin on line {above + 1}: --skip-lines {above}"
    elif first_of:
        hint = "is the line above it really the header? --skip-lines N passes over lines in front of it; or --delimiter"
    else:
        hint = "quote values that hold the delimiter, or leave such rows out: --on-error skip"
    return UserError(
        f"{where}: {count(len(cells), 'value')}, {'--columns names' if options.columns else 'the header has'} "
        f"{count(len(header), 'column')}",
        ExitCode.DATA,
        hint=hint,
    )


def lines_above(lines: Lines, width: int) -> int | None:
    """How many lines of the file stand above what looks like a table of another width than this header's; None: none.

    It begins with the first row that is as wide as most and more than half filled; at least half of what follows fits.
    """
    first = [(number, line) for number, line in enumerate(lines.kept[:LOOKED_AT_ROWS], lines.dropped) if line.strip()]
    most, above = 1, None
    for delimiter in DELIMITERS:
        rows = [(number, cells_of(line, delimiter)) for number, line in first]
        widths = Counter(len(cells) for _, cells in rows if len(cells) > 1)
        for wide, times in widths.most_common(1):
            begin = next((at for at, cells in rows if len(cells) == wide and sum(map(bool, cells)) > wide / 2), None)
            if begin is not None and times > most and times >= FITS * sum(number >= begin for number, _ in rows):
                most, above = times, begin if wide != width else None
    return above


def cells_of(line: str, delimiter: str) -> list[str]:
    """The values in a line, as far as it can be read alone."""
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return []


def count(number: int, what: str) -> str:
    """`1 column`, `2 columns`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def damage(lines: list[str], text: TextInput, start: int, *, is_row: bool = True) -> UserError | None:
    """The error for a record (or a header: no row) with bytes that are no text."""
    for number, line in enumerate(lines, start):
        if "\x00" in line:
            return UserError(
                f"{text.name}:{number}: holds a NUL byte",
                ExitCode.DATA,
                hint="is this a text file? if it is UTF-16: --encoding utf-16-le",
            )
        offset = unreadable(line, text.encoding)
        if offset is not None:
            return not_text(f"{text.name}:{number}", text.encoding, offset, is_row=is_row)
    return None


@dataclass(frozen=True)
class Explained:
    """A csv.Error in words; local if the rows after it can still be read."""

    error: UserError
    is_local: bool


def explain(error: csv.Error, lines: list[str], where: str, start: int, options: TableOptions) -> Explained:
    """What is wrong with a record that csv.reader cannot read."""
    name, delimiter, max_field_chars = where.rpartition(":")[0], options.delimiter, options.max_field_chars
    opened = open_quote_line(lines, delimiter)
    if "field larger" in str(error):
        quoted = f"; a quote opens on line {start + opened} and has not closed yet" if opened is not None else ""
        hint = f"close the quote, or allow longer values: --max-field-bytes {max_field_chars * 10}"
        return Explained(
            UserError(f"{where}: a value longer than {max_field_chars:,} bytes{quoted}", ExitCode.DATA, hint=hint),
            is_local=False,
        )
    if "unexpected end" in str(error) and opened is not None:
        message = f"{name}:{start + opened}: a quote opens here and never closes"
        return Explained(
            UserError(
                message,
                ExitCode.DATA,
                hint='close it, or write a quote inside a quoted value twice (""); '
                "where quotes mean nothing: --quoting none",
            ),
            is_local=False,
        )
    message = str(error).replace(f"'{delimiter}' expected after '\"'", "text after a closing quote")
    hint = 'write a quote inside a quoted value twice (""); where quotes mean nothing: --quoting none'
    return Explained(UserError(f"{where}: {message}", ExitCode.DATA, hint=hint), is_local=True)


def open_quote_line(lines: list[str], delimiter: str) -> int | None:
    """Which of the lines (from 0) opens the quote that is still open at their end."""
    opened: int | None = None
    for number, line in enumerate(lines):
        at = 0
        while (at := line.find('"', at)) >= 0:
            if opened is None:
                starts_value = at == 0 or line[at - 1] == delimiter
                opened = number if starts_value else None
            elif line[at + 1 : at + 2] == '"':
                at += 1  # a quote written twice is part of the value
            else:
                opened = None
            at += 1
    return opened


def spelled_delimiter(given: str) -> str:
    """A delimiter as typed on a command line (`\\t`, `tab`, `;`) as the one character it is."""
    character = SPELLINGS.get(given, given)
    if len(character) != 1 or character in '"\r\n':
        raise UserError(
            f"--delimiter {given!r} is not one character",
            ExitCode.USAGE,
            hint="for example --delimiter ';' or --delimiter tab",
        )
    return character


def find_delimiter(text: TextInput, skip_lines: int = 0) -> str:
    """The character that cuts the first rows into equally many values; where two do, a data error asks.

    A file name's suffix decides between two (.tsv: tab); a table of one column is read with commas.
    """
    beginning = "".join(islice(io.StringIO(text.beginning(), newline=""), skip_lines, None))
    shares = {delimiter: consistency(beginning, delimiter) for delimiter in DELIMITERS}
    best = max(shares.values())
    if best < FITS:
        return max(shares, key=lambda delimiter: shares[delimiter])  # comma if none; the first uneven row will be named
    fitting = [delimiter for delimiter, share in shares.items() if share == best]
    if len(fitting) == 1:
        return fitting[0]
    by_suffix = BY_SUFFIX.get(inner_suffix(text.name))
    if by_suffix in fitting and by_suffix != ",":
        return by_suffix
    names = " and ".join(DELIMITERS[delimiter] for delimiter in fitting)
    raise UserError(
        f"{text.name}: {names} fit equally well as delimiter",
        ExitCode.DATA,
        hint=f"--delimiter {' or --delimiter '.join(DELIMITERS[d] for d in fitting)}",
    )


def consistency(beginning: str, delimiter: str) -> float:
    """Share of the first rows that have as many values as the header, at least two; 0 where the header has one."""
    widths = []
    rows = csv.reader(io.StringIO(beginning, newline=""), delimiter=delimiter)
    try:
        for cells in islice(rows, LOOKED_AT_ROWS):
            widths.append(len(cells))
    except csv.Error:
        pass  # found again, with its line, when the table is read
    widths = [width for width in widths if width]
    if not widths or widths[0] < 2:
        return 0.0
    return sum(width == widths[0] for width in widths) / len(widths)
