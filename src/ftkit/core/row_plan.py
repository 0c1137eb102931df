"""How the records of one input become training rows: decided once from its first records, then applied to each."""

from collections.abc import Callable, Mapping, Sequence
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
    other_shape,
    parse_maps,
    quick_condition,
    quick_sources,
)
from ftkit.core.preferences import CONVERSATIONS, holds_preferences, preference_row, to_dialogue
from ftkit.core.sharegpt import parse_tools, refuse_tools, to_messages
from ftkit.core.transcripts import Marks, find_marks, split_turns
from ftkit.errors import ExitCode, UserError
from ftkit.io.nested import dotted_names, with_nested
from ftkit.io.plain_template import builder
from ftkit.io.records import Kind, check_messages, check_row
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

    @property
    def since(self) -> str:
        """file:line of the first record."""
        return f"{self.name}:{self.first_line}"


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
    return plan_columns(beginning, template, maps, marks)


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
        return Plan(kind, partial(known_row, keys, beginning.since), note_others(beginning.name, others), quick)
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


def known_row(keys: Sequence[str], since: str, values: Mapping[str, Any], where: str) -> Row:
    """A training row with its known keys, in a fixed order."""
    for key in keys:
        if key not in values:
            raise other_shape(values, key, key, since, where)
    row = {key: values[key] for key in (*keys, *CARRIED) if key in values}
    for key in ("completion", "text", "label"):
        answer = row.get(key)
        if isinstance(answer, str) and not answer.strip():
            raise NoAnswer(where, key, "no answer, nothing to learn")
    check_row(row, where, kinds=ALL_KINDS)
    return row


def quick_known_row(keys: Sequence[str], values: Mapping[str, Any]) -> Row | None:
    """The same for a row that has these keys only, all of them texts, the answer not blank; None for any other."""
    row = {key: values.get(key) for key in keys}
    if len(values) != len(keys) or any(type(text) is not str for text in row.values()):
        return None
    answer = str(row[keys[-1]])
    return row if answer and not answer.isspace() else None


def plan_messages(turns: str, template: Template | None, beginning: Beginning) -> Plan:
    """Conversations: `messages` as they are, ShareGPT's turns renamed; tools beside them as OpenAI writes them."""

    def make(values: Mapping[str, Any], where: str) -> Row:
        if turns not in values:
            raise other_shape(values, turns, "messages", beginning.since, where)
        messages = values[turns]
        if turns == "conversations" or holds_speakers(messages) or holds_calls(messages):
            messages = to_messages(messages, values.get("system") if turns == "conversations" else None, where)
        check_messages(messages, where)
        tools = parse_tools(values.get("tools"), where)
        if template is not None and "tool" not in (template.chat or ""):
            refuse_tools(messages, tools, template.name, where)
        row: Row = {"messages": messages} | ({"tools": tools} if tools else {})
        if template is not None:
            return row | {"template": template.fingerprint}
        return row | {key: values[key] for key in CARRIED if key in values}

    return Plan("messages", make)


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
        if messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip():
            raise NoAnswer(where, answer or column, "no answer, nothing to learn")
        check_messages(messages, where)
        return {"messages": messages} | ({"template": template.fingerprint} if template else {})

    called = f"{column} + {answer}" if answer else column
    note = f"{beginning.name}: turns of {called} are cut at {marks.user} and {marks.assistant}"
    return Plan("messages", make, (note,))


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

    def make(values: Mapping[str, Any], where: str) -> Row:
        row = preference_row(values, marks, where)
        check_row(row, where, kinds=("preference",))
        if template is None:
            return row | {key: values[key] for key in CARRIED if key in values}
        return render_preference(row, template, where) | {"template": template.fingerprint}

    return Plan("preference", make)


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
    wanted = Wanted(template.name, ("user", "assistant"), ("system",), "user")
    choice = choose(beginning, wanted, mapped)
    pattern = choice.pattern_of("user")

    def make(values: Mapping[str, Any], where: str) -> Row:
        fields = fill_fields(values, choice, wanted, where)
        turns = [("system", fields.get("system", "")), ("user", fields["user"]), ("assistant", fields["assistant"])]
        messages = [{"role": role, "content": text} for role, text in turns if text]
        return carry({"messages": messages}, template, pattern)

    return Plan("messages", make, notes_on(choice, beginning))


def plan_template(template: Template, wanted: Wanted, choice: Choice, beginning: Beginning) -> Plan:
    """Fields rendered to the parts of a row: prompt and completion, one text, text and label, or a pair of answers."""
    carried = carry({}, template, choice.pattern_of(wanted.question))
    kind, parts = parts_of(template)

    def make(values: Mapping[str, Any], where: str) -> Row:
        fields = fill_fields(values, choice, wanted, where)
        row: Row = {key: template.render_part(part, fields, where) for key, part in parts}
        check_row(row, where, kinds=ALL_KINDS)
        return row | carried

    quick = quick_make(template, wanted, choice, parts) if kind in ("prompt_completion", "text") else None
    return Plan(kind, make, notes_on(choice, beginning), quick, carried)


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
        build = builder(quick_sources(choice, wanted), quick_condition(wanted), expressions)  # type: ignore[arg-type]
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
        return (
            (f"{beginning.name}: {', '.join(f'{name} is {source}' for name, source in renamed.items())}",)
            if renamed
            else ()
        )
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
