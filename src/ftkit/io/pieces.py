"""An input in pieces of whole records, so that several processes can read it, each a piece at a time."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple, TypeVar

from ftkit.errors import UserError
from ftkit.io.tables import Fault, Record, Table
from ftkit.io.text_input import blocks_of, line_ends

T = TypeVar("T")
PIECE_BYTES = 262_144
PIECE_RECORDS = 500
LONGEST_PIECE_BYTES = 16 * 2**20
"""A table of which more than this seems to stand inside quotes is not cut any further."""


class Piece(NamedTuple):
    """Lines of a file, the first of them numbered `line`; or records."""

    line: int
    content: Any
    is_whole: bool = True
    """False where the next record could not be found: `read_on` goes on from here."""


@dataclass(frozen=True)
class Pieces:
    """The rest of an input."""

    cut: Iterator[Piece]
    read: Callable[[Piece], Iterable[Record | Fault]]
    """The records of a piece, in any process; OpenQuote if it was cut inside a record."""
    read_on: Callable[[Iterable[Piece]], Iterator[Record | Fault]]
    """The records of all these pieces and what is behind them, read in one go."""


class Held(Iterator[T]):
    """An iterator that ends at an error, which `check` raises: what came before it is passed on first."""

    def __init__(self, items: Iterator[T]) -> None:
        self.items = items
        self.error: UserError | None = None

    def __next__(self) -> T:
        try:
            return next(self.items)
        except UserError as error:
            self.error = error
            raise StopIteration from None

    def check(self) -> None:
        """Raise the error, if one ended the iterator."""
        if self.error is not None:
            raise self.error


def pieces_of_records(records: Iterator[Record | Fault]) -> Pieces:
    """For inputs that one process has to read: the others get its records."""

    def cut() -> Iterator[Piece]:
        waiting = Held(records)
        while some := list(islice(waiting, PIECE_RECORDS)):
            yield Piece(some[0].line, some)
        waiting.check()

    return Pieces(
        cut(), lambda piece: piece.content, lambda pieces: chain.from_iterable(piece.content for piece in pieces)
    )


def pieces_of_lines(
    blocks: Iterator[bytes], line: int, parse: Callable[[int, bytes], Iterator[Record | Fault]]
) -> Pieces:
    """For inputs of which each line is a record; `line` is the number of the first one in the blocks."""

    def read(piece: Piece) -> Iterator[Record | Fault]:
        return parse(piece.line, piece.content)

    return Pieces(cut_lines(blocks, line), read, lambda pieces: chain.from_iterable(read(piece) for piece in pieces))


def cut_lines(blocks: Iterator[bytes], line: int) -> Iterator[Piece]:
    """Blocks of whole lines, put together to pieces."""
    held: list[bytes] = []
    come = Held(blocks)
    for block in come:
        held.append(block)
        if block.endswith(b"\n") and sum(map(len, held)) >= PIECE_BYTES:
            content = b"".join(held)
            yield Piece(line, content)
            line += content.count(b"\n")
            held.clear()
    if held:
        yield Piece(line, b"".join(held))
    come.check()


def pieces_of_table(table: Table) -> Pieces:
    """For tables. A line end behind an even number of quotes ends a record, if quotes stand where they should;
    where they do not, `read` finds that a piece ends inside one."""

    def read_on(pieces: Iterable[Piece]) -> Iterator[Record | Fault]:
        waiting = iter(pieces)
        first = next(waiting)
        contents = chain([first.content], (piece.content for piece in waiting))
        return table.read_piece(first.line, contents, is_piece=False)

    def read(piece: Piece) -> Iterator[Record | Fault]:
        return table.read_piece(piece.line, blocks_of(piece.content))

    return Pieces(cut_table(table), read, read_on)


def cut_table(table: Table) -> Iterator[Piece]:
    """Pieces that probably end with a record."""
    line, held, size, is_inside = table.line, list[bytes](), 0, False
    blocks = Held(table.rest())
    for block in blocks:
        held.append(block)
        size += len(block)
        is_inside ^= table.options.has_quotes and block.count(b'"') % 2 == 1
        if size >= PIECE_BYTES and not is_inside:
            content = b"".join(held)
            yield Piece(line, content)
            line += line_ends(content)
            held, size = [], 0
        elif size >= LONGEST_PIECE_BYTES:
            yield Piece(line, b"".join(held), is_whole=False)
            held = []
            yield from (Piece(0, rest, is_whole=False) for rest in blocks)
    if held:
        yield Piece(line, b"".join(held))
    blocks.check()
