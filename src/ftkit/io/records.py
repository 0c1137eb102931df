"""The shape of every row that ftkit reads or writes, and what each must hold."""

from typing import Any, Literal

from ftkit.errors import ExitCode, UserError

Kind = Literal["prompt_completion", "messages", "text"]
ROLES = ("system", "user", "assistant", "tool")


def kind_of(row: dict[str, Any]) -> Kind | None:
    """Which kind of training row this is, by its keys; None if it is none."""
    if "prompt" in row and "completion" in row:
        return "prompt_completion"
    if "messages" in row:
        return "messages"
    if "text" in row:
        return "text"
    return None


def check_row(row: dict[str, Any], where: str) -> Kind:
    """The row's kind; a row that nothing can be learned from is a data error at `where` (`file:line`)."""
    kind = kind_of(row)
    if kind is None:
        raise UserError(
            f"{where}: not a training row (it has {', '.join(map(str, row)) or 'no keys'})",
            ExitCode.DATA,
            hint="make rows with ftkit prep; a row has prompt and completion, messages, or text",
        )
    if kind == "messages":
        check_messages(row["messages"], where)
        return kind
    for key in ("prompt", "completion") if kind == "prompt_completion" else ("text",):
        if not isinstance(row[key], str):
            raise UserError(f"{where}: '{key}' is {type_name(row[key])}, should be text", ExitCode.DATA)
    answer = row["completion"] if kind == "prompt_completion" else row["text"]
    if not answer.strip():
        raise UserError(f"{where}: no answer, nothing to learn", ExitCode.DATA, hint="leave the row out: ftkit prep FILE --on-error skip")
    return kind


def check_messages(messages: Any, where: str) -> None:
    """Roles known and in order, content text, at least one assistant turn at the end."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' should be a list with at least one turn", ExitCode.DATA)
    before = None
    for number, message in enumerate(messages, 1):
        place = f"{where}: turn {number}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"{place} has no role", ExitCode.DATA, hint='a turn is {"role": "user", "content": "..."}')
        role, content = message["role"], message.get("content")
        if role not in ROLES:
            raise UserError(f"{place} has the unknown role '{role}'", ExitCode.DATA, hint=f"roles: {', '.join(ROLES)}")
        if isinstance(content, list):
            raise UserError(f"{place} holds a list of parts; ftkit trains text only", ExitCode.DATA)
        if not isinstance(content, str):
            raise UserError(f"{place}: content is {type_name(content)}, should be text", ExitCode.DATA)
        if role == "system" and number > 1:
            raise UserError(f"{place}: the system message comes first", ExitCode.DATA)
        if role == before and role in ("user", "assistant"):
            raise UserError(f"{place}: two {role} turns in a row", ExitCode.DATA)
        before = role
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{where}: no assistant turn, nothing to learn", ExitCode.DATA)
    if before != "assistant":
        raise UserError(f"{where}: the conversation ends with a {before} turn", ExitCode.DATA, hint="it should end with the assistant's answer")


def type_name(value: Any) -> str:
    """The type of a JSON value as JSON calls it."""
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number", type(None): "null", str: "text"}
    return names.get(type(value), type(value).__name__)
