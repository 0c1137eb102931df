"""How the records of one input become training rows: decided once from its first records, then applied to each."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ftkit.core.columns import (
    Choice,
    NoAnswer,
    Pattern,
    Wanted,
    choose_columns,
    fill_fields,
    is_missing,
    missing_answer,
    other_shape,
    parse_maps,
    quick_condition,
    quick_sources,
)
from ftkit.core.one_kind import OneKind
from ftkit.core.preferences import CONVERSATIONS, holds_preferences, preference_row, to_dialogue
from ftkit.core.sharegpt import parse_tools, refuse_tools, to_messages
from ftkit.core.transcripts import Marks, find_marks, split_turns
from ftkit.errors import ExitCode, UserError
from ftkit.io.nested import dotted_names, with_nested
from ftkit.io.plain_template import builder
from ftkit.io.records import Kind, check_row
from ftkit.io.template import Template

ALL_KINDS: tuple[Kind, ...] = ("prompt_completion", "messages", "text", "classification", "preference")
TEXT_NAMES = ("text", "sentence", "review", "comment", "content", "tweet", "utterance")
LABEL_NAMES = ("label", "category", "class", "intent", "sentiment", "target")
Row = dict[str, Any]
CHAT_FIELDS = ("user", "assistant", "system", "messages")
CARRIED = ("template", "pattern", "meta", "weight")
"""Keys that an earlier prep has put into rows, and what a row counts in training."""


@dataclass(frozen=True)
class Plan:
    """`make(values, where)` turns one record into a row of `kind`, or raises a UserError at `where`."""

    kind: Kind
    make: Callable[[Mapping[str, Any], str], Row]
    notes: tuple[str, ...] = field(default=())
    """What was chosen that nobody asked for."""
    quick: Callable[[Mapping[str, Any]], Row | None] | None = None
    """The same rows faster, without `carried`; None for a record, or as a whole, where only `make` will do."""
    carried: Mapping[str, str] = field(default_factory=dict)
    """What `make` puts behind the content of every row."""


@dataclass(frozen=True)
class Beginning:
    """What a plan is made from: the columns and first records of an input."""

    name: str
    first_line: int
    columns: Sequence[str]
    sample: Sequence[Mapping[str, Any]]
    is_table: bool = True
    """False where later records may have columns that these do not have."""
    is_plain_text: bool = False
    """True for documents of a text, in which nothing stands for a missing value."""

    @property
    def since(self) -> str:
        """file:line of the first record."""
        return f"{self.name}:{self.first_line}"

    def one_kind(self, used: Collection[str]) -> OneKind:
        """What keeps the rows of one kind, where they use these keys."""
        return OneKind.of(self.sample[0], self.since, used, is_table=self.is_table)


def make_plan(
    beginning: Beginning, template: Template | None, maps: Sequence[str], marks: Marks | None = None
) -> Plan | None:
    """The plan for an input; None where only a template could say what to do with its columns.

    `marks` are what the turns of dialogues in plain text begin with.
    """
    paths = dotted_names(beginning.columns, beginning.sample, [text.partition("=")[2] for text in maps])
    if paths:
        sample = [with_nested(record, paths) for record in beginning.sample]
        beginning = replace(beginning, columns=[*beginning.columns, *paths], sample=sample)
        return reading_nested(plan_columns(beginning, template, maps, marks), paths)
    plan = plan_columns(beginning, template, maps, marks)
    has_weights = beginning.is_table and "weight" in beginning.columns and ReadyRows.of(beginning) is not None
    return reading_weights(plan) if plan and has_weights else plan


def is_evident(record: Mapping[str, Any], template: Template | None, maps: Sequence[str]) -> bool:
    """True if a first record shows by its keys alone what becomes of the records: no other needs to be waited for.

    Its keys are a training row's, or name every field that the template requires.
    """
    may_be_preference = "chosen" in record or ("label" in record and record.keys() & {"completion", *CONVERSATIONS})
    if may_be_preference or any("." in text.partition("=")[2] for text in maps):
        return False
    if template is None:
        known = next((kind for keys, kind in KNOWN_ROWS if all(key in record for key in keys)), None)
        return known is not None and (known != "text" or not record.keys() - {"text", *CARRIED})
    if template.kind == "chat":
        return not maps and bool(record.keys() & CONVERSATIONS)
    mapped = {text.partition("=")[0].strip() for text in maps}
    return all(name in record or name in mapped for name in template.required)


def reading_nested(plan: Plan | None, paths: Sequence[str]) -> Plan | None:
    """The plan for records whose dotted paths are read as columns."""
    if plan is None:
        return None
    make = plan.make
    return replace(plan, make=lambda values, where: make(with_nested(values, paths), where), quick=None)


def reading_weights(plan: Plan) -> Plan:
    """The plan for a table of training rows whose weights may be written as text, as in CSV; a blank one is none."""
    make = plan.make

    def numbered(values: Mapping[str, Any]) -> Mapping[str, Any]:
        text = values.get("weight")
        if not isinstance(text, str):
            return values
        try:
            number = float(text) if text.strip() else None
        except ValueError:
            return values  # refused with its place
        return {**values, "weight": number}

    return replace(plan, make=lambda values, where: make(numbered(values), where))


def plan_columns(
    beginning: Beginning, template: Template | None, maps: Sequence[str], marks: Marks | None
) -> Plan | None:
    """The plan by what the columns are called and hold."""
    if marks is not None:
        return plan_dialogues(beginning, template, "text", None, marks)
    if holds_preferences(beginning.columns, beginning.sample) and not maps:
        return plan_preferences(beginning, template)
    if template is None:
        return plan_known_rows(beginning)
    if template.kind == "chat":
        return plan_chat(beginning, template, maps)
    refuse_rendered(beginning, template)
    wanted = Wanted(template.name, template.required, template.optional, template.typed)
    mapped = parse_maps(maps, wanted.fields, template.name)
    if template.kind == "classification":
        mapped = usual_labels(wanted, beginning.columns) | mapped
    return plan_template(template, wanted, choose(beginning, wanted, mapped), beginning)


def plan_chat(beginning: Beginning, template: Template, maps: Sequence[str]) -> Plan:
    """Conversations for a chat template: as they are, cut out of one text, or made of a question and an answer."""
    columns = beginning.columns
    mapped = parse_maps(maps, CHAT_FIELDS, template.name)
    turns = mapped.get("messages") or next((name for name in CONVERSATIONS if name in columns), None)
    if turns is not None and not (mapped.keys() - {"messages"}):
        return plan_messages(turns, template, beginning)
    return (None if mapped else plan_flattened(beginning, template)) or plan_single_turns(beginning, template, mapped)


def usual_labels(wanted: Wanted, columns: Sequence[str]) -> dict[str, str]:
    """The columns that hold text and label under the names that other data sets use."""
    found: dict[str, str] = {}
    for name, usual in (("text", TEXT_NAMES), ("label", LABEL_NAMES)):
        column = next((column for column in usual if column in columns), None)
        if name in wanted.required and name not in columns and column is not None:
            found[name] = column
    return found


def refuse_rendered(beginning: Beginning, template: Template) -> None:
    """A data error for rows that went through a template before: the prompt would be wrapped twice."""
    before = beginning.sample[0].get("template") if beginning.sample else None
    if isinstance(before, str) and "@" in before and "completion" in beginning.columns:
        raise UserError(
            f"{beginning.since}: the rows already went through template {before}; "
            f"{template.name} would wrap them twice",
            ExitCode.DATA,
            hint="leave out --template, or start from the table that they were made of",
        )


def plan_known_rows(beginning: Beginning) -> Plan | None:
    """Rows that already are training rows stay as they are; None if these are not."""
    columns = list(beginning.sample[0])
    for keys, kind in KNOWN_ROWS:
        others = [name for name in columns if name not in (*keys, *CARRIED)]
        if not all(key in columns for key in keys) or (kind == "text" and others):
            continue  # text beside other columns may be any of them: a template should say
        if kind == "messages":
            return plan_messages(keys[0], None, beginning)
        quick = partial(quick_known_row, keys) if kind in ("prompt_completion", "text") else None
        make = partial(known_row, keys, beginning.one_kind(keys), beginning.is_plain_text)
        return Plan(kind, make, note_others(beginning.name, others), quick)
    return plan_flattened(beginning, None)


KNOWN_ROWS: tuple[tuple[tuple[str, ...], Kind], ...] = (
    (("prompt", "completion"), "prompt_completion"),
    (("messages",), "messages"),
    (("conversations",), "messages"),
    (("text", "label"), "classification"),
    (("text",), "text"),
)


def note_others(name: str, others: Sequence[str]) -> tuple[str, ...]:
    """What to say of columns that no row carries."""
    return (f"{name}: left out: {', '.join(others)}",) if others else ()


def carried_of(values: Mapping[str, Any], template: Template | None = None) -> Row:
    """What a row carries from an earlier prep, and its weight; with the template that it goes through now."""
    carried = {key: values[key] for key in CARRIED if values.get(key) is not None}
    return carried | ({"template": template.fingerprint} if template else {})


def known_row(
    keys: Sequence[str], one_kind: OneKind, is_plain_text: bool, values: Mapping[str, Any], where: str
) -> Row:
    """A training row with its known keys, in a fixed order."""
    for key in keys:
        if key not in values:
            raise other_shape(values, key, key, one_kind.since, where)
    one_kind.check(values, where)
    row = {key: values[key] for key in keys} | carried_of(values)
    for key in ("completion", "text", "label"):
        answer = row.get(key)
        if isinstance(answer, str) and not answer.strip():
            raise NoAnswer(where, key, "no answer, nothing to learn")
        if isinstance(answer, str) and is_missing(answer) and not is_plain_text:
            raise missing_answer(answer, where, key)
    check_row(row, where, kinds=ALL_KINDS)
    return row


def quick_known_row(keys: Sequence[str], values: Mapping[str, Any]) -> Row | None:
    """The same for a row that has these keys only, all of them texts, the answer there; None for any other."""
    if len(values) != len(keys):
        return None
    row = {key: values.get(key) for key in keys}
    for text in row.values():
        if type(text) is not str:
            return None
    return row if text and not text.isspace() and not is_missing(text) else None


def plan_messages(turns: str, template: Template | None, beginning: Beginning) -> Plan:
    """Conversations: `messages` as they are, ShareGPT's turns renamed; tools beside them as OpenAI writes them."""
    one_kind = beginning.one_kind((turns, "tools"))

    def make(values: Mapping[str, Any], where: str) -> Row:
        if turns not in values:
            raise other_shape(values, turns, "messages", beginning.since, where)
        one_kind.check(values, where)
        messages = values[turns]
        if turns == "conversations" or holds_speakers(messages) or holds_calls(messages):
            messages = to_messages(messages, values.get("system") if turns == "conversations" else None, where)
        tools = parse_tools(values.get("tools"), where)
        row: Row = {"messages": messages} | ({"tools": tools} if tools else {}) | carried_of(values, template)
        check_row(row, where)
        require_answers(messages, where)
        if template is not None and "tool" not in (template.chat or ""):
            refuse_tools(messages, tools, template.name, where)
        return row

    return Plan("messages", make, note_others(beginning.name, one_kind.unused))


def require_answers(messages: Sequence[Mapping[str, Any]], where: str) -> None:
    """A conversation in which an assistant's turn is blank and calls nothing is left out: it would teach to say nothing."""
    for number, message in enumerate(messages, 1):
        if message["role"] != "assistant":
            continue
        answer = message["content"]
        if (not answer or answer.isspace()) and not message.get("tool_calls"):
            raise NoAnswer(where, "messages", f"turn {number}: no answer, nothing to learn")
        if is_missing(answer):
            raise missing_answer(answer, where, "messages", f"turn {number}: ")


def plan_flattened(beginning: Beginning, template: Template | None) -> Plan | None:
    """Dialogues in one text, whose last answer may stand in a column of its own; None if these are none."""
    texts = {name: [record.get(name) for record in beginning.sample] for name in ("input", "text", "prompt")}
    for name, values in texts.items():
        marks = find_marks(values)
        if marks is None or (name == "text" and template is None):
            continue  # without a template, a text is a text
        answer = next((column for column in ("output", "response", "completion") if column in beginning.columns), None)
        return plan_dialogues(beginning, template, name, answer if name != "text" else None, marks)
    return None


def plan_dialogues(
    beginning: Beginning, template: Template | None, column: str, answer: str | None, marks: Marks
) -> Plan:
    """Conversations out of texts, cut where the marks stand."""

    def make(values: Mapping[str, Any], where: str) -> Row:
        for name in (column, answer or column):
            if not isinstance(values.get(name), str):
                raise other_shape(values, name, "messages", beginning.since, where)
        messages = split_turns(values[column], marks, where)
        if answer is not None:
            if messages[-1] == {"role": "assistant", "content": ""}:
                messages.pop()
            messages.append({"role": "assistant", "content": values[answer]})
        one_kind.check(values, where)
        row = {"messages": messages} | carried_of(values, template)
        check_row(row, where)
        require_answers(messages, where)
        return row

    one_kind = beginning.one_kind(())
    called = f"{column} + {answer}" if answer else column
    note = f"{beginning.name}: turns of {called} are cut at {marks.user} and {marks.assistant}"
    return Plan("messages", make, (note, *note_others(beginning.name, one_kind.unused)))


def plan_preferences(beginning: Beginning, template: Template | None) -> Plan:
    """Pairs of answers, or answers with a label of true or false, in any of the shapes that are around."""
    marks = find_marks([record.get("chosen") for record in beginning.sample if "prompt" not in record])
    if (
        template is not None
        and template.kind == "completion"
        and (template.typed is None or len(template.required) != 2)
    ):
        raise UserError(
            f"{beginning.since}: template {template.name} has no place for pairs of answers",
            ExitCode.DATA,
            hint="--template preference, a chat template, or none; for the good answers alone: --map FIELD=chosen",
        )

    pair, first = ("chosen", "rejected"), beginning.sample[0]
    are_pairs = all(key in beginning.columns for key in pair) and ("chosen" in first or "label" not in first)
    one_kind = beginning.one_kind((*(pair if are_pairs else ("label",)), *CONVERSATIONS))

    def make(values: Mapping[str, Any], where: str) -> Row:
        for key in pair if are_pairs else ():
            if key not in values:
                raise other_shape(values, key, key, beginning.since, where)
        one_kind.check(values, where)
        row = preference_row(values, marks, where) | carried_of(values, template)
        check_row(row, where, kinds=("preference",))
        return render_preference(row, template, where) if template else row

    return Plan("preference", make, note_others(beginning.name, one_kind.unused))


def render_preference(row: Row, template: Template, where: str) -> Row:
    """The texts of a preference through a template; turns stay turns, for a chat template to render."""
    if template.kind == "chat":
        return to_dialogue(row)
    if not isinstance(row["prompt"], str):
        raise UserError(
            f"{where}: a conversation, template {template.name} takes texts",
            ExitCode.DATA,
            hint="--template chatml, llama3 or vicuna; or none",
        )
    if template.kind == "preference":
        parts: Row = {
            key: template.render_part(key, row, where) for key in ("prompt", "chosen", "rejected") if key in row
        }
        return {**row, **parts}
    answer = next(name for name in template.required if name != template.typed)
    rendered = {"prompt": template.render_prompt({template.typed or "": row["prompt"]})}
    for key in ("chosen", "rejected", "completion"):
        if key in row:
            rendered[key] = template.render_completion({answer: row[key]})
    return {**row, **rendered}


def holds_calls(messages: Any) -> bool:
    """True for a conversation in which tools are called."""
    return isinstance(messages, list) and any(isinstance(turn, dict) and turn.get("tool_calls") for turn in messages)


def holds_speakers(messages: Any) -> bool:
    """True for ShareGPT's turns under another name."""
    return isinstance(messages, list) and bool(messages) and isinstance(messages[0], dict) and "from" in messages[0]


def plan_single_turns(beginning: Beginning, template: Template, mapped: Mapping[str, str]) -> Plan:
    """A question and its answer as a conversation of two turns, for a chat template."""
    ready = ReadyRows.of(beginning)
    wanted = Wanted(template.name, ("user", "assistant"), ("system",), "user")
    choice = choose(beginning, wanted, mapped)
    pattern = choice.pattern_of("user")

    def make(values: Mapping[str, Any], where: str) -> Row:
        fields = fill_fields(values, choice, wanted, where)
        turns = [("system", fields.get("system", "")), ("user", fields["user"]), ("assistant", fields["assistant"])]
        messages = [{"role": role, "content": text} for role, text in turns if text]
        row = ready.weighed({"messages": messages}, values, where) if ready else {"messages": messages}
        check_row(row, where)
        return carry(row, template, pattern)

    return Plan("messages", make, notes_on(choice, beginning))


def plan_template(template: Template, wanted: Wanted, choice: Choice, beginning: Beginning) -> Plan:
    """Fields rendered to the parts of a row: prompt and completion, one text, text and label, or a pair of answers."""
    carried = carry({}, template, choice.pattern_of(wanted.question))
    kind, parts = parts_of(template)
    ready = ReadyRows.of(beginning)

    def make(values: Mapping[str, Any], where: str) -> Row:
        fields = fill_fields(values, choice, wanted, where)
        row: Row = {key: template.render_part(part, fields, where) for key, part in parts}
        row = ready.weighed(row, values, where) if ready else row
        check_row(row, where, kinds=ALL_KINDS)
        return row | carried

    quick = quick_make(template, wanted, choice, parts) if kind in ("prompt_completion", "text") else None
    quick = ready.only_plain(quick) if ready and quick else quick
    return Plan(kind, make, notes_on(choice, beginning), quick, carried)


@dataclass(frozen=True)
class ReadyRows:
    """Records that are training rows before they go through a template: nothing of them is passed over."""

    keys: tuple[str, ...]
    one_kind: OneKind

    @classmethod
    def of(cls, beginning: Beginning) -> "ReadyRows | None":
        """None for records of other columns, in which a `weight` is a column like any other."""
        columns = set(beginning.columns).difference(CARRIED)
        keys = next((keys for keys, _ in KNOWN_ROWS if columns == set(keys)), None)
        return None if keys is None else cls(keys, beginning.one_kind(keys))

    def weighed(self, row: Row, values: Mapping[str, Any], where: str) -> Row:
        """The row made of a record, with its weight; a data error for a record of another kind."""
        self.one_kind.check(values, where)
        return row if values.get("weight") is None else row | {"weight": values["weight"]}

    def only_plain(self, quick: Callable[[Mapping[str, Any]], Row | None]) -> Callable[[Mapping[str, Any]], Row | None]:
        """`quick` for records that have the keys only; None for any other."""
        count = len(self.keys)
        return lambda values: quick(values) if len(values) == count else None


def quick_make(
    template: Template, wanted: Wanted, choice: Choice, parts: Sequence[tuple[str, str]]
) -> Callable[[Mapping[str, Any]], Row | None] | None:
    """`make` for rows that nothing is wrong with, several times as fast; it gives None for any that needs a look.

    None where the template does more than put fields into text.
    """
    expressions = {key: template.quick(part) for key, part in parts}
    if any(expression is None for expression in expressions.values()):
        return None
    try:
        build = builder(quick_sources(choice, wanted), quick_condition(choice, wanted), expressions)  # type: ignore[arg-type]
    except SyntaxError:  # choices nested deeper than Python's parentheses go
        return None
    answer = parts[-1][0]

    def make(values: Mapping[str, Any]) -> Row | None:
        try:
            row = build(values)
        except (KeyError, TypeError):
            return None
        return row if row and row[answer] and not row[answer].isspace() else None

    return make


def parts_of(template: Template) -> tuple[Kind, tuple[tuple[str, str], ...]]:
    """The kind of rows that a template makes, and which of its parts fills which key."""
    if template.kind == "classification":
        return "classification", (("text", "completion"), ("label", "label"))
    if template.kind == "preference":
        return "preference", (("prompt", "prompt"), ("chosen", "chosen"), ("rejected", "rejected"))
    if template.prompt is None:
        return "text", (("text", "completion"),)
    return "prompt_completion", (("prompt", "prompt"), ("completion", "completion"))


def carry(row: Row, template: Template, pattern: str | None) -> Row:
    """The row with what travels along: the template's fingerprint and the pattern that wrote its question."""
    row["template"] = template.fingerprint
    if pattern is not None:
        row["pattern"] = pattern
    return row


def choose(beginning: Beginning, wanted: Wanted, mapped: Mapping[str, str]) -> Choice:
    """The columns for the fields, for rows from this beginning on."""
    columns, sample = beginning.columns, beginning.sample
    choice = choose_columns(wanted, columns, sample, mapped, beginning.name, is_table=beginning.is_table)
    return replace(choice, since=beginning.since)


def notes_on(choice: Choice, beginning: Beginning) -> tuple[str, ...]:
    """What to say of a choice: nothing where fields were named or are called as the template calls them."""
    renamed = {name: source for name, source in choice.sources.items() if isinstance(source, str) and source != name}
    if not choice.inferred:
        told = [f"{name} is {source}" for name, source in renamed.items() if source in beginning.columns]
        others = note_others(beginning.name, passed_over(choice, beginning))
        return ((f"{beginning.name}: {', '.join(told)}",) if told else ()) + others
    lines = [
        f"{beginning.name}: no columns are called {' or '.join(sorted(choice.inferred))}; "
        f"chosen by their first {len(beginning.sample)} rows:"
    ]
    for name, source in choice.sources.items():
        lines.append(f"  {name} = {source}" if isinstance(source, str) else f'  {name} = "{source.text}"')
    lines += [f"  left out: {name} ({why})" for name, why in choice.left_out.items()]
    column = next(name for name in beginning.columns if name not in choice.left_out)
    ways = {
        name: f'"... {{{column}}} ..."' if isinstance(source, Pattern) else "COLUMN"
        for name, source in choice.sources.items()
    }
    return (*lines, f"  to choose otherwise: {' '.join(f'--map {name}={way}' for name, way in ways.items())}")


def passed_over(choice: Choice, beginning: Beginning) -> list[str]:
    """Columns that no field uses and that read as if they said what a row is worth: `weight`, `label`."""
    used = {column for _, column in choice.needed}
    worth = {"weight": (int, float), "label": (bool,)} if ReadyRows.of(beginning) is None else {}
    return [
        name
        for name, types in worth.items()
        if name not in used and any(type(record.get(name)) in types for record in beginning.sample)
    ]
