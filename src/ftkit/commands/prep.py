"""Turn tables and files of records into training rows: read, choose columns, render, leave out duplicates, write."""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import jsonlines
import orjson

from ftkit import console
from ftkit.core.columns import LOOKED_AT_ROWS, NoAnswer
from ftkit.core.mojibake import misread_sample
from ftkit.core.row_plan import Beginning, Plan, Row, make_plan
from ftkit.core.settings import PrepSettings, require
from ftkit.core.splitting import content_digest, parse_shares, part_of
from ftkit.errors import ExitCode, UserError
from ftkit.io.atomic import atomic_folder, read_manifest
from ftkit.io.inputs import OpenInput, ReadOptions, open_input
from ftkit.io.jsonl import STDIN, rows_output
from ftkit.io.tables import Fault, Record, spelled_delimiter
from ftkit.io.template import Template
from ftkit.io.template_files import load_template, shipped_names
from ftkit.io.text_input import check_encoding

SCHEMA = "ftkit.prep/1"
SHOWN_OF_A_KIND = 5
MOST_FAULTS_BEFORE_A_ROW = 10_000
Write = Callable[[Row], Any]


def run(settings: PrepSettings) -> None:
    """Rows to stdout or -o, words to stderr; the rejected rows, if any, to --rejects."""
    sources = list(settings.inputs) or [STDIN]
    check_request(settings, sources)
    template = load_template(settings.template) if settings.template else None
    ledger, nothing_left = Ledger(), None
    with rejects_output(settings) as write_reject:
        work = Preparation(settings, template, ledger, write_reject)
        try:
            with rows_destination(settings, ledger) as write_row:
                for source in sources:
                    work.prepare(source, write_row)
                ledger.require_rows()
        except NothingLeft as error:  # the rejects tell why: they are kept, the rows are not
            nothing_left = error
    report(settings, template, ledger)
    if nothing_left:
        raise nothing_left


class NothingLeft(UserError):
    """No row came out."""


@dataclass
class Ledger:
    """Where every row that came in has gone: rows in = out + rejected + duplicates."""

    rows_in: int = 0
    out: int = 0
    rejected: int = 0
    duplicates: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    lines: dict[str, list[int]] = field(default_factory=dict)
    """The first lines of each reason."""
    parts: Counter[str] = field(default_factory=Counter)
    misread: int = 0
    misread_example: str = ""
    first: tuple[Plan, str] | None = None
    """The first input's plan and name."""

    def require_rows(self) -> None:
        """Raise a data error if no row came out."""
        if self.out == 0:
            reasons = "; ".join(self.describe(reason) for reason, _ in self.reasons.most_common(SHOWN_OF_A_KIND))
            hint = "mend the rows, or choose other columns with --map"
            raise NothingLeft(f"0 rows left of {self.rows_in:,}: {reasons}", ExitCode.DATA, hint=hint)

    def describe(self, reason: str) -> str:
        """A reason, how often it came up and the first lines where."""
        count, lines = self.reasons[reason], ", ".join(map(str, self.lines[reason]))
        return f"{reason} ({count:,} times, lines {lines}{', ...' if count > SHOWN_OF_A_KIND else ''})"


@dataclass
class Preparation:
    """The state of one call of prep while its inputs pass through."""

    settings: PrepSettings
    template: Template | None
    ledger: Ledger
    write_reject: Write | None
    seen: set[bytes] = field(default_factory=set)
    """Digests of the rows so far, 16 bytes each."""

    def prepare(self, source: str, write: Write) -> None:
        """All rows of one input."""
        options = ReadOptions(
            self.settings.format, self.settings.encoding, self.settings.delimiter, self.settings.max_field_bytes
        )
        with open_input(source, options) as opened:
            tell(opened.notes)
            first = read_first(opened, stop=self.settings.on_error == "stop")
            sample = [item for item in first if isinstance(item, Record)]
            plan = (
                self.plan(opened, sample) if sample else None
            )  # without a readable record there is nothing to plan for
            for item in chain(first, opened.records):
                self.ledger.rows_in += 1
                row = self.row_of(item, plan, opened.name)
                if row is not None and self.is_new(row):
                    self.ledger.out += 1
                    write(row)

    def plan(self, opened: OpenInput, sample: list[Record]) -> Plan:
        """The plan for an input; all inputs must give the same kind of rows."""
        columns = list(dict.fromkeys(name for record in sample for name in record.values))
        beginning = Beginning(opened.name, sample[0].line, columns, [record.values for record in sample])
        if self.settings.map and self.template is None:
            raise needs_template("--map fills the fields of a template, and none is given")
        plan = make_plan(beginning, self.template, self.settings.map)
        if plan is None:
            raise needs_template(
                f"{opened.name}: no training rows yet (they have {', '.join(columns)}), and no --template is given"
            )
        tell(plan.notes)
        self.ledger.first = self.ledger.first or (plan, beginning.since)
        other, since = self.ledger.first
        if other.kind != plan.kind:
            raise UserError(
                f"{beginning.since}: gives rows of {plan.kind}, {since} gives rows of {other.kind}",
                ExitCode.DATA,
                hint="prepare them one by one, each into its own file",
            )
        return plan

    def row_of(self, item: Record | Fault, plan: Plan | None, name: str) -> Row | None:
        """The row of one record; None if it was left out.

        A row without an answer is always left out and said; any other fault stops, unless --on-error is skip.
        """
        try:
            if isinstance(item, Fault) or plan is None:
                raise item.error  # type: ignore[union-attr]
            row = plan.make(item.values, f"{name}:{item.line}")
        except UserError as error:
            if self.settings.on_error == "stop" and not isinstance(error, NoAnswer):
                raise
            self.reject(item, name, error)
            return None
        if example := misread_sample(texts_of(row)):
            self.ledger.misread += 1
            self.ledger.misread_example = self.ledger.misread_example or f"{name}:{item.line}: {example}"
        return row

    def is_new(self, row: Row) -> bool:
        """False, and counted, for a row that is equal to an earlier one."""
        if self.settings.dedupe == "none":
            return True
        before = len(self.seen)
        self.seen.add(content_digest(row))
        self.ledger.duplicates += len(self.seen) == before
        return len(self.seen) > before

    def reject(self, item: Record | Fault, name: str, error: UserError) -> None:
        """Count a bad row, say so (the first of a kind), and write it to the rejects."""
        reason = without_place(error.message, name)
        kind = re.sub(r"\d[\d,]*", "N", reason)
        self.ledger.rejected += 1
        self.ledger.reasons[kind] += 1
        if self.ledger.reasons[kind] <= SHOWN_OF_A_KIND:
            self.ledger.lines.setdefault(kind, []).append(item.line)
            console.warn(f"left out: {error.message}")
        if self.write_reject is not None:
            content = item.values if isinstance(item, Record) else item.raw
            self.write_reject(
                {
                    "file": name,
                    "line": item.line,
                    "field": getattr(error, "field", None),
                    "reason": reason,
                    "row": content,
                }
            )


def check_request(settings: PrepSettings, sources: list[str]) -> None:
    """Everything that can be refused before an input is read."""
    require(settings.max_field_bytes >= 1, "--max-field-bytes", settings.max_field_bytes, "1 or more")
    if settings.encoding:
        check_encoding(settings.encoding)
    if settings.delimiter:
        spelled_delimiter(settings.delimiter)
    if settings.split and not to_file(settings):
        raise UserError("--split writes several files", ExitCode.USAGE, hint="give a folder for them: -o FOLDER")
    if settings.json and not to_file(settings):
        raise UserError("with --json the summary takes stdout", ExitCode.USAGE, hint="give the rows a file: -o FILE")
    if sources.count(STDIN) > 1:
        raise UserError("stdin can be read once", ExitCode.USAGE, hint="give - once")
    if STDIN in sources and (sys.stdin is None or console.is_terminal(sys.stdin)):
        raise UserError(
            "no input: nothing is piped in and no file is given",
            ExitCode.USAGE,
            hint="for example ftkit prep reddot.csv --template alpaca > train.jsonl",
        )
    refuse_overwriting(settings, [source for source in sources if source != STDIN])


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


def to_file(settings: PrepSettings) -> bool:
    """True if the rows go to a file or folder and not to stdout."""
    return bool(settings.output) and settings.output != STDIN


def read_first(opened: OpenInput, *, stop: bool) -> list[Record | Fault]:
    """The first items of an input, with enough records among them to choose columns by."""
    items: list[Record | Fault] = []
    records = 0
    for item in opened.records:
        items.append(item)
        records += isinstance(item, Record)
        if records == LOOKED_AT_ROWS or (stop and isinstance(item, Fault)):
            break
        if isinstance(item, Fault) and not records and len(items) == MOST_FAULTS_BEFORE_A_ROW:
            raise UserError(
                f"{item.error.message}; no row up to here can be read", item.error.exit_code, hint=item.error.hint
            )
    return items


def without_place(message: str, name: str) -> str:
    """A message without the file:line: in front."""
    return re.sub(rf"^{re.escape(name)}:[\d:]+\s*", "", message)


def texts_of(row: Row) -> Iterator[str]:
    """The texts of a row, to look at."""
    if "messages" in row:
        return (message["content"] for message in row["messages"])
    return (row[key] for key in ("prompt", "completion", "text") if key in row)


def needs_template(message: str) -> UserError:
    """The error for a missing --template."""
    return UserError(
        message, ExitCode.USAGE, hint=f"--template NAME: {', '.join(shipped_names())}; or a .toml file of your own"
    )


@contextmanager
def rows_destination(settings: PrepSettings, ledger: Ledger) -> Iterator[Write]:
    """Where rows go: stdout, a file, or with --split the files of a folder."""
    if settings.split:
        with split_files(Path(settings.output or ""), settings.split, settings.force, ledger) as write:
            yield write
        return
    with rows_output(settings.output if to_file(settings) else None, force=settings.force) as write:
        yield write


@contextmanager
def split_files(folder: Path, split: str, force: bool, ledger: Ledger) -> Iterator[Write]:
    """One file for each part in a folder that appears whole; a row's content decides its part."""
    shares = parse_shares(split)
    ledger.parts.update(dict.fromkeys(shares, 0))
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or read_manifest(folder) is not None)):
        raise UserError(
            f"{folder} exists and was not made by ftkit",
            ExitCode.EXISTS,
            hint="give another -o; --force replaces only what ftkit made",
        )
    with atomic_folder(folder, replace=force) as staged, ExitStack() as files:
        writers = {
            name: jsonlines.Writer(files.enter_context((staged / f"{name}.jsonl").open("wb")), dumps=orjson.dumps)
            for name in shares
        }

        def write(row: Row) -> None:
            part = part_of(content_digest(row), shares)
            ledger.parts[part] += 1
            writers[part].write(row)

        yield write


@contextmanager
def rejects_output(settings: PrepSettings) -> Iterator[Write | None]:
    """Where rejected rows go, if anywhere."""
    if settings.rejects is None:
        yield None
        return
    with rows_output(settings.rejects, force=settings.force) as write:
        yield write


def tell(notes: tuple[str, ...]) -> None:
    """Say what was found and chosen."""
    for note in notes:
        console.info(note)


def report(settings: PrepSettings, template: Template | None, ledger: Ledger) -> None:
    """The summary, whose sum always holds, and what a person should be warned of."""
    for reason, count in ledger.reasons.items():
        if count > SHOWN_OF_A_KIND:
            console.warn(f"left out: {count - SHOWN_OF_A_KIND:,} more: {reason}")
    if ledger.misread:
        console.warn(
            f"{ledger.misread:,} rows look like UTF-8 that was read as Latin-1, for example {ledger.misread_example}"
        )
    if ledger.out == 1 and ledger.duplicates:
        console.warn(f"all {ledger.rows_in - ledger.rejected:,} rows are the same")
    empty = [name for name, count in ledger.parts.items() if not count]
    if empty and ledger.out:
        console.warn(f"no row fell into {', '.join(empty)}: there are too few rows")
    parts = f" ({', '.join(f'{name} {count:,}' for name, count in ledger.parts.items())})" if ledger.parts else ""
    console.info(
        f"{ledger.rows_in:,} rows in = {ledger.out:,} out{parts} + {ledger.rejected:,} rejected"
        f" + {ledger.duplicates:,} duplicates"
    )
    if settings.json:
        sys.stdout.buffer.write(orjson.dumps(summary(settings, template, ledger), option=orjson.OPT_APPEND_NEWLINE))


def summary(settings: PrepSettings, template: Template | None, ledger: Ledger) -> dict[str, Any]:
    """The counts as one JSON object."""
    return {
        "schema": SCHEMA,
        "in": ledger.rows_in,
        "out": ledger.out,
        "rejected": ledger.rejected,
        "duplicates": ledger.duplicates,
        "kind": ledger.first[0].kind if ledger.first else None,
        "template": template.fingerprint if template else None,
        "output": settings.output,
        "parts": dict(ledger.parts),
        "reasons": dict(ledger.reasons),
    }
