"""From bytes to text: what an input is encoded in is found where a file says so, and never guessed in silence."""

import codecs
import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO

from ftkit.errors import ExitCode, UserError
from ftkit.io.compression import Rewound

BLOCK_LINES = 500
BLOCK_BYTES = 65_536
"""How much is read at once, where there is so much."""
HEAD_BYTES = 65_536
"""How much of an input is looked at before it is read."""
BYTE_ORDER_MARKS = (  # UTF-32's begins like UTF-16's, so it stands first
    (codecs.BOM_UTF32_LE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF16_LE, "utf-16", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16", "UTF-16"),
    (codecs.BOM_UTF8, "utf-8-sig", "UTF-8"),
)
FOREIGN_TYPES = (  # first bytes -> what it is, what to type
    (b"BZh", "bzip2", "bunzip2 -c FILE | ftkit prep -"),
    (b"\xfd7zXZ\x00", "xz", "xz -dc FILE | ftkit prep -"),
    (b"PAR1", "Parquet", "leave out --format, or give --format parquet"),
    (b"ARROW1", "Arrow", "save it as CSV or JSONL"),
    (b"PK\x03\x04", "zip (or .xlsx, .docx)", "unpack it, or save the sheet as CSV"),
    (b"\xd0\xcf\x11\xe0", "old Microsoft Office (.xls)", "save the sheet as CSV"),
    (b"%PDF", "PDF", "export its text as CSV or JSONL"),
    (b"SQLite format 3\x00", "SQLite", 'sqlite3 -csv -header FILE "select * from TABLE" | ftkit prep -'),
    (b"\x89PNG", "PNG image", "give a table of text"),
    (b"\xff\xd8\xff", "JPEG image", "give a table of text"),
)


@dataclass(frozen=True)
class TextInput:
    """An opened input whose encoding is known; it can be read once."""

    name: str
    head: bytes
    """Its first bytes, HEAD_BYTES or all there are."""
    encoding: str
    stream: IO[bytes]
    """All of its bytes, the head included."""
    notes: tuple[str, ...]
    """What was found that a person should know."""

    @property
    def is_utf8(self) -> bool:
        """True where bytes need no conversion before a JSON parser."""
        return self.encoding in ("utf-8", "utf-8-sig")

    def beginning(self) -> str:
        """The text of the head; where the head ends inside a line, without that line."""
        text = codecs.getincrementaldecoder(self.encoding)("replace").decode(self.head).removeprefix("\ufeff")
        if len(self.head) < HEAD_BYTES:
            return text
        end = max(text.rfind("\n"), text.rfind("\r")) + 1
        return text[:end] or text

    def lines(self) -> Iterator[str]:
        """Lines with their ends as written; \\n, \\r and \\r\\n end a line, nothing else does.

        A byte that UTF-8 does not know becomes a lone surrogate: `unreadable` finds it.
        """
        number = 0
        text = io.TextIOWrapper(self.stream, self.encoding, errors="surrogateescape", newline="")
        try:
            for number, line in enumerate(text, 1):
                yield line.removeprefix("\ufeff") if number == 1 else line
        except UnicodeError as error:
            reason = getattr(error, "reason", error)
            raise UserError(
                f"{self.name}:{number + 1}: not {self.encoding}: {reason}",
                ExitCode.DATA,
                hint="give another --encoding",
            ) from None

    def blocks(self) -> Iterator[list[str]]:
        """The lines of `lines`, many at a time; of a pipe those that have come."""
        if self.is_utf8:
            yield from map(lines_in, self.raw_blocks())
            return
        lines = self.lines()  # one by one: a byte that the encoding does not know should be named by its very line
        while block := list(islice(lines, BLOCK_LINES)):
            yield block

    def raw_blocks(self, *, is_start: bool = True) -> Iterator[bytes]:
        """Whole lines of UTF-8, about 64 KB at a time; of a pipe those that have come. `is_start`: nothing was read."""
        read = self.stream.read1  # type: ignore[attr-defined]
        rest = [self.stream.read(3).removeprefix(codecs.BOM_UTF8)] if is_start else []
        while data := read(BLOCK_BYTES):
            end = data.rfind(b"\n") + 1 or data.rfind(b"\r", 0, -1) + 1  # a \r at the very end may be half of \r\n
            if end:
                yield b"".join((*rest, data[:end]))
                rest.clear()
            rest.append(data[end:])
        if last := b"".join(rest):
            yield last

    def utf8_lines(self) -> Iterator[bytes]:
        """Lines as UTF-8 bytes; only \\n ends a line, so that file:line is what an editor shows."""
        if not self.is_utf8:
            yield from (line.encode("utf-8", "surrogateescape") for line in self.lines())
            return
        for number, line in enumerate(self.stream):
            yield line.removeprefix(codecs.BOM_UTF8) if number == 0 else line

    def whole(self) -> str:
        """All of the text; a byte that does not belong is a data error at its line."""
        data = self.stream.read()
        try:
            return data.decode(self.encoding).removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            column = error.start - (data.rfind(b"\n", 0, error.start) + 1)
            raise not_text(f"{self.name}:{line}", self.encoding, column, is_row=False) from None


def line_ends(block: bytes) -> int:
    """How many lines end in UTF-8 bytes: at \\n, \\r or \\r\\n."""
    returns = block.count(b"\r") if b"\r" in block else 0
    return block.count(b"\n") + (returns and returns - block.count(b"\r\n"))


def blocks_of(content: bytes) -> Iterator[bytes]:
    """Whole lines of UTF-8 as blocks that processor caches hold, where there are such."""
    at = 0
    while at < len(content):
        end = content.rfind(b"\n", at, at + BLOCK_BYTES) + 1 or len(content)
        yield content[at:end]
        at = end


def lines_in(block: bytes, errors: str = "surrogateescape") -> list[str]:
    """The lines in UTF-8 bytes with their ends as written; a byte that is none becomes a lone surrogate."""
    return list(io.StringIO(block.decode("utf-8", errors), newline=""))


def open_text(stream: IO[bytes], name: str, encoding: str | None, head: bytes | None = None) -> TextInput:
    """Look at the first bytes of a stream and decide how to read it; what is not text is a data error.

    `head` is what was read of the stream before; without it, HEAD_BYTES are.
    """
    head = stream.read(HEAD_BYTES) if head is None else head
    if encoding is None:
        refuse_foreign(head, name)
    found, notes = (encoding, ()) if encoding else find_encoding(head, name)
    whole = io.BufferedReader(Rewound(head, stream), buffer_size=HEAD_BYTES)
    return TextInput(name, head, found, whole, notes)


def first_lines(stream: IO[bytes]) -> bytes:
    """The beginning of a stream up to its first line that is not blank, without waiting for more; at most HEAD_BYTES."""
    head = b""
    while len(head) < HEAD_BYTES and not (head.strip() and head.endswith(b"\n")):
        line = stream.readline(HEAD_BYTES - len(head))
        if not line:
            break
        head += line
    return head


def refuse_foreign(head: bytes, name: str) -> None:
    """A data error for files whose first bytes say that they are no text."""
    for magic, kind, advice in FOREIGN_TYPES:
        if head.startswith(magic):
            hint = advice.replace("FILE", name) if name != "<stdin>" else "give CSV, TSV, JSON or JSONL"
            raise UserError(f"{name}: a {kind} file, not a table or JSON in plain text", ExitCode.DATA, hint=hint)


def find_encoding(head: bytes, name: str) -> tuple[str, tuple[str, ...]]:
    """The encoding that the byte order mark names, otherwise UTF-8; and what to say about it."""
    for mark, codec, called in BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return codec, (f"{name}: {called}, found by its byte order mark, which is not part of the text",)
    if side := utf16_side(head):
        raise UserError(
            f"{name}: looks like UTF-16 without a byte order mark", ExitCode.DATA, hint=f"--encoding {side}"
        )
    return "utf-8", ()


def utf16_side(head: bytes) -> str | None:
    """`utf-16-le` or `utf-16-be` where most bytes of one side are zero, as in Western text; else None."""
    pairs = len(head) // 2
    if pairs < 4:
        return None
    if head[1::2].count(0) > 0.4 * pairs and head[0::2].count(0) < 0.1 * pairs:
        return "utf-16-le"
    if head[0::2].count(0) > 0.4 * pairs and head[1::2].count(0) < 0.1 * pairs:
        return "utf-16-be"
    return None


def check_encoding(encoding: str) -> None:
    """A usage error for a name that is no text encoding."""
    try:
        b"a".decode(encoding)
    except UnicodeError:
        return  # an encoding that needs more bytes for a letter
    except LookupError:
        raise UserError(
            f"--encoding {encoding}: unknown",
            ExitCode.USAGE,
            hint="for example utf-8, utf-16, latin-1, cp1252, big5, gb18030, shift_jis",
        ) from None


def unreadable(line: str, encoding: str) -> int | None:
    """Byte offset in the line of the first byte that is not in the encoding; None if all is well."""
    if line.isascii():
        return None
    try:
        line.encode()
    except UnicodeEncodeError as error:
        return len(line[: error.start].encode(encoding, "replace"))
    return None


def not_text(where: str, encoding: str, offset: int, *, is_row: bool = True) -> UserError:
    """The error for a byte that does not belong to the encoding; `offset` counts from 0. `is_row`: a row can be left out."""
    called = "UTF-8" if encoding in ("utf-8", "utf-8-sig") else encoding
    skip = "; single bad rows: --on-error skip" if is_row else ""
    hint = f"say what the file is: --encoding latin-1 (or cp1252, big5, ...){skip}"
    return UserError(f"{where}: not {called} at byte {offset + 1} of the line", ExitCode.DATA, hint=hint)
