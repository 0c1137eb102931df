"""The rows of one input of `ftkit prep`: read, planned, rendered, and what is left out counted."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import orjson

from ftkit import console
from ftkit.commands.prep_output import Made
from ftkit.core.augmentation import Augment, augmenter
from ftkit.core.columns import LOOKED_AT_ROWS, NoAnswer
from ftkit.core.digest_set import DigestSet
from ftkit.core.mojibake import misread_sample
from ftkit.core.near_duplicates import NearDuplicates
from ftkit.core.row_filters import Condition, check_where, length_option, parse_where, texts_of
from ftkit.core.row_ledger import SHOWN_OF_A_KIND, Ledger
from ftkit.core.row_plan import Beginning, Plan, Row, make_plan
from ftkit.core.settings import PrepSettings
from ftkit.core.splitting import content_digest, question_digest
from ftkit.core.transcripts import parse_marks
from ftkit.errors import ExitCode, UserError
from ftkit.io.inputs import OpenInput, ReadOptions, open_input
from ftkit.io.jsonl import read_rows
from ftkit.io.nested import MISSING, look_up
from ftkit.io.tables import Fault, Record
from ftkit.io.template import Template
from ftkit.io.template_files import load_template, shipped_names
from ftkit.io.user_function import load_function

MOST_FAULTS_BEFORE_A_ROW = 10_000
SPECIAL = re.compile(r"<\|[a-z_0-9]+\|>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]")
"""What well-known tokenizers read as one of their special tokens."""


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
        from ftkit.commands.prep_show import show_row

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
