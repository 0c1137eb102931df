"""Turn tables and files of records into training rows: read, choose columns, render, leave out, order, write."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import orjson

from ftkit import console
from ftkit.commands.prep_output import rejects_output, rows_destination, to_file
from ftkit.commands.prep_report import report, show_templates
from ftkit.commands.prep_rows import Preparation, read_options, tell
from ftkit.core.prep_settings import PrepSettings
from ftkit.core.row_ledger import Ledger, NothingLeft
from ftkit.core.row_making import About, Made
from ftkit.core.row_order import mixed, parse_sample, quotas, sampled
from ftkit.core.row_runs import Together
from ftkit.core.row_stats import RowStats
from ftkit.core.sharding import parse_shard
from ftkit.core.splitting import DIGEST_BYTES, parse_shares, question_digest
from ftkit.errors import ExitCode, UserError
from ftkit.io.jsonl import STDIN
from ftkit.io.shuffling import shuffled
from ftkit.io.sources import HUB, Source, Sources, find_sources
from ftkit.io.tables import spelled_delimiter
from ftkit.io.template_files import load_template
from ftkit.io.text_input import check_encoding


def run(settings: PrepSettings) -> None:
    """Rows to stdout or -o, words to stderr; the rejected rows, if any, to --rejects."""
    if settings.list_templates:
        show_templates(settings)
        return
    check_request(settings, list(settings.inputs) or [STDIN])
    sources = find_sources(list(settings.inputs) or [STDIN])
    refuse_overwriting(settings, [s.name for s in sources.inputs if s.name != STDIN and not s.name.startswith(HUB)])
    tell(sources.notes)
    template = load_template(settings.template) if settings.template else None
    ledger, nothing_left = Ledger(), None
    with rare_collections(), rejects_output(settings) as write_reject:
        work = Preparation(settings, template, ledger, write_reject, is_weighted=sources.weights is not None)
        end = Ending(settings, work.seen_elsewhere)
        try:
            with rows_destination(settings, ledger) as write_row:
                for made in ordered(work, sources):
                    part = write_row(made)
                    ledger.out += made.count if isinstance(made, Together) else 1
                    if end.looks and not isinstance(made, Together):
                        end.look_at(made, part if settings.split else None)
                if ledger.rejected or not settings.shard:  # few records may leave a shard empty
                    ledger.require_rows()
                end.require_strict(ledger)
        except NothingLeft as error:  # the rejects tell why: they are kept, the rows are not
            nothing_left = error
    report(settings, work, end.stats, end.leaks)
    if nothing_left:
        raise nothing_left


def ordered(work: Preparation, sources: Sources) -> Iterator[Made | Together]:
    """The rows of all inputs: one after the other or mixed by weight, sampled and shuffled as asked."""
    settings, ledger = work.settings, work.ledger

    def leave_out() -> None:
        ledger.not_sampled += 1

    wanted = parse_sample(settings.sample) if settings.sample else None
    if sources.weights is None:
        rows: Iterator[Any] = chain.from_iterable(work.rows(source.name) for source in sources.inputs)
        rows = sampled(rows, wanted, settings.seed, leave_out) if wanted else rows
    else:
        rows = weighted(work, sources, wanted, leave_out)
    if settings.shuffle:
        rows = map(unpacked, shuffled(map(packed, rows), settings.seed))
    return rows


def weighted(
    work: Preparation, sources: Sources, wanted: float | None, leave_out: Callable[[], None]
) -> Iterator[Made]:
    """The rows of weighted inputs in their proportions; a sample is drawn from each input by itself."""
    weights = sources.weights or ()
    streams: list[Iterator[Any]] = []
    for group in range(len(weights)):
        inputs = [source for source in sources.inputs if source.group == group]
        streams.append(chain.from_iterable(work.rows(source.name) for source in inputs))
    if wanted is not None:
        counts = quotas(wanted, weights) if isinstance(wanted, int) else [wanted] * len(weights)
        seed = work.settings.seed
        streams = [sampled(s, n, seed + i, leave_out) for i, (s, n) in enumerate(zip(streams, counts, strict=True))]
    names = [name_of_group(sources, group) for group in range(len(weights))]
    for number, made in mixed(streams, weights, leave_out):
        work.ledger.mixed[names[number]] += 1
        yield made


def name_of_group(sources: Sources, group: int) -> str:
    """What a weighted argument is called: its one input, or the first of them and how many follow."""
    inputs: list[Source] = [source for source in sources.inputs if source.group == group]
    return inputs[0].name + (f" and {len(inputs) - 1} more" if len(inputs) > 1 else "")


def packed(made: Made) -> bytes:
    """A row as bytes of their own size: those of a serializer lie in ten times the memory."""
    line, digest, about = made
    return b"".join((digest, orjson.dumps(tuple(about)) if about else b"", b"\n", line))


def unpacked(data: bytes) -> Made:
    """The row of those bytes."""
    about, _, line = data[DIGEST_BYTES:].partition(b"\n")
    return line, data[:DIGEST_BYTES], About(*orjson.loads(about)) if about else None


@dataclass
class Ending:
    """What is looked at in the rows that are written."""

    settings: PrepSettings
    elsewhere: tuple[frozenset[bytes], frozenset[bytes]]
    """Digests of the rows and of the questions of --against."""
    leaks: list[int] = field(default_factory=lambda: [0, 0])
    """Rows that are also elsewhere; rows of which only the question is."""
    stats: RowStats | None = None

    def __post_init__(self) -> None:
        self.stats = RowStats() if self.settings.stats else None
        self.looks = self.settings.stats or bool(self.elsewhere[0])

    def look_at(self, made: Made, part: str | None) -> None:
        """Count one row."""
        line, digest, about = made
        row = orjson.loads(line)
        if self.stats is not None:
            self.stats.add(row, about.tokens if about else None, part)
        rows, questions = self.elsewhere
        if rows:
            is_equal = digest in rows
            self.leaks[0] += is_equal
            self.leaks[1] += int(not is_equal and question_digest(row) in questions)

    def require_strict(self, ledger: Ledger) -> None:
        """With --strict, rows that are also elsewhere, or were too long, are a data error."""
        if not self.settings.strict:
            return
        if ledger.beyond:
            raise UserError(
                f"longer than --max-tokens {self.settings.max_tokens:,}: {ledger.beyond}",
                ExitCode.DATA,
                hint="a larger --max-tokens, or without --strict",
            )
        if any(self.leaks):
            raise UserError(
                f"{self.leaks[0]:,} rows are also in {self.settings.against}, {self.leaks[1]:,} more ask the same",
                ExitCode.DATA,
                hint="leave them out of one of the two",
            )


@contextmanager
def rare_collections() -> Iterator[None]:
    """Python looks for circles of references after every 700 new objects; rows have none, and there are millions."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def check_request(settings: PrepSettings, inputs: list[str]) -> None:
    """Everything that can be refused before an input is read."""
    if settings.encoding:
        check_encoding(settings.encoding)
    if settings.delimiter:
        spelled_delimiter(settings.delimiter)
    if settings.sample:
        parse_sample(settings.sample)
    if settings.shard:
        parse_shard(settings.shard)
    if settings.split:
        parse_shares(settings.split)
    read_options(settings)
    if settings.split and not to_file(settings):
        raise UserError("--split writes several files", ExitCode.USAGE, hint="give a folder for them: -o FOLDER")
    if settings.json and not settings.stats and not to_file(settings):
        raise UserError("with --json the summary takes stdout", ExitCode.USAGE, hint="give the rows a file: -o FILE")
    if inputs.count(STDIN) > 1:
        raise UserError("stdin can be read once", ExitCode.USAGE, hint="give - once")
    if STDIN in inputs and (sys.stdin is None or console.is_terminal(sys.stdin)):
        raise UserError(
            "no input: nothing is piped in and no file is given",
            ExitCode.USAGE,
            hint="for example ftkit prep reddot.csv --template alpaca > train.jsonl",
        )


def refuse_overwriting(settings: PrepSettings, inputs: list[str]) -> None:
    """A usage error where an output is one of the inputs, is stdout onto an input, or is a folder around one."""
    outputs = [path for path in (settings.output, settings.rejects) if path and path != STDIN]
    if len(outputs) == 2 and same_file(outputs[0], outputs[1]):
        raise UserError(f"-o and --rejects are both {outputs[0]}", ExitCode.USAGE, hint="give two files")
    for path in outputs:
        wants_folder = bool(settings.split) and path == settings.output
        if os.path.exists(path) and not (os.path.isdir(path) if wants_folder else os.path.isfile(path)):
            needed, hint = (
                ("a folder", "give another -o")
                if wants_folder
                else ("a regular file", "give a file; --split NAME=SHARE,... fills a folder")
            )
            raise UserError(f"{path} is not {needed}", ExitCode.USAGE, hint=hint)
    for source in inputs:
        around = Path(source).resolve().parents if settings.split else []
        if any(same_file(source, path) or Path(path).resolve() in around for path in outputs):
            raise UserError(f"the output would replace the input {source}", ExitCode.USAGE, hint="give another -o")
        if not to_file(settings) and is_stdout(source):
            raise UserError(
                f"stdout goes to the input {source}",
                ExitCode.USAGE,
                hint="send it to another file (the shell has emptied this one)",
            )


def same_file(one: str, other: str) -> bool:
    """True if two paths are, or would be, one file."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


def is_stdout(path: str) -> bool:
    """True if stdout is redirected to this regular file."""
    try:
        return os.path.isfile(path) and os.path.samestat(os.stat(path), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError, AttributeError):
        return False
