"""The shape of every row that ftkit reads or writes, and what each must hold."""

import math
from typing import Any, Literal

from ftkit.errors import ExitCode, UserError

Kind = Literal["prompt_completion", "messages", "text", "classification", "preference"]
TRAINED: tuple[Kind, ...] = ("prompt_completion", "messages", "text", "classification")
"""The kinds that train takes."""
LEAVE_OUT = "mend the row, or leave it out: --on-error skip"
ROLES = ("system", "user", "assistant", "tool")


def kind_of(row: dict[str, Any]) -> Kind | None:
    """Which kind of training row this is, by its keys; None if it is none."""
    if "prompt" in row and "completion" in row:
        return "preference" if isinstance(row.get("label"), bool) else "prompt_completion"
    if "prompt" in row and "chosen" in row and "rejected" in row:
        return "preference"
    if "messages" in row:
        return "messages"
    if "text" in row:
        return "classification" if "label" in row else "text"
    return None


def check_row(row: dict[str, Any], where: str, *, kinds: tuple[Kind, ...] = TRAINED) -> Kind:
    """The row's kind; a row that nothing can be learned from is a data error at `where` (`file:line`).

    `kinds` are those that the caller can use; by default those that can be trained.
    """
    kind = kind_of(row)
    if kind is None:
        raise UserError(
            f"{where}: not a training row (it has {', '.join(map(str, row)) or 'no keys'})",
            ExitCode.DATA,
            hint="make rows with ftkit prep; a row has prompt and completion, messages, or text",
        )
    if kind not in kinds:
        hint = "keep the good answers only, under 'completion' or 'messages'"
        raise UserError(f"{where}: rows of {kind} cannot be trained yet", ExitCode.DATA, hint=hint)
    if "weight" in row:
        check_weight(row["weight"], where)
    if kind == "messages":
        check_messages(row["messages"], where)
        check_tools(row, where)
    elif kind == "preference":
        check_preference(row, where)
    else:
        check_texts(row, kind, where)
    return kind


def check_weight(weight: Any, where: str) -> None:
    """What a row counts in training is a number above 0."""
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not is_number or not 0 < weight < math.inf:
        shown = weight if is_number else type_name(weight)
        hint = "leave the row out where it should count nothing; a row without 'weight' counts 1"
        raise UserError(f"{where}: 'weight' is {shown}, should be a number above 0", ExitCode.DATA, hint=hint)


def check_texts(row: dict[str, Any], kind: Kind, where: str) -> None:
    """Texts are text, the answer is not empty, a label is text or a whole number."""
    for key in ("prompt", "completion") if kind == "prompt_completion" else ("text",):
        if not isinstance(row[key], str):
            raise UserError(f"{where}: '{key}' is {type_name(row[key])}, should be text", ExitCode.DATA, hint=LEAVE_OUT)
    answer = row["completion"] if kind == "prompt_completion" else row["text"]
    if not answer.strip():
        raise UserError(
            f"{where}: no answer, nothing to learn",
            ExitCode.DATA,
            hint="leave the row out: ftkit prep FILE --on-error skip",
        )
    if kind == "classification":
        label = row["label"]
        if not isinstance(label, (str, int)) or (isinstance(label, str) and not label.strip()):
            shown = "empty" if isinstance(label, str) else f"{type_name(label)}, should be text or a whole number"
            raise UserError(f"{where}: 'label' is {shown}", ExitCode.DATA, hint=LEAVE_OUT)


def check_preference(row: dict[str, Any], where: str) -> None:
    """A prompt and its answers: all of them texts, or all of them turns; no answer empty, a pair not the same."""
    answers = ("completion",) if "completion" in row else ("chosen", "rejected")
    is_text = isinstance(row["prompt"], str)
    for key in ("prompt", *answers):
        value = row[key]
        if is_text != isinstance(value, str) or not isinstance(value, (str, list)):
            wanted = "text" if is_text else "a list of turns"
            raise UserError(
                f"{where}: '{key}' is {type_name(value)}, should be {wanted}", ExitCode.DATA, hint=LEAVE_OUT
            )
    for key in answers:
        if is_text and not row[key].strip():
            raise UserError(f"{where}: '{key}' is empty, nothing to learn", ExitCode.DATA, hint=LEAVE_OUT)
        if not is_text:
            check_messages([*row["prompt"], *row[key]], where)
            if not row["prompt"] or any(not str(turn["content"]).strip() for turn in row[key]):
                what = f"'{key}' has an empty turn" if row["prompt"] else "'prompt' has no turn"
                raise UserError(f"{where}: {what}, nothing to learn", ExitCode.DATA, hint=LEAVE_OUT)
    if len(answers) == 2 and row["chosen"] == row["rejected"]:
        raise UserError(
            f"{where}: 'chosen' and 'rejected' are the same, nothing to learn", ExitCode.DATA, hint=LEAVE_OUT
        )


def check_messages(messages: Any, where: str) -> None:
    """Roles known and in order, content text, at least one assistant turn at the end."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' should be a list with at least one turn", ExitCode.DATA, hint=LEAVE_OUT)
    before = None
    for number, message in enumerate(messages, 1):
        place = f"{where}: turn {number}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"{place} has no role", ExitCode.DATA, hint='a turn is {"role": "user", "content": "..."}')
        role, content = message["role"], message.get("content")
        if role not in ROLES:
            raise UserError(f"{place} has the unknown role '{role}'", ExitCode.DATA, hint=f"roles: {', '.join(ROLES)}")
        if isinstance(content, list):
            raise UserError(f"{place} holds a list of parts; ftkit trains text only", ExitCode.DATA, hint=LEAVE_OUT)
        if not isinstance(content, str):
            raise UserError(f"{place}: content is {type_name(content)}, should be text", ExitCode.DATA, hint=LEAVE_OUT)
        if message.get("weight") not in (None, 1):  # OpenAI's way to leave an answer out of the loss
            hint = "take the key out to train the turn; --train-turns last trains the last one only"
            raise UserError(f"{place}: 'weight' of a single turn is not honoured yet", ExitCode.DATA, hint=hint)
        if role == "system" and number > 1:
            raise UserError(f"{place}: the system message comes first", ExitCode.DATA, hint=LEAVE_OUT)
        if role == before and role in ("user", "assistant"):
            raise UserError(f"{place}: two {role} turns in a row", ExitCode.DATA, hint=LEAVE_OUT)
        before = role
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{where}: no assistant turn, nothing to learn", ExitCode.DATA, hint=LEAVE_OUT)
    if before != "assistant":
        raise UserError(
            f"{where}: the conversation ends with a {before} turn",
            ExitCode.DATA,
            hint="it should end with the assistant's answer",
        )


def check_tools(row: dict[str, Any], where: str) -> None:
    """The tools of a conversation and the calls in it as chat templates take them: arguments are an object, no text."""
    if row.get("tools") and not are_functions(row["tools"]):
        hint = 'a tool is {"type": "function", "function": {"name": "...", "parameters": {...}}}'
        raise UserError(f"{where}: 'tools' should be a list of functions, each with a name", ExitCode.DATA, hint=hint)
    for number, message in enumerate(row["messages"], 1):
        if not (calls := message.get("tool_calls")):
            continue
        hint = 'a call is {"type": "function", "function": {"name": "...", "arguments": {...}}}; ftkit prep makes it so'
        if message["role"] != "assistant":
            raise UserError(f"{where}: turn {number}: only the assistant calls tools", ExitCode.DATA, hint=LEAVE_OUT)
        if not are_functions(calls):
            raise UserError(f"{where}: turn {number} calls a tool without a name", ExitCode.DATA, hint=hint)
        for call in calls:
            if not isinstance(given := call["function"].get("arguments"), dict):
                what = f"the arguments of a call are {type_name(given)}, should be an object"
                raise UserError(f"{where}: turn {number}: {what}", ExitCode.DATA, hint=hint)


def are_functions(values: Any) -> bool:
    """True for a list of OpenAI's functions, or of calls of them."""
    functions = [value.get("function") if isinstance(value, dict) else None for value in values or ()]
    return isinstance(values, list) and all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in functions)


def refuse_calls_in_pairs(row: dict[str, Any], where: str) -> None:
    """A data error for a pair of answers in which a tool is called: nothing renders the tools of pairs."""
    for key in ("prompt", "chosen", "rejected", "completion"):
        turns = row[key] if isinstance(row.get(key), list) else []
        if any(isinstance(turn, dict) and turn.get("tool_calls") for turn in turns):
            what = f"{where}: '{key}' calls a tool; pairs with tool calls cannot be compared yet"
            raise UserError(what, ExitCode.DATA, hint="leave such pairs out of the rows")


def type_name(value: Any) -> str:
    """The type of a JSON value as JSON calls it."""
    names = {
        dict: "an object",
        list: "a list",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
        str: "text",
    }
    return names.get(type(value), type(value).__name__)
