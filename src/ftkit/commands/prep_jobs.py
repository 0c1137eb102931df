"""Rows made by several processes at once: each gets pieces of the input; results come back in the order of the input.

Rows, their order and what is counted are those of one process: all that depends on earlier rows (duplicates, samples,
splits, what is said) happens behind this, in one place.
"""

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, cycle, islice
from mmap import mmap
from multiprocessing import get_context, parent_process

from ftkit.core.row_ledger import Ledger
from ftkit.core.row_making import Outcome, RowMaker
from ftkit.core.row_runs import Other, Run, gathered
from ftkit.errors import ExitCode, UserError
from ftkit.io.pieces import Piece, Pieces
from ftkit.io.tables import OpenQuote

AHEAD = 4
"""Pieces that wait or are worked on, for each process, so that none is idle: with two, a twentieth of the time was lost."""
SLOT_BYTES = 4 * 2**20
"""What a piece and the rows made of it may take of the memory that all processes see; anything larger goes through pipes."""
Results = tuple[list[Run | Other], Ledger, UserError | None]
"""What became of the records of a piece, what was counted, and what ended its reading."""


def outcomes_of_processes(maker: RowMaker, pieces: Pieces, jobs: int) -> Iterator[Run | Outcome]:
    """What `maker` makes of all pieces, in order, by this many processes.

    From a piece on that was cut inside a record (only its reader can tell), this process does the rest.
    """
    cut = error_last(pieces.cut)
    beginning = list(islice(cut, 2))
    rest: Iterator[Piece | UserError] = chain(beginning, cut)
    if len(beginning) == 2:  # a single piece cannot be shared
        slots = Slots(AHEAD * jobs)
        with processes_for(maker, pieces, slots, jobs) as processes:
            rest = yield from shared(rest, processes, slots, maker.ledger)
    pieces_left = raising(rest)
    if first := next(pieces_left, None):
        yield from maker.outcomes(pieces.read_on(chain([first], pieces_left)))


def error_last(cut: Iterator[Piece]) -> Iterator[Piece | UserError]:
    """The pieces, and the error that ends them, if one does: it must wait for the rows before it."""
    try:
        yield from cut
    except UserError as error:
        yield error


def raising(rest: Iterator[Piece | UserError]) -> Iterator[Piece]:
    """The pieces, until the error comes."""
    for piece in rest:
        if isinstance(piece, UserError):
            raise piece
        yield piece


class Slots:
    """Memory that all processes see: text goes to them and rows come back without a pipe between."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.memory = memoryview(mmap(-1, count * SLOT_BYTES))

    def put(self, slot: int, parts: Sequence[bytes | memoryview]) -> bool:
        """Put these parts one behind the other into a slot; False where they are too large for it."""
        if sum(map(len, parts)) > SLOT_BYTES:
            return False
        at = slot * SLOT_BYTES
        for part in parts:
            self.memory[at : at + len(part)] = part
            at += len(part)
        return True

    def get(self, slot: int, begin: int, end: int) -> memoryview:
        """These bytes of a slot, as long as nothing else is put into it."""
        return self.memory[slot * SLOT_BYTES :][begin:end]


def shared(
    cut: Iterator[Piece | UserError], processes: ProcessPoolExecutor, slots: Slots, ledger: Ledger
) -> Generator[Run | Outcome, None, Iterator[Piece | UserError]]:
    """The outcomes of pieces as long as they are cut right; returns those that are left."""
    waiting: deque[tuple[Piece, int, Future[Results | None]]] = deque()
    uncut: list[Piece | UserError] = []
    numbers = cycle(range(slots.count))  # pieces come back in order: a slot is free when its turn comes again
    while True:
        while not uncut and len(waiting) < slots.count and (piece := next(cut, None)):
            if isinstance(piece, Piece) and piece.is_whole:
                slot = next(numbers)
                waiting.append((piece, slot, processes.submit(outcomes_of_piece, slot, *handed(piece, slots, slot))))
            else:
                uncut.append(piece)
        results = received(waiting[0][2]) if waiting else None
        if results is None:
            return chain([piece for piece, _, _ in waiting], uncut, cut)
        _, slot, _ = waiting.popleft()
        outcomes, counted, error = results
        ledger.take(counted)
        yield from taken_out(outcomes, slots, slot)
        if error:
            raise error


def handed(piece: Piece, slots: Slots, slot: int) -> tuple[Piece, int | None]:
    """A piece as it goes to a process; the length of its text where that lies in the slot."""
    if isinstance(piece.content, bytes) and slots.put(slot, [piece.content]):
        return piece._replace(content=None), len(piece.content)
    return piece, None


def put_in(outcomes: list[Run | Other], slots: Slots, slot: int) -> list[Run | Other]:
    """The same, lines in the slot if they fit."""
    lines = [outcome.lines for outcome in outcomes if isinstance(outcome, Run)]
    if not slots.put(slot, lines):
        return outcomes
    return [replace(outcome, lines=b"") if isinstance(outcome, Run) else outcome for outcome in outcomes]


def taken_out(outcomes: list[Run | Other], slots: Slots, slot: int) -> Iterator[Run | Other]:
    """What was put in."""
    begin = 0
    for outcome in outcomes:
        if isinstance(outcome, Run) and not outcome.lines:
            end = begin + outcome.ends[-1]
            yield replace(outcome, lines=slots.get(slot, begin, end))
            begin = end
        else:
            yield outcome


def received(future: "Future[Results | None]") -> Results | None:
    """What a process has made of a piece; None for one that was cut inside a record."""
    try:
        return future.result()
    except BrokenProcessPool:
        raise UserError(
            "a process of --jobs was killed", ExitCode.MEMORY, hint="is there enough memory? fewer --jobs need less"
        ) from None


@contextmanager
def processes_for(maker: RowMaker, pieces: Pieces, slots: Slots, jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that begin as copies of this one, plan and all: plans are functions, which no pipe carries."""
    sys.stdout.flush()  # what waits to be written would be written by each of them
    processes = ProcessPoolExecutor(jobs, get_context("fork"), begin, (maker, pieces, slots))
    try:
        yield processes
    finally:
        processes.shutdown(wait=False, cancel_futures=True)


given: list[tuple[RowMaker, Pieces, Slots]] = []
"""In a process of --jobs: what it has to do."""


def begin(maker: RowMaker, pieces: Pieces, slots: Slots) -> None:
    """How a process begins: Ctrl-C is its parent's to hear, and it ends when its parent does, however that was."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=end_with_parent, daemon=True).start()
    given[:] = [(maker, pieces, slots)]


def end_with_parent() -> None:
    """Wait for the end of the parent."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def outcomes_of_piece(slot: int, piece: Piece, length: int | None) -> Results | None:
    """What a process makes of a piece (its text may lie in a slot); None where it was cut inside a record."""
    maker, pieces, slots = given[0]
    if length is not None:
        piece = piece._replace(content=bytes(slots.get(slot, 0, length)))
    ledger, outcomes, ended = Ledger(), list[Outcome](), None
    try:
        for outcome in replace(maker, ledger=ledger).outcomes(pieces.read(piece)):
            outcomes.append(outcome)
    except OpenQuote:
        return None
    except UserError as error:
        ended = error
    return put_in(gathered(outcomes), slots, slot), ledger, ended
