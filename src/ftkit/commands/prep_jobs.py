"""Rows made by several processes at once: each gets pieces of the input; results come back in the order of the input.

Rows, their order and what is counted are those of one process: all that depends on earlier rows (duplicates, samples,
splits, what is said) happens behind this, in one place.
"""

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from multiprocessing import get_context, parent_process

from ftkit.core.row_ledger import Ledger
from ftkit.core.row_making import Outcome, RowMaker
from ftkit.errors import ExitCode, UserError
from ftkit.io.pieces import Piece, Pieces
from ftkit.io.tables import OpenQuote

AHEAD = 2
"""Pieces that wait or are worked on, for each process, so that none is idle."""
Results = tuple[list[Outcome], Ledger, UserError | None]
"""What became of the records of a piece, what was counted, and what ended its reading."""


def outcomes_of_processes(maker: RowMaker, pieces: Pieces, jobs: int) -> Iterator[Outcome]:
    """What `maker` makes of all pieces, in order, by this many processes.

    From a piece on that was cut inside a record (only its reader can tell), this process does the rest.
    """
    beginning = list(islice(pieces.cut, 2))
    rest: Iterator[Piece] = chain(beginning, pieces.cut)
    if len(beginning) == 2:  # a single piece cannot be shared
        with processes_for(maker, pieces, jobs) as processes:
            rest = yield from shared(rest, processes, AHEAD * jobs, maker.ledger)
    if first := next(rest, None):
        yield from maker.outcomes(pieces.read_on(chain([first], rest)))


def shared(
    cut: Iterator[Piece], processes: ProcessPoolExecutor, ahead: int, ledger: Ledger
) -> Generator[Outcome, None, Iterator[Piece]]:
    """The outcomes of pieces as long as they are cut right; returns those that are left."""
    waiting: deque[tuple[Piece, Future[Results | None]]] = deque()
    uncut: list[Piece] = []
    while True:
        while not uncut and len(waiting) < ahead and (piece := next(cut, None)):
            if piece.is_whole:
                waiting.append((piece, processes.submit(outcomes_of_piece, piece)))
            else:
                uncut.append(piece)
        results = received(waiting[0][1]) if waiting else None
        if results is None:
            return chain([piece for piece, _ in waiting], uncut, cut)
        waiting.popleft()
        outcomes, counted, error = results
        ledger.take(counted)
        yield from outcomes
        if error:
            raise error


def received(future: "Future[Results | None]") -> Results | None:
    """What a process has made of a piece; None for one that was cut inside a record."""
    try:
        return future.result()
    except BrokenProcessPool:
        raise UserError(
            "a process of --jobs was killed", ExitCode.MEMORY, hint="is there enough memory? fewer --jobs need less"
        ) from None


@contextmanager
def processes_for(maker: RowMaker, pieces: Pieces, jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that begin as copies of this one, plan and all: plans are functions, which no pipe carries."""
    sys.stdout.flush()  # what waits to be written would be written by each of them
    processes = ProcessPoolExecutor(jobs, get_context("fork"), begin, (maker, pieces))
    try:
        yield processes
    finally:
        processes.shutdown(wait=False, cancel_futures=True)


given: list[tuple[RowMaker, Pieces]] = []
"""In a process of --jobs: what it has to do."""


def begin(maker: RowMaker, pieces: Pieces) -> None:
    """How a process begins: Ctrl-C is its parent's to hear, and it ends when its parent does, however that was."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=end_with_parent, daemon=True).start()
    given[:] = [(maker, pieces)]


def end_with_parent() -> None:
    """Wait for the end of the parent."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def outcomes_of_piece(piece: Piece) -> Results | None:
    """What a process makes of a piece; None where it was cut inside a record."""
    maker, pieces = given[0]
    ledger, outcomes = Ledger(), list[Outcome]()
    try:
        for outcome in replace(maker, ledger=ledger).outcomes(pieces.read(piece)):
            outcomes.append(outcome)
    except OpenQuote:
        return None
    except UserError as error:
        return outcomes, ledger, error
    return outcomes, ledger, None
