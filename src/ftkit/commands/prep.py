"""Turn tables and files of records into training rows: read, choose columns, render, leave out, order, write."""

import gc
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import orjson

from ftkit import console
from ftkit.commands.prep_output import Made, rejects_output, rows_destination, to_file
from ftkit.commands.prep_report import report, show_templates
from ftkit.core.augmentation import Augment, augmenter
from ftkit.core.columns import LOOKED_AT_ROWS, NoAnswer
from ftkit.core.digest_set import DigestSet
from ftkit.core.mojibake import misread_sample
from ftkit.core.near_duplicates import NearDuplicates
from ftkit.core.row_filters import Condition, check_where, length_option, parse_where, texts_of
from ftkit.core.row_ledger import SHOWN_OF_A_KIND, Ledger, NothingLeft
from ftkit.core.row_order import mixed, parse_sample, quotas, sampled
from ftkit.core.row_plan import Beginning, Plan, Row, make_plan
from ftkit.core.row_stats import RowStats
from ftkit.core.settings import PrepSettings
from ftkit.core.splitting import content_digest, parse_shares, question_digest
from ftkit.core.transcripts import parse_marks
from ftkit.errors import ExitCode, UserError
from ftkit.io.inputs import OpenInput, ReadOptions, open_input
from ftkit.io.jsonl import STDIN, read_rows
from ftkit.io.nested import MISSING, look_up
from ftkit.io.shuffling import shuffled
from ftkit.io.sources import HUB, Source, Sources, find_sources
from ftkit.io.tables import Fault, Record, spelled_delimiter
from ftkit.io.template import Template
from ftkit.io.template_files import load_template, shipped_names
from ftkit.io.text_input import check_encoding
from ftkit.io.user_function import load_function

MOST_FAULTS_BEFORE_A_ROW = 10_000
SPECIAL = re.compile(r"<\|[a-z_0-9]+\|>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]")
"""What well-known tokenizers read as one of their special tokens."""


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
        work = Preparation(settings, template, ledger, write_reject)
        end = Ending(settings, work.seen_elsewhere)
        try:
            with rows_destination(settings, ledger) as write_row:
                for made in ordered(work, sources):
                    part = write_row(made)
                    ledger.out += 1
                    if end.looks:
                        end.look_at(made, part if settings.split else None)
                ledger.require_rows()
                end.require_no_leak()
        except NothingLeft as error:  # the rejects tell why: they are kept, the rows are not
            nothing_left = error
    report(settings, work, end.stats, end.leaks)
    if nothing_left:
        raise nothing_left


def ordered(work: "Preparation", sources: Sources) -> Iterator[Made]:
    """The rows of all inputs: one after the other or mixed by weight, sampled and shuffled as asked."""
    settings, ledger = work.settings, work.ledger

    def leave_out() -> None:
        ledger.not_sampled += 1

    wanted = parse_sample(settings.sample) if settings.sample else None
    if sources.weights is None:
        rows: Iterator[Made] = chain.from_iterable(work.rows(source.name) for source in sources.inputs)
        rows = sampled(rows, wanted, settings.seed, leave_out) if wanted else rows
    else:
        rows = weighted(work, sources, wanted, leave_out)
    if settings.shuffle:
        rows = map(unpacked, shuffled(map(packed, rows), settings.seed))
    return rows


def weighted(
    work: "Preparation", sources: Sources, wanted: float | None, leave_out: Callable[[], None]
) -> Iterator[Made]:
    """The rows of weighted inputs in their proportions; a sample is drawn from each input by itself."""
    weights = sources.weights or ()
    streams: list[Iterator[Made]] = []
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
    """A row as bytes, for a file."""
    return orjson.dumps([made.row, made.digest.hex(), made.stratum, made.tokens])


def unpacked(line: bytes) -> Made:
    """The row of those bytes."""
    row, digest, stratum, tokens = orjson.loads(line)
    return Made(row, bytes.fromhex(digest), stratum, tokens)


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
        if self.stats is not None:
            self.stats.add(made.row, made.tokens, part)
        rows, questions = self.elsewhere
        if rows:
            is_equal = made.digest in rows
            self.leaks[0] += is_equal
            self.leaks[1] += int(not is_equal and question_digest(made.row) in questions)

    def require_no_leak(self) -> None:
        """With --strict, rows that are also elsewhere are a data error."""
        if self.settings.strict and any(self.leaks):
            raise UserError(
                f"{self.leaks[0]:,} rows are also in {self.settings.against}, {self.leaks[1]:,} more ask the same",
                ExitCode.DATA,
                hint="leave them out of one of the two",
            )


@dataclass
class Preparation:
    """The state of one call of prep while its inputs pass through."""

    settings: PrepSettings
    template: Template | None
    ledger: Ledger
    write_reject: Callable[[Row], Any] | None
    first: tuple[Plan, str] | None = None
    """The first input's plan and where it began."""
    seen: DigestSet = field(default_factory=DigestSet)
    near: NearDuplicates | None = None
    augment: Augment | None = None
    condition: tuple[Condition, frozenset[str]] | None = None
    seen_elsewhere: tuple[frozenset[bytes], frozenset[bytes]] = (frozenset(), frozenset())
    shown: int = 0

    def __post_init__(self) -> None:
        settings = self.settings
        self.marks = parse_marks(settings.turns) if settings.turns else None
        self.near = NearDuplicates(settings.near) if settings.dedupe == "near" else None
        self.condition = parse_where(settings.where) if settings.where else None
        if settings.augment:
            self.augment = augmenter(load_function(settings.augment, "--augment"), settings.augment)
        if settings.against:
            self.seen_elsewhere = digests_of(settings.against)
        self.limit = token_limit(settings)

    def rows(self, source: str) -> Iterator[Made]:
        """All rows of one input that are not left out."""
        with open_input(source, read_options(self.settings)) as opened:
            tell(opened.notes)
            first = read_first(opened, stop=self.settings.on_error == "stop")
            records = self.records(chain(first, opened.records), opened.name)
            looked_at = self.records(iter(first), opened.name, counted=False)
            sample = [record for record, _ in looked_at if isinstance(record, Record)]
            # without a readable record there is nothing to plan for
            plan = self.plan(opened, sample) if sample else None
            if self.can_hurry and plan is not None and plan.quick is not None:
                yield from self.quick_rows(chain(first, opened.records), plan, plan.quick, opened.name)
                return
            for record, is_made in records:
                made = self.made(record, plan, opened.name, is_made=is_made)
                if made is not None:
                    yield made

    @property
    def can_hurry(self) -> bool:
        """True if nothing but duplicates and oddities is looked for in a row."""
        settings = self.settings
        asks_more = (self.condition, self.augment, self.limit, self.near, settings.stratify)
        return all(asked is None for asked in (*asks_more, settings.min_chars, settings.max_chars))

    def quick_rows(
        self, items: Iterator[Record | Fault], plan: Plan, quick: Callable[[Any], Row | None], name: str
    ) -> Iterator[Made]:
        """The rows that `made` would give; it is asked for every record that is not plainly good."""
        ledger, add = self.ledger, self.seen.add if self.settings.dedupe == "exact" else None
        new_made = partial(tuple.__new__, Made)  # what Made(...) does, in half the time
        for item in items:
            ledger.rows_in += 1
            row = quick(item.values) if type(item) is Record else None
            if row is None or has_oddities(row):
                made = self.made(item, plan, name, is_made=False)
                if made is not None:
                    yield made
                continue
            digest = content_digest(row)
            if add is not None and not add(digest):
                ledger.duplicates += 1
                continue
            yield new_made((row, digest, None, None))

    def records(
        self, items: Iterator[Record | Fault], name: str, *, counted: bool = True
    ) -> Iterator[tuple[Record | Fault, bool]]:
        """The records that --where wants, through --augment; and whether each was made by it."""
        for item in items:
            self.ledger.rows_in += counted
            if isinstance(item, Record) and (self.condition or self.augment):
                try:
                    if self.condition and not self.wants(item, name):
                        self.ledger.filtered.update(["--where"] * counted)
                        continue
                    if self.augment:
                        yield from self.augmented(item, name, counted=counted)
                        continue
                except UserError as error:
                    item = Fault(item.line, error, orjson.dumps(item.values, default=str).decode())
            yield item, False

    def wants(self, record: Record, name: str) -> bool:
        """Whether --where holds for a record."""
        holds, names = self.condition  # type: ignore[misc]
        check_where(names, list(record.values), f"{name}:{record.line}")
        return holds(record.values, f"{name}:{record.line}")

    def augmented(self, record: Record, name: str, *, counted: bool) -> Iterator[tuple[Record, bool]]:
        """What --augment makes of a record, counted so that the sum holds."""
        found = self.augment(record.values, f"{name}:{record.line}")  # type: ignore[misc]
        if counted:
            self.ledger.made += max(0, len(found) - 1)
            self.ledger.filtered.update([] if found else ["--augment"])
        return ((Record(record.line, values), is_made) for values, is_made in found)

    def plan(self, opened: OpenInput, sample: list[Record]) -> Plan:
        """The plan for an input; all inputs must give the same kind of rows."""
        columns = list(dict.fromkeys(name for record in sample for name in record.values))
        beginning = Beginning(opened.name, sample[0].line, columns, [record.values for record in sample])
        if self.settings.map and self.template is None:
            raise needs_template("--map fills the fields of a template, and none is given")
        plan = make_plan(beginning, self.template, self.settings.map, self.marks)
        if plan is None:
            raise needs_template(
                f"{opened.name}: no training rows yet (they have {', '.join(columns)}), and no --template is given"
            )
        tell(plan.notes)
        self.first = self.first or (plan, beginning.since)
        other, since = self.first
        if other.kind != plan.kind:
            raise UserError(
                f"{beginning.since}: gives rows of {plan.kind}, {since} gives rows of {other.kind}",
                ExitCode.DATA,
                hint="prepare them one by one, each into its own file",
            )
        return plan

    def made(self, item: Record | Fault, plan: Plan | None, name: str, *, is_made: bool) -> Made | None:
        """The row of one record; None if it was left out, and counted where it went.

        A row without an answer is always left out and said; any other fault stops, unless --on-error is skip.
        """
        place = f"{name}:{item.line}"
        try:
            if isinstance(item, Fault) or plan is None:
                raise item.error  # type: ignore[union-attr]
            row = plan.make(item.values, place)
            if is_made:
                row["meta"] = {"made_by": (self.settings.augment or "").rpartition("/")[2]}
            return self.kept(row, item, place)
        except UserError as error:
            if self.settings.on_error == "stop" and not isinstance(error, NoAnswer):
                raise
            self.reject(item, name, error)
            return None

    def kept(self, row: Row, record: Record, place: str) -> Made | None:
        """The row with what it is known by, unless it is too short, too long or not new."""
        self.look_for_oddities(row, place)
        if option := length_option(row, self.settings.min_chars, self.settings.max_chars):
            self.ledger.filtered[option] += 1
            return None
        tokens = None
        if self.limit is not None:
            fitted = self.limit.fit(row, place)
            tokens = fitted.tokens
            self.ledger.lost_tokens += fitted.lost_tokens
            self.ledger.truncated += fitted.was_cut
            if fitted.row is None:
                self.ledger.filtered["--max-tokens"] += 1
                return None
            row = fitted.row
        digest = content_digest(row)
        if not self.is_new(row, digest, place):
            return None
        self.show(row)
        return Made(row, digest, self.stratum_of(record, row, place), tokens)

    def is_new(self, row: Row, digest: bytes, place: str) -> bool:
        """False, and counted, for a row that is equal (or near) to an earlier one."""
        if self.settings.dedupe == "none":
            return True
        if not self.seen.add(digest):
            self.ledger.duplicates += 1
            return False
        if self.near is not None and not self.near.is_new(texts_of(row), place):
            self.ledger.duplicates += 1
            self.ledger.near_duplicates += 1
            return False
        return True

    def stratum_of(self, record: Record, row: Row, place: str) -> str | None:
        """The value that --stratify keeps even, in the record or in the row made of it."""
        name = self.settings.stratify
        if name is None:
            return None
        value = look_up(record.values, name)
        value = look_up(row, name) if value is MISSING else value
        if value is MISSING:
            raise UserError(
                f"{place}: no column '{name}' for --stratify",
                ExitCode.DATA,
                hint=f"columns: {', '.join(record.values)}",
            )
        return str(value)

    def look_for_oddities(self, row: Row, place: str) -> None:
        """Count rows that look misread, and rows that hold the text of a special token."""
        if not has_oddities(row):
            return
        for text in texts_of(row):
            if not text.isascii() and (example := misread_sample([text])):
                self.ledger.misread += 1
                self.ledger.misread_example = self.ledger.misread_example or f"{place}: {example}"
                break
        for text in texts_of(row):
            if ("<" in text or "[" in text) and (found := SPECIAL.search(text)):
                self.ledger.special += 1
                self.ledger.special_example = self.ledger.special_example or f"{place}: {found[0]}"
                break

    def show(self, row: Row) -> None:
        """Print one of the first rows as the model sees it."""
        if self.limit is None or self.shown >= self.settings.show:
            return
        from ftkit.commands.prep_report import show_row

        self.shown += 1
        show_row(self.limit.encoder, row, self.shown)

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


@contextmanager
def rare_collections() -> Iterator[None]:
    """Python looks for circles of references after every 700 new objects; rows have none, and there are millions."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def has_oddities(row: Row) -> bool:
    """Whether a row looks misread or holds the text of a special token; True also where it takes a longer look."""
    for text in (row["prompt"], row["completion"]) if "completion" in row else (row.get("text"),):
        if not isinstance(text, str):
            return True  # conversations and pairs are looked through one by one
        if not text.isascii() and misread_sample((text,)):
            return True
        if ("<" in text or "[" in text) and SPECIAL.search(text):
            return True
    return False


def read_options(settings: PrepSettings) -> ReadOptions:
    """How the inputs are to be read."""
    columns = tuple(name.strip() for name in settings.columns.split(",")) if settings.columns else ()
    if len(set(columns)) < len(columns) or not all(columns):
        raise UserError(f"--columns {settings.columns}: names should differ, and none be empty", ExitCode.USAGE)
    return ReadOptions(
        format=settings.format,
        encoding=settings.encoding,
        delimiter=settings.delimiter,
        max_field_chars=settings.max_field_bytes,
        columns=columns,
        has_header=not settings.no_header,
        skip_lines=settings.skip_lines,
        has_quotes=settings.quoting == "standard",
        records=settings.records,
        documents=settings.documents or ("paragraph" if settings.turns else None),
    )


def digests_of(path: str) -> tuple[frozenset[bytes], frozenset[bytes]]:
    """(digests of the rows, digests of their questions) of a file of rows; what is no row has none."""
    rows, questions = set(), set()
    for _, row in read_rows(path):
        if any(key in row for key in ("messages", "prompt", "text")):
            rows.add(content_digest(row))
            questions.add(question_digest(row) or b"")
    if not rows:
        raise UserError(f"{path}: no training rows", ExitCode.DATA, hint="--against takes a file that prep has written")
    return frozenset(rows), frozenset(questions - {b""})


def token_limit(settings: PrepSettings) -> Any:
    """What counts tokens, if anything is to be counted or shown; libraries load here."""
    if not (settings.tokenizer or settings.show):
        return None
    from ftkit.core.encoding import Encoder
    from ftkit.core.token_lengths import TokenLimit
    from ftkit.io.base_model import find_base, load_tokenizer, say_default

    name = settings.tokenizer or "builtin:tiny"
    if not settings.tokenizer:
        say_default(name)
    template = load_template(settings.template) if settings.template else None
    is_chat = template is not None and template.kind == "chat"
    encoder = Encoder(load_tokenizer(find_base(name)), template if is_chat else None)
    return TokenLimit(encoder, settings.max_tokens, settings.overlength)


def check_request(settings: PrepSettings, inputs: list[str]) -> None:
    """Everything that can be refused before an input is read."""
    if settings.encoding:
        check_encoding(settings.encoding)
    if settings.delimiter:
        spelled_delimiter(settings.delimiter)
    if settings.sample:
        parse_sample(settings.sample)
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


def needs_template(message: str) -> UserError:
    """The error for a missing --template."""
    return UserError(
        message, ExitCode.USAGE, hint=f"--template NAME: {', '.join(shipped_names())}; or a .toml file of your own"
    )


def tell(notes: tuple[str, ...]) -> None:
    """Say what was found and chosen."""
    for note in notes:
        console.info(note)
