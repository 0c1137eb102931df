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
    is_filled,
    other_shape,
    parse_maps,
)
from ftkit.core.conversations import calls_tool, to_messages
from ftkit.errors import ExitCode, UserError
from ftkit.io.records import Kind, check_messages, check_row
from ftkit.io.template import Template

Row = dict[str, Any]
CHAT_FIELDS = ("user", "assistant", "system", "messages")
CARRIED = ("template", "pattern")
"""Keys that an earlier prep has put into rows."""


@dataclass(frozen=True)
class Plan:
    """`make(values, where)` turns one record into a row of `kind`, or raises a UserError at `where`."""

    kind: Kind
    make: Callable[[Mapping[str, Any], str], Row]
    notes: tuple[str, ...] = field(default=())
    """What was chosen that nobody asked for."""


@dataclass(frozen=True)
class Beginning:
    """What a plan is made from: the columns and first records of an input."""

    name: str
    first_line: int
    columns: Sequence[str]
    sample: Sequence[Mapping[str, Any]]

    @property
    def since(self) -> str:
        """file:line of the first record."""
        return f"{self.name}:{self.first_line}"


def make_plan(beginning: Beginning, template: Template | None, maps: Sequence[str]) -> Plan | None:
    """The plan for an input; None where only a template could say what to do with its columns."""
    columns = beginning.columns
    refuse_preferences(beginning)
    if template is None:
        return plan_known_rows(beginning)
    if template.kind == "chat":
        mapped = parse_maps(maps, CHAT_FIELDS, template.name)
        turns = mapped.get("messages") or next(
            (name for name in ("messages", "conversations") if name in columns), None
        )
        if turns is not None and not (mapped.keys() - {"messages"}):
            return plan_messages(turns, template, beginning)
        return plan_single_turns(beginning, template, mapped)
    refuse_rendered(beginning, template)
    wanted = Wanted(template.name, template.required, template.optional, template.typed)
    choice = choose(beginning, wanted, parse_maps(maps, wanted.fields, template.name))
    return plan_template(template, wanted, choice, beginning)


def refuse_preferences(beginning: Beginning) -> None:
    """A data error for rows that hold wrong answers on purpose: imitated as they are, they would teach those."""
    columns = beginning.columns
    holds_labels = "label" in columns and any(isinstance(row.get("label"), bool) for row in beginning.sample)
    if ("chosen" in columns and "rejected" in columns) or holds_labels:
        keys = "'label' (true or false)" if holds_labels else "'chosen' and 'rejected'"
        raise UserError(
            f"{beginning.since}: preference rows ({keys}) are not supported yet",
            ExitCode.DATA,
            hint="keep the good answers only, under 'completion' or 'messages'",
        )


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
        return Plan(kind, partial(known_row, keys, beginning.since), note_others(beginning.name, others))
    return None


KNOWN_ROWS: tuple[tuple[tuple[str, ...], Kind], ...] = (
    (("prompt", "completion"), "prompt_completion"),
    (("messages",), "messages"),
    (("conversations",), "messages"),
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
    answer = row.get(keys[-1])
    if isinstance(answer, str) and not answer.strip():
        raise NoAnswer(where, keys[-1], "no answer, nothing to learn")
    check_row(row, where)
    return row


def plan_messages(turns: str, template: Template | None, beginning: Beginning) -> Plan:
    """Conversations: `messages` as they are, ShareGPT's turns renamed; a tools column is kept beside them."""

    def make(values: Mapping[str, Any], where: str) -> Row:
        if turns not in values:
            raise other_shape(values, turns, "messages", beginning.since, where)
        messages = values[turns]
        if turns == "conversations" or holds_speakers(messages):
            messages = to_messages(messages, values.get("system"), where)
        refuse_tool_calls(messages, where)
        check_messages(messages, where)
        row: Row = {"messages": messages}
        if is_filled(values.get("tools")) and values["tools"] != "[]":
            row["tools"] = values["tools"]
        if template is not None:
            return row | {"template": template.fingerprint}
        return row | {key: values[key] for key in CARRIED if key in values}

    return Plan("messages", make)


def holds_speakers(messages: Any) -> bool:
    """True for ShareGPT's turns under another name."""
    return isinstance(messages, list) and bool(messages) and isinstance(messages[0], dict) and "from" in messages[0]


def refuse_tool_calls(messages: Any, where: str) -> None:
    """A data error for a turn that calls a tool."""
    for number, message in enumerate(messages if isinstance(messages, list) else [], 1):
        if isinstance(message, dict) and message.get("tool_calls"):
            raise calls_tool(f"{where}: turn {number}")


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
    """Fields rendered to prompt and completion, or to one text where the template has no prompt."""
    pattern = choice.pattern_of(wanted.question)

    def make(values: Mapping[str, Any], where: str) -> Row:
        fields = fill_fields(values, choice, wanted, where)
        try:
            completion = template.render_completion(fields)
            row = (
                {"text": completion}
                if template.prompt is None
                else {"prompt": template.render_prompt(fields), "completion": completion}
            )
        except UserError as error:
            raise UserError(f"{where}: {error.message}", error.exit_code, hint=error.hint) from None
        check_row(row, where)
        return carry(row, template, pattern)

    return Plan("text" if template.prompt is None else "prompt_completion", make, notes_on(choice, beginning))


def carry(row: Row, template: Template, pattern: str | None) -> Row:
    """The row with what travels along: the template's fingerprint and the pattern that wrote its question."""
    row["template"] = template.fingerprint
    if pattern is not None:
        row["pattern"] = pattern
    return row


def choose(beginning: Beginning, wanted: Wanted, mapped: Mapping[str, str]) -> Choice:
    """The columns for the fields, for rows from this beginning on."""
    return replace(
        choose_columns(wanted, beginning.columns, beginning.sample, mapped, beginning.name), since=beginning.since
    )


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
