"""What becomes of a record, whatever came before it: a row as the line that is written, or why there is none.

Nothing here depends on other records, so several processes can do it, each for a part of an input.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from orjson import dumps

from ftkit.core.augmentation import Augment
from ftkit.core.mojibake import misread_sample
from ftkit.core.prep_settings import PrepSettings
from ftkit.core.row_filters import Condition, check_where, length_option, texts_of
from ftkit.core.row_ledger import Ledger
from ftkit.core.row_plan import CARRIED, Plan, Row
from ftkit.core.sharding import Shard
from ftkit.core.splitting import content_of, lasting_digest, quick_digest
from ftkit.errors import ExitCode, UserError
from ftkit.io.nested import MISSING, look_up
from ftkit.io.tables import Fault, Record

if TYPE_CHECKING:
    from ftkit.core.near_duplicates import Sketcher
    from ftkit.core.token_lengths import TokenLimit

SPECIAL = re.compile(r"<\|[a-z_0-9]+\|>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]")
"""What well-known tokenizers read as one of their special tokens."""
LESS, BRACKET = b"<]"
"""As numbers: a byte is found in half the time of bytes."""


class About(NamedTuple):
    """What some requests want to know of a row: file:line, the value that a split keeps even, tokens."""

    place: str
    stratum: str | None
    tokens: int | None
    sketch: bytes | None
    """What --dedupe near compares."""


Made = tuple[bytes, bytes, About | None]
"""A row: its line, the digest of its content, and what was asked about it. A bare tuple: there are millions."""


class LeftOut(NamedTuple):
    """A record that an option leaves out."""

    option: str


class Rejected(NamedTuple):
    """A record that no row can be made of; its values, or its text where it cannot be read."""

    line: int
    error: UserError
    content: Any


class Noticed(NamedTuple):
    """A row looks misread, or holds the text of a special token: where, and which."""

    what: Literal["misread", "special"]
    example: str


Outcome = Made | LeftOut | Rejected | Noticed


@dataclass(frozen=True)
class Choosing:
    """Which records rows are made of: those that --where wants, through --augment."""

    condition: tuple[Condition, frozenset[str]] | None
    augment: Augment | None

    def records(self, item: Record | Fault, name: str) -> Iterator[tuple[Record | Fault | LeftOut, bool]]:
        """The records that one becomes, and whether each was made or changed."""
        if not isinstance(item, Record) or not (self.condition or self.augment):
            yield item, False
            return
        place = f"{name}:{item.line}"
        try:
            if self.condition:
                holds, names = self.condition
                check_where(names, list(item.values), place)
                if not holds(item.values, place):
                    yield LeftOut("--where"), False
                    return
            found = self.augment(item.values, place) if self.augment else [(item.values, False)]
        except UserError as error:
            yield Fault(item.line, error, dumps(item.values, default=str).decode()), False
            return
        yield from ((Record(item.line, values), is_made) for values, is_made in found)
        if not found:
            yield LeftOut("--augment"), False


@dataclass(frozen=True)
class RowMaker:
    """Makes the rows of one input; counts in the ledger what can be added up in any order."""

    name: str
    plan: Plan | None
    """None where no record could be read."""
    choosing: Choosing
    limit: "TokenLimit | None"
    settings: PrepSettings
    ledger: Ledger
    shard: Shard | None = None
    sketcher: "Sketcher | None" = None

    def outcomes(self, items: Iterable[Record | Fault]) -> Iterator[Outcome]:
        """What becomes of records, in order; those of other shards are passed over, and not counted."""
        items = filter(self.shard.holds, items) if self.shard else items
        if self.can_hurry and self.plan is not None and self.plan.quick is not None:
            return self.quick_outcomes(items, self.plan)
        return chain.from_iterable(map(self.outcomes_of, items))

    @property
    def digest(self) -> Callable[[bytes], bytes]:
        """What makes 16 bytes of a row's content: lasting ones where they decide its part, or meet those of other files."""
        return lasting_digest if self.settings.split or self.settings.against else quick_digest

    @property
    def is_asked_about(self) -> bool:
        """True if anybody wants to know more of a row than its line and digest."""
        return self.settings.stats or self.settings.stratify is not None or self.sketcher is not None

    @property
    def can_hurry(self) -> bool:
        """True if nothing but oddities is looked for in a row."""
        asked = self.settings
        asks_more = (self.choosing.condition, self.choosing.augment, self.limit, asked.stratify)
        lengths = (asked.min_chars, asked.max_chars)
        return all(each is None for each in (*asks_more, *lengths, self.sketcher))

    def quick_outcomes(self, items: Iterable[Record | Fault], plan: Plan) -> Iterator[Outcome]:
        """What `outcomes_of` gives; it is asked for every record that is not plainly good."""
        ledger, quick, digest = self.ledger, plan.quick, self.digest
        behind = line_of(b"", {} if self.settings.plain else plan.carried)
        for item in items:
            row = quick(item.values) if type(item) is Record else None  # type: ignore[misc]
            if row is not None:
                content = dumps(row)[:-1]  # what content_of gives
                if is_plain(content) or not has_oddities(row):
                    ledger.rows_in += 1
                    yield content + behind, digest(content), None
                    continue
            yield from self.outcomes_of(item)

    def outcomes_of(self, item: Record | Fault) -> Iterator[Outcome]:
        """What becomes of one record."""
        self.ledger.rows_in += 1
        made = -1
        for record, is_made in self.choosing.records(item, self.name):
            made += 1
            if isinstance(record, LeftOut):
                yield record
                continue
            try:
                if isinstance(record, Fault):
                    raise record.error
                yield from self.row_of(record, is_made=is_made)
            except UserError as error:
                content = record.values if isinstance(record, Record) else record.raw
                yield Rejected(record.line, error, content)
        self.ledger.made += made

    def row_of(self, record: Record, *, is_made: bool) -> Iterator[Outcome]:
        """The row of one record, unless it is too short or too long, and what is odd about it."""
        place = f"{self.name}:{record.line}"
        row = self.plan.make(record.values, place)  # type: ignore[union-attr]
        if is_made:
            row["meta"] = {"made_by": (self.settings.augment or "").rpartition("/")[2]}
        content = content_of(row)
        if not is_plain(content):
            for odd in oddities(row, place):
                if odd.what == "special" and self.settings.special_tokens == "reject":
                    raise special_text(odd.example)
                yield odd
        if option := length_option(row, self.settings.min_chars, self.settings.max_chars):
            yield LeftOut(option)
            return
        tokens = None
        if self.limit is not None:
            fitted = self.limit.fit(row, place)
            tokens = fitted.tokens
            self.ledger.lost_tokens += fitted.lost_tokens
            self.ledger.truncated += fitted.was_cut
            if fitted.error is not None:
                self.ledger.too_long += 1
                raise fitted.error
            if fitted.row is None:
                yield LeftOut("--max-tokens")
                return
            if fitted.was_cut:
                row, content = fitted.row, content_of(fitted.row)
        about = self.about(record, row, place, tokens) if self.is_asked_about else None
        carried = {} if self.settings.plain else {key: row[key] for key in CARRIED if key in row}
        yield line_of(content, carried), self.digest(content), about

    def about(self, record: Record, row: Row, place: str, tokens: int | None) -> About:
        """What is asked about a row."""
        sketch = self.sketcher.sketch(texts_of(row)) if self.sketcher else None
        return About(place, stratum_of(self.settings.stratify, record, row, place), tokens, sketch)


def line_of(content: bytes, carried: Mapping[str, Any]) -> bytes:
    """A row's line: its content, then what travels along."""
    return content + (b"," + dumps(carried)[1:] if carried else b"}") + b"\n"


def is_plain(content: bytes) -> bool:
    """True where nothing can be odd about a row; False where a longer look is needed."""
    return content.isascii() and LESS not in content and (BRACKET not in content or b"INST]" not in content)


def stratum_of(name: str | None, record: Record, row: Row, place: str) -> str | None:
    """The value that --stratify keeps even, in the record or in the row made of it."""
    if name is None:
        return None
    value = look_up(record.values, name)
    value = look_up(row, name) if value is MISSING else value
    if value is MISSING:
        raise UserError(
            f"{place}: no column '{name}' for --stratify", ExitCode.DATA, hint=f"columns: {', '.join(record.values)}"
        )
    return str(value)


def has_oddities(row: Mapping[str, Any]) -> bool:
    """Whether a row looks misread or holds the text of a special token."""
    return any(True for _ in oddities(row, ""))


def special_text(example: str) -> UserError:
    """The error for a row with the text of a special token, `file:line: text`."""
    place, _, found = example.rpartition(": ")
    hint = "mend the row, or leave such rows out: --on-error skip; --special-tokens keep trains it as plain text"
    return UserError(f"{place}: holds {found}, the text of a special token", ExitCode.DATA, hint=hint)


def oddities(row: Mapping[str, Any], place: str) -> Iterator[Noticed]:
    """What is odd about a row: the first text that looks misread, the first special token."""
    texts = list(texts_of(row))
    if example := misread_sample(texts):
        yield Noticed("misread", f"{place}: {example}")
    found = next((token for text in texts if ("<" in text or "[" in text) and (token := SPECIAL.search(text))), None)
    if found:
        yield Noticed("special", f"{place}: {found[0]}")
