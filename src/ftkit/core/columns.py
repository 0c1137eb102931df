"""Which column fills which field of a template: by --map, by the usual names, or by looking at the first rows."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from typing import Any

import orjson

from ftkit.errors import ExitCode, UserError, did_you_mean
from ftkit.io.column_names import numbered, stand_ins
from ftkit.io.records import type_name

SHAPES: tuple[tuple[str, str, str | None], ...] = (  # question, answer and context as well-known data sets call them
    ("instruction", "output", "input"),
    ("instruction", "response", "context"),
    ("prompt", "completion", None),
    ("prompt", "response", None),
    ("question", "answer", None),
    ("input", "output", None),
)
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
LOOKED_AT_ROWS = 200
"""Rows that inference looks at, so that it works on a stream."""
MOST = 0.95
"""A column has a property if this share of its values has it."""
LONGEST_NAME_CHARS = 80
TAGGED = re.compile(r"(?:^|\s)(?:O|[BIES]-\S+)\s*$")
"""A line of CoNLL's form ends in a tag: O outside of names, B- where one begins, and so on."""
NOT_AN_ANSWER = {"nan", "null", "<na>"}
LONGEST_MISSING_CHARS = 8
"""What programs write for a missing value; any case."""


class BadValue(UserError):
    """A row that cannot be used: which field is wrong."""

    def __init__(self, where: str, field_name: str, reason: str, hint: str | None = None) -> None:
        super().__init__(f"{where}: {reason}", ExitCode.DATA, hint=hint)
        self.field = field_name


@dataclass(frozen=True)
class Pattern:
    """Text with `{column}` in it; `{{` and `}}` stand for braces."""

    text: str
    pieces: tuple[tuple[str, str | None], ...]
    """(literal text, column that follows it); the last column may be None."""

    @property
    def columns(self) -> list[str]:
        """The columns it names, in order."""
        return [column for _, column in self.pieces if column is not None]

    def fill(self, values: Mapping[str, Any], field_name: str, where: str) -> str:
        """The text with the values of one row; numbers are written as JSON writes them."""
        return "".join(
            literal if column is None else literal + written(values, column, field_name, where)
            for literal, column in self.pieces
        )


def columns_of(source: str | Pattern) -> list[str]:
    """The columns that a source reads."""
    return source.columns if isinstance(source, Pattern) else [source]


@dataclass(frozen=True)
class Wanted:
    """The fields that a template takes; question and answer are the two that inference can fill."""

    template: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    question: str | None = None

    @cached_property
    def answers(self) -> tuple[str, ...]:
        """The fields that are learned: required, and not the question."""
        return tuple(name for name in self.required if name != self.question)

    @property
    def answer(self) -> str | None:
        """The one answer of a question-and-answer template."""
        return self.answers[0] if self.question and len(self.answers) == 1 else None

    @property
    def fields(self) -> tuple[str, ...]:
        """Required, then optional."""
        return self.required + self.optional


@dataclass(frozen=True)
class Choice:
    """Where each field's text comes from: a column's name, or a pattern of several."""

    sources: Mapping[str, str | Pattern]
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Columns that inference did not use, and why."""
    inferred: frozenset[str] = frozenset()
    """Fields that nobody named."""
    since: str = ""
    """file:line of the first row it was made for."""
    without_place: tuple[str, str] | None = None
    """The context column of a well-known shape that the template has no field for, and how to map it."""

    @cached_property
    def needed(self) -> tuple[tuple[str, str], ...]:
        """(field, column) for every column that a row must have."""
        return tuple((name, column) for name, source in self.sources.items() for column in columns_of(source))

    def pattern_of(self, field_name: str | None) -> str | None:
        """The pattern that fills a field, as typed; None if a column or fixed text does."""
        source = self.sources.get(field_name) if field_name else None
        return source.text if isinstance(source, Pattern) and source.columns else None


class NoAnswer(BadValue):
    """A row whose answer is empty: nothing can be learned from it, and nothing is wrong with the rest of it."""


def parse_maps(maps: Sequence[str], fields: Sequence[str], template: str) -> dict[str, str]:
    """`output=description` items as field -> column or text; a usage error for what the template does not have."""
    parsed: dict[str, str] = {}
    for item in maps:
        name, equals, text = item.partition("=")
        name = name.strip()
        if not equals or not text:
            raise UserError(
                f"--map {item}: should be FIELD=COLUMN or FIELD=TEXT",
                ExitCode.USAGE,
                hint="for example --map output=description",
            )
        if name not in fields:
            hint = f"{did_you_mean(name, list(fields))}fields: {', '.join(fields)}"
            raise UserError(f"--map {item}: template {template} has no field '{name}'", ExitCode.USAGE, hint=hint)
        if name in parsed:
            raise UserError(f"--map fills '{name}' twice", ExitCode.USAGE, hint="give it once")
        parsed[name] = text
    return parsed


def parse_source(text: str, columns: Sequence[str], where: str) -> str | Pattern:
    """A column's name, text with {columns}, or fixed text (known by its spaces); an unknown column is a data error."""
    if text in columns:
        return text
    pieces: list[tuple[str, str | None]] = []
    literal, end = "", 0
    for found in PLACEHOLDER.finditer(text):
        literal += text[end : found.start()]
        end = found.end()
        if found[0] in ("{{", "}}"):
            literal += found[0][0]
            continue
        if found[1] not in columns:
            raise no_column(found[1], columns, where)
        pieces.append((literal, found[1]))
        literal = ""
    pieces.append((literal + text[end:], None))
    if len(pieces) == 1 and (" " not in text.strip() or did_you_mean(text, list(columns))):
        raise no_column(text, columns, where)
    return Pattern(text, tuple(pieces))


def no_column(name: str, columns: Sequence[str], where: str) -> UserError:
    """The error for a column that the input does not have."""
    return UserError(
        f"{where}: no column '{name}'",
        ExitCode.DATA,
        hint=f"{did_you_mean(name, list(columns))}columns: {', '.join(columns)}",
    )


def choose_columns(
    wanted: Wanted,
    columns: Sequence[str],
    sample: Sequence[Mapping[str, Any]],
    maps: Mapping[str, str],
    where: str,
    *,
    is_table: bool = True,
) -> Choice:
    """Fill the fields: first by `maps`, then by name, then by the usual names, last by looking at the sample.

    `sample` are the first rows; later ones may have more columns, unless it is a table: optional fields are looked for
    in every row. A template that cannot be filled is a data error that names what is needed and there.
    """
    mapped = {name: parse_source(text, columns, where) for name, text in maps.items()}
    named = {name: name for name in wanted.fields if name in columns or (name in wanted.optional and not is_table)}
    sources = {**named, **mapped}
    if all(name in sources for name in wanted.required):
        return Choice(sources)
    if not mapped and (shape := usual_names(wanted, columns, is_table=is_table)):
        return shape
    if is_table:
        refuse_data_as_header(columns, sample, where, wanted)
    unknown = [name for name in wanted.required if name not in mapped]
    can_infer = wanted.answer is not None and not any(name in named and name not in mapped for name in wanted.required)
    if can_infer and set(unknown) <= {wanted.question, wanted.answer}:
        return infer(wanted, columns, sample, mapped, where)
    raise cannot_fill(wanted, columns, sample, where)


def usual_names(wanted: Wanted, columns: Sequence[str], *, is_table: bool) -> Choice | None:
    """The fields of a question-and-answer template from columns that other data sets use; None if there are none.

    The context is looked for in every row. Without a field for it, a row that has one is a data error: nothing is left
    out in silence.
    """
    if wanted.answer is None or wanted.question is None:
        return None
    for question, answer, context in SHAPES:
        if question not in columns or answer not in columns:
            continue
        sources: dict[str, str | Pattern] = {wanted.question: question, wanted.answer: answer}
        if context is None or (is_table and context not in columns):
            return Choice(sources)
        if "input" in wanted.optional:
            return Choice(sources | {"input": context})
        hint = f'--map {wanted.question}="{{{question}}} {{{context}}}" --map {wanted.answer}={answer}'
        return Choice(sources, without_place=(context, hint))
    return None


def cannot_fill(wanted: Wanted, columns: Sequence[str], sample: Sequence[Mapping[str, Any]], where: str) -> UserError:
    """The error for a template whose fields the columns do not fill, with an example of what to type."""
    needs, has = " and ".join(wanted.required), ", ".join(columns)
    missing = [name for name in wanted.required if name not in columns]
    readable = [name for name in columns if all(is_text_or_number(row.get(name, "")) for row in sample)]
    if "messages" in columns or "conversations" in columns:
        hint = "conversations take a chat template: --template chatml"
    elif len(sample) == 1 and (lists := [name for name in columns if holds_records(sample[0].get(name))]):
        hint = f"to take the list under a key: --records {shell_word(lists[0])}"
    elif not readable:
        inside = next((path for name in columns for path in texts_inside(sample[0].get(name), name)), None)
        one = f"; a text inside: --map {missing[0]}={shell_word(inside)}" if inside else ""
        hint = f"no column holds text; make rows with a function of yours: --augment FILE.py:function{one}"
    elif len(columns) == 1:
        hint = f"plain text: --template text --map text={shell_word(columns[0])}"
    else:
        texts = [name for name in readable if is_free_text([str(row.get(name)) for row in sample])]
        usable = [name for name in dict.fromkeys([*texts, *readable]) if name not in wanted.required] or ["COLUMN"]
        pairs = zip(missing, usable + usable[-1:] * len(missing), strict=False)
        hint = "for example " + " ".join(f"--map {name}={shell_word(column)}" for name, column in pairs)
    return UserError(
        f"{where}: template {wanted.template} needs {needs}; the rows have {has}", ExitCode.DATA, hint=hint
    )


def holds_records(value: Any) -> bool:
    """True for a list of objects."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, Mapping) for each in value)


def texts_inside(value: Any, path: str) -> Iterator[str]:
    """The dotted paths of the texts in a JSON value that lies at a path."""
    if isinstance(value, str):
        yield path
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        yield from texts_inside(part, f"{path}.{name}")


def refuse_data_as_header(
    columns: Sequence[str], sample: Sequence[Mapping[str, Any]], where: str, wanted: Wanted | None = None
) -> None:
    """A data error where columns should be chosen and the header reads like a row: numbers, sentences, long text, tags.

    `wanted` are the fields to name the columns by, where there are as many.
    """
    if list(columns) == numbered(columns):
        return  # names that --no-header gave
    last = [columns[-1], *(text for row in sample if (text := str(row.get(columns[-1]) or "")).strip())]
    if len(last) > 1 and all(map(TAGGED.search, last)):  # a line between sentences may hold a tab and no tag
        raise UserError(
            f"{where}: words with their tags, not a table with column names",
            ExitCode.DATA,
            hint="take each sentence as one text, and make rows of it with a function of yours: "
            "--documents paragraph --augment FILE.py:function",
        )
    for name in columns:
        if len(name) > LONGEST_NAME_CHARS or re.fullmatch(r"[\d.,+-]+|.*[.!?。！？]", name, re.DOTALL):
            names = names_for(columns, sample, wanted)
            text = "if it is plain text: --documents paragraph (or line, file); " if len(columns) == 1 else ""
            raise UserError(
                f"{where}: the first line reads like data, not like column names: {name[:LONGEST_NAME_CHARS]!r}",
                ExitCode.DATA,
                hint=f"{text}if the table has no line of column names, name them: --columns {names}; otherwise --map",
            )


def names_for(columns: Sequence[str], sample: Sequence[Mapping[str, Any]], wanted: Wanted | None) -> str:
    """What to give --columns for a table without a header: the fields of a template if there are as many."""
    if wanted is None or len(wanted.required) != len(columns):
        return stand_ins(len(columns))
    lengths = [mean_length([str(row.get(name)) for row in sample]) for name in columns]
    is_turned = wanted.required[-1] == "label" and lengths[0] < lengths[-1]
    return ",".join(reversed(wanted.required) if is_turned else wanted.required)


def shell_word(text: str) -> str:
    """Text as one word of a shell command."""
    import shlex

    return shlex.quote(text)


def infer(
    wanted: Wanted,
    columns: Sequence[str],
    sample: Sequence[Mapping[str, Any]],
    mapped: Mapping[str, str | Pattern],
    where: str,
) -> Choice:
    """Answer: the longest free text. Question: one sentence that names the answer and lists the other columns.

    Columns whose values repeat those of others are left out first. What `mapped` already fills stays.
    """
    question, answer = wanted.question or "", wanted.answer or ""
    texts, left_out = text_columns(columns, sample)
    left_out |= repeating_columns(texts)
    texts = {name: values for name, values in texts.items() if name not in left_out}
    sources: dict[str, str | Pattern] = dict(mapped)
    used = {name for source in mapped.values() for name in columns_of(source)}
    if answer not in sources:
        free = {
            name: mean_length(values) for name, values in texts.items() if name not in used and is_free_text(values)
        }
        if not free:
            raise cannot_fill(wanted, columns, sample, where)
        sources[answer] = max(free, key=lambda name: free[name])
        used.add(str(sources[answer]))
    if question not in sources:
        rest = [name for name in texts if name not in used]
        if not rest:
            raise cannot_fill(wanted, columns, sample, where)
        called = sources[answer] if isinstance(sources[answer], str) else answer
        text = f"Write the {called}. " + "; ".join(f"{name}: {{{name}}}" for name in rest)
        sources[question] = parse_source(text, columns, where)
    not_left_out = {name for source in sources.values() for name in columns_of(source)}
    left_out = {name: why for name, why in left_out.items() if name not in not_left_out}
    return Choice(sources, left_out, frozenset(name for name in (question, answer) if name not in mapped))


def text_columns(
    columns: Sequence[str], sample: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The columns that hold text or numbers in every row, with their values; the others, and why not."""
    texts: dict[str, list[str]] = {}
    left_out: dict[str, str] = {}
    for name in columns:
        values = [row.get(name) for row in sample]
        if "{" in name or "}" in name or re.fullmatch(r"column \d+", name):
            left_out[name] = "it has no usable name"
        elif any(value is None for value in values):
            left_out[name] = "some rows have no value"
        elif not all(map(is_text_or_number, values)):
            left_out[name] = "its values are no text"
        else:
            texts[name] = [value if isinstance(value, str) else orjson.dumps(value).decode() for value in values]
    return texts, left_out


def is_text_or_number(value: Any) -> bool:
    """True for what a field can be filled with."""
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def repeating_columns(texts: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Columns that mostly consist of the values of others (Red Dot's `text`), and which others; longest first."""
    left_out: dict[str, str] = {}
    places = list(texts)
    for name in sorted(texts, key=lambda name: (-mean_length(texts[name]), -places.index(name))):
        others = {other: values for other, values in texts.items() if other != name and other not in left_out}
        if others and all_but_few(
            mostly_made_of(value, [values[row] for values in others.values()]) for row, value in enumerate(texts[name])
        ):
            repeated = [
                other
                for other, values in others.items()
                if all_but_few(v in value for v, value in zip(values, texts[name], strict=True))
            ]
            left_out[name] = f"it repeats {', '.join(repeated)}"
    return left_out


def mostly_made_of(value: str, others: Sequence[str]) -> bool:
    """True if more than half of a text is copied from whole values of other columns."""
    rest = value
    for other in sorted(others, key=len, reverse=True):
        if other.strip():
            rest = rest.replace(other, "", 1)
    return len(rest) < len(value) / 2


def all_but_few(holds: Any) -> bool:
    """True if at least MOST of the values of an iterable are true, and there are any."""
    seen = list(holds)
    return bool(seen) and sum(seen) >= MOST * len(seen)


def mean_length(values: Sequence[str]) -> float:
    """In characters."""
    return sum(map(len, values)) / max(1, len(values))


def is_free_text(values: Sequence[str]) -> bool:
    """True if most values are words with spaces between (or a script that needs none), and they differ."""
    filled = [value for value in values if value.strip()]
    differ = len(values) == 1 or len(set(filled)) > 1
    return differ and sum(map(reads_like_text, filled)) > len(values) / 2


def reads_like_text(value: str) -> bool:
    """Two words of letters, or a letter of a script without spaces."""
    words = re.findall(r"[^\W\d_]+", value)
    return (len(words) >= 2 and " " in value) or any(ord(letter) > 0x2E80 for word in words for letter in word)


def is_filled(value: Any) -> bool:
    """True for anything but nothing and blank text."""
    return value is not None and value != [] and not (isinstance(value, str) and not value.strip())


def fill_fields(values: Mapping[str, Any], choice: Choice, wanted: Wanted, where: str) -> dict[str, str]:
    """The text of every field for one row; a BadValue for a missing, empty or non-text one."""
    for name, column in choice.needed:
        if column not in values and name not in wanted.optional:
            raise other_shape(values, column, name, choice.since, where)
    if choice.without_place and is_filled(values.get(choice.without_place[0])):
        context, hint = choice.without_place
        raise BadValue(where, context, f"template {wanted.template} has no field for the column '{context}'", hint)
    filled = {}
    for name in wanted.fields:
        source = choice.sources.get(name)
        if source is None:
            continue
        if isinstance(source, Pattern):
            text = source.fill(values, name, where)
        elif name in wanted.optional and values.get(source) is None:
            text = ""
        else:
            text = cell_text(values, source, name, where)
        if name in wanted.required:
            check_text(text, source, name, wanted, where)
        filled[name] = text
    return filled


def quick_sources(choice: Choice, wanted: Wanted) -> dict[str, str]:
    """`fill_fields` as expressions of `record`, for `builder`."""
    sources = {
        name: quick_source(choice.sources[name], is_optional=name in wanted.optional)
        for name in wanted.fields
        if name in choice.sources
    }
    return {**dict.fromkeys(wanted.optional, "''"), **sources}


def quick_source(source: str | Pattern, *, is_optional: bool) -> str:
    """A field's text as an expression of `record`; it raises a TypeError where a value is no text."""
    if isinstance(source, str):
        text = f"(record[{source!r}] + '')"
        return f"('' if record.get({source!r}) is None else {text})" if is_optional else text
    pieces = [repr(text) + (f", record[{column!r}]" if column is not None else "") for text, column in source.pieces]
    return f"''.join(({', '.join(pieces)},))"


def quick_condition(choice: Choice, wanted: Wanted) -> str:
    """What holds for `fields` and `record` that nothing is wrong with; a short answer may be `nan` or `null`."""
    filled = [f"fields[{name!r}] and not fields[{name!r}].isspace()" for name in wanted.required]
    long = [f"fields[{name!r}][{LONGEST_MISSING_CHARS}:]" for name in wanted.answers]
    placed = [f"record.get({choice.without_place[0]!r}) in (None, '')"] if choice.without_place else []
    return " and ".join([*filled, *long, *placed]) or "True"


def check_text(text: str, source: str | Pattern, name: str, wanted: Wanted, where: str) -> None:
    """A required field may not be blank, and an answer may not be what programs write for a missing one."""
    shown = f" ('{source}' is empty)" if isinstance(source, str) else ""
    is_answer = name in wanted.answers
    if not text.strip():
        if is_answer:
            raise NoAnswer(where, name, f"no answer, nothing to learn{shown}", "fill it in, or choose another column")
        raise BadValue(where, name, f"no {name}{shown}", "fill it in, or leave such rows out: --on-error skip")
    if is_answer and is_missing(text):
        raise missing_answer(text, where, name)


def is_missing(answer: str) -> bool:
    """True for what programs write where they have no answer."""
    return len(answer) <= LONGEST_MISSING_CHARS and answer.strip().lower() in NOT_AN_ANSWER


def missing_answer(answer: str, where: str, name: str, part: str = "") -> BadValue:
    """The error for such an answer."""
    reason = f"{part}the answer is {answer.strip()!r}, a missing value"
    return BadValue(where, name, reason, "fill it in, or leave such rows out: --on-error skip")


def cell_text(values: Mapping[str, Any], column: str, field_name: str, where: str) -> str:
    """The text in a column of a row."""
    value = values.get(column)
    if isinstance(value, str):
        return value
    if value is None:
        raise BadValue(where, field_name, f"'{column}' is null", "fill it in, or leave such rows out: --on-error skip")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    hint = (
        f'to write numbers as text: --map {field_name}="{{{column}}}"'
        if is_number
        else "fill the field with text: --map FIELD=COLUMN"
    )
    raise BadValue(where, field_name, f"'{column}' is {type_name(value)}, should be text", hint)


def written(values: Mapping[str, Any], column: str, field_name: str, where: str) -> str:
    """A value inside a pattern: text as it is, numbers as JSON writes them."""
    value = values.get(column)
    if isinstance(value, float) and not isfinite(value):
        hint = "fill it in, or leave such rows out: --on-error skip"
        raise BadValue(where, field_name, f"'{column}' is {value}, no number that can be written", hint)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return orjson.dumps(value).decode()
    return cell_text(values, column, field_name, where)


def other_shape(values: Mapping[str, Any], column: str, field_name: str, since: str, where: str) -> BadValue:
    """The error for a row without a column that the first rows have."""
    reason = f"has no '{column}' (it has {', '.join(values) or 'nothing'}), as the rows from {since} on do"
    return BadValue(
        where, field_name, reason, "rows of one file should have the same keys; prepare the others on their own"
    )
