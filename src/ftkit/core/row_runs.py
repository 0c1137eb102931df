"""Rows that are passed on together: what costs little for one row costs as much as making it where there are millions."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from struct import unpack
from typing import cast

from ftkit.core.row_making import About, LeftOut, Made, Noticed, Outcome, Rejected
from ftkit.core.splitting import DIGEST_BYTES

Text = bytes | memoryview
Other = LeftOut | Rejected | Noticed


@dataclass(frozen=True, slots=True)
class Run:
    """Rows one behind the other, at least one."""

    lines: Text
    """Good until the next run is asked for; empty where they lie elsewhere."""
    ends: Sequence[int]
    """Where in `lines` each row ends."""
    digests: bytes
    abouts: Sequence[About | None]

    def rows(self) -> Iterator[Made]:
        """The rows one by one."""
        begins = chain([0], self.ends)
        for begin, end, digest, about in zip(begins, self.ends, self.each_digest(), self.abouts, strict=False):
            yield bytes(self.lines[begin:end]), digest, about

    def each_digest(self) -> tuple[bytes, ...]:
        """The digests of the rows."""
        return unpack(f"{DIGEST_BYTES}s" * len(self.ends), self.digests)


@dataclass(frozen=True, slots=True)
class Together:
    """The lines of some rows, ready to be written."""

    lines: Text
    count: int


def run_of(rows: Sequence[Made]) -> Run:
    """These rows together."""
    lines, digests, abouts = zip(*rows, strict=True)
    return Run(b"".join(lines), array("Q", accumulate(map(len, lines))), b"".join(digests), abouts)


def gathered(outcomes: Sequence[Outcome]) -> list[Run | Other]:
    """The same in the same order, rows that follow each other together."""
    found: list[Run | Other] = []
    begin, made = 0, cast(Sequence[Made], outcomes)
    for number, outcome in enumerate(outcomes):
        if type(outcome) is not tuple:
            if begin < number:
                found.append(run_of(made[begin:number]))
            found.append(cast(Other, outcome))
            begin = number + 1
    if begin < len(outcomes):
        found.append(run_of(made[begin:]))
    return found


def unseen(run: Run, seen: set[bytes]) -> Together:
    """The rows of a run whose digests have not been seen; now they have."""
    parts: list[Text] = []
    begin, repeated = 0, 0
    for number, digest in enumerate(run.each_digest()):
        if digest not in seen:
            seen.add(digest)
            continue
        repeated += 1
        parts.append(run.lines[begin : run.ends[number - 1] if number else 0])
        begin = run.ends[number]
    parts.append(run.lines[begin:])
    return Together(b"".join(parts) if repeated else run.lines, len(run.ends) - repeated)
