"""The rows of one input of `ftkit prep`: read, planned, made, and what is left out counted."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from ftkit import console
from ftkit.core.augmentation import augmenter
from ftkit.core.columns import LOOKED_AT_ROWS, NoAnswer, refuse_data_as_header
from ftkit.core.near_duplicates import NearDuplicates, Sketcher
from ftkit.core.prep_settings import PrepSettings
from ftkit.core.row_filters import parse_where
from ftkit.core.row_ledger import SHOWN_OF_A_KIND, Ledger
from ftkit.core.row_making import Choosing, LeftOut, Made, Noticed, Outcome, Rejected, RowMaker
from ftkit.core.row_plan import Beginning, Plan, Row, is_evident, make_plan
from ftkit.core.row_runs import Run, Together, unseen
from ftkit.core.sharding import parse_shard
from ftkit.core.splitting import content_digest, question_digest
from ftkit.core.transcripts import parse_marks
from ftkit.errors import ExitCode, UserError
from ftkit.io.inputs import OpenInput, ReadOptions, open_input
from ftkit.io.jsonl import read_rows
from ftkit.io.tables import Fault, Record
from ftkit.io.template import Template
from ftkit.io.template_files import load_template, shipped_names
from ftkit.io.user_function import load_function

if TYPE_CHECKING:
    from ftkit.core.encoding import Encoder
    from ftkit.core.token_lengths import TokenLimit

MOST_FAULTS_BEFORE_A_ROW = 10_000


@dataclass
class Preparation:
    """The state of one call of prep while its inputs pass through."""

    settings: PrepSettings
    template: Template | None
    ledger: Ledger
    write_reject: Callable[[Row], Any] | None
    is_weighted: bool = False
    """True where rows of several inputs are mixed."""
    first: tuple[Plan, str] | None = None
    """The first input's plan and where it began."""
    seen: set[bytes] = field(default_factory=set)
    """Digests of the rows so far, about 100 bytes each; none with --dedupe none."""
    shown: int = 0

    def __post_init__(self) -> None:
        settings = self.settings
        self.marks = parse_marks(settings.turns) if settings.turns else None
        self.near = NearDuplicates(settings.near) if settings.dedupe == "near" else None
        self.sketcher = Sketcher() if self.near else None
        self.choosing = Choosing(
            parse_where(settings.where) if settings.where else None,
            augmenter(load_function(settings.augment, "--augment"), settings.augment) if settings.augment else None,
        )
        self.seen_elsewhere = digests_of(settings.against) if settings.against else (frozenset(), frozenset())
        self.encoder = row_encoder(settings) if settings.tokenizer or settings.show else None
        self.limit = token_limit(settings, self.encoder)
        self.shard = parse_shard(settings.shard) if settings.shard else None

    def rows(self, source: str) -> Iterator[Made | Together]:
        """All rows of one input that are not left out."""
        with open_input(source, read_options(self.settings)) as opened:
            tell(opened.notes)
            first, sample = self.read_first(opened)
            plan = self.plan(opened, sample) if sample else None  # without a record there is nothing to plan for
            asked, ledger = self.settings, self.ledger
            maker = RowMaker(opened.name, plan, self.choosing, self.limit, asked, ledger, self.shard, self.sketcher)
            yield from self.settled(maker.outcomes(first), opened.name)
            if self.settings.jobs == 1:
                outcomes: Iterable[Outcome | Run] = maker.outcomes(opened.records)
            else:
                if opened.rest is None:
                    console.info(f"{opened.name}: one process reads it, --jobs {self.settings.jobs} make the rows")
                from ftkit.commands.prep_jobs import outcomes_of_processes  # a tenth of the time to the first row

                outcomes = outcomes_of_processes(maker, opened.pieces(), self.settings.jobs)
            yield from self.settled(outcomes, opened.name)

    def read_first(self, opened: OpenInput) -> tuple[list[Record | Fault], list[Record]]:
        """The first items of an input, and the records among them to choose columns by.

        One record is enough where it speaks for itself, so that the rows of a slow program come as they are made.
        """
        items: list[Record | Fault] = []
        sample: list[Record] = []
        for item in opened.records:
            items.append(item)
            found = [record for record, _ in self.choosing.records(item, opened.name) if isinstance(record, Record)]
            sample += found
            if len(sample) >= LOOKED_AT_ROWS or (self.settings.on_error == "stop" and isinstance(item, Fault)):
                break
            is_first = len(sample) == len(found) > 0
            if is_first and (self.marks or is_evident(sample[0].values, self.template, self.settings.map)):
                break
            if isinstance(item, Fault) and not sample and len(items) == MOST_FAULTS_BEFORE_A_ROW:
                raise UserError(
                    f"{item.error.message}; no row up to here can be read", item.error.exit_code, hint=item.error.hint
                )
        return items, sample

    def plan(self, opened: OpenInput, sample: list[Record]) -> Plan:
        """The plan for an input; all inputs must give the same kind of rows."""
        columns = list(dict.fromkeys(name for record in sample for name in record.values))
        is_table = opened.format in ("csv", "parquet")
        records, is_text = [record.values for record in sample], opened.format == "text"
        beginning = Beginning(opened.name, sample[0].line, columns, records, is_table, is_text)
        if self.settings.map and self.template is None:
            raise needs_template("--map fills the fields of a template, and none is given")
        plan = make_plan(beginning, self.template, self.settings.map, self.marks)
        if plan is None:
            if opened.format == "csv":
                refuse_data_as_header(columns, beginning.sample, opened.name)
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

    def settled(self, outcomes: Iterable[Outcome | Run], name: str) -> Iterator[Made | Together]:
        """The rows that are new; everything else is counted where it goes.

        A row without an answer is always left out and said; any other fault stops, unless --on-error is skip.
        """
        ledger, seen = self.ledger, self.seen
        goes_by_row = self.goes_by_row
        needs_look = self.near is not None or self.settings.show
        keeps_all = self.settings.dedupe == "none"
        outcome: Any
        for outcome in outcomes:
            if type(outcome) is not tuple:
                if type(outcome) is not Run:
                    self.leave_out(outcome, name)
                elif goes_by_row:
                    yield from self.settled(outcome.rows(), name)
                else:
                    yield self.together(outcome)
            elif outcome[1] in seen:
                ledger.duplicates += 1
            else:
                if not keeps_all:
                    seen.add(outcome[1])
                if not needs_look:
                    yield outcome
                elif self.is_new_and_shown(outcome):
                    yield outcome[0], outcome[1], outcome[2] and outcome[2]._replace(sketch=None)

    @property
    def goes_by_row(self) -> bool:
        """True if somebody looks at rows one by one."""
        asked = self.settings
        moved = asked.sample or asked.shuffle or asked.split or self.is_weighted
        return bool(moved or asked.show or asked.stats or asked.against or self.near)

    def together(self, run: Run) -> Together:
        """The rows of a run that are new; the others are counted."""
        if self.settings.dedupe == "none":
            return Together(run.lines, len(run.ends))
        new = unseen(run, self.seen)
        self.ledger.duplicates += len(run.ends) - new.count
        return new

    def leave_out(self, outcome: LeftOut | Rejected | Noticed, name: str) -> None:
        """Count what is not a row."""
        ledger = self.ledger
        if isinstance(outcome, LeftOut):
            ledger.filtered[outcome.option] += 1
        elif isinstance(outcome, Noticed):
            ledger.notice(outcome.what, outcome.example)
        elif self.settings.on_error == "stop" and not isinstance(outcome.error, NoAnswer):
            raise outcome.error
        else:
            self.reject(outcome, name)

    def is_new_and_shown(self, made: Made) -> bool:
        """False, and counted, for a row that is near to an earlier one; one of the first is shown."""
        line, _, about = made
        if self.near is not None and about and about.sketch and not self.near.is_new(about.sketch, about.place):
            self.ledger.duplicates += 1
            self.ledger.near_duplicates += 1
            return False
        if self.encoder is not None and self.shown < self.settings.show:
            self.show(orjson.loads(line))
        return True

    def show(self, row: Row) -> None:
        """One of the first rows as the model will see it."""
        from ftkit.commands.prep_show import show_row

        self.shown += 1
        try:
            show_row(self.encoder, row, self.shown)  # type: ignore[arg-type]
        except UserError as error:
            if self.settings.on_error == "stop":
                raise
            console.warn(f"row {self.shown} cannot be shown: {error.message}")

    def reject(self, rejected: Rejected, name: str) -> None:
        """Count a bad row, say so (the first of a kind), and write it to the rejects."""
        line, error, content = rejected
        reason = without_place(error.message, name)
        kind = re.sub(r"\d[\d,]*", "N", reason)
        self.ledger.rejected += 1
        self.ledger.reasons[kind] += 1
        if self.ledger.reasons[kind] <= SHOWN_OF_A_KIND:
            self.ledger.lines.setdefault(kind, []).append(line)
            console.warn(f"left out: {error.message}")
        if self.write_reject is not None:
            about = {"file": name, "line": line, "field": getattr(error, "field", None), "reason": reason}
            self.write_reject({**about, "row": content})


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


def row_encoder(settings: PrepSettings) -> "Encoder":
    """What makes tokens of rows; libraries load here."""
    from ftkit.core.encoding import Encoder
    from ftkit.io.base_model import find_base, load_tokenizer, say_default

    name = settings.tokenizer or "builtin:tiny"
    if not settings.tokenizer:
        say_default(name)
    template = load_template(settings.template) if settings.template else None
    is_chat = template is not None and template.kind == "chat"
    return Encoder(load_tokenizer(find_base(name)), template if is_chat else None)


def token_limit(settings: PrepSettings, encoder: "Encoder | None") -> "TokenLimit | None":
    """What counts the tokens of every row; None where nobody asks, or a few rows are to be shown and no more."""
    if encoder is None or (
        settings.show and settings.max_tokens is None and not (settings.tokenizer and settings.stats)
    ):
        return None
    from ftkit.core.token_lengths import TokenLimit

    return TokenLimit(encoder, settings.max_tokens, settings.overlength)


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
