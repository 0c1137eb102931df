"""ShareGPT conversations -> messages: the same turns under the names that chat templates use."""

from collections.abc import Sequence
from typing import Any

import orjson

from ftkit.errors import ExitCode, UserError
from ftkit.io.records import type_name

ROLE_OF_SPEAKER = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def to_messages(turns: Any, system: Any, where: str) -> list[dict[str, Any]]:
    """`[{"from": "human", "value": ...}]` as `[{"role": "user", "content": ...}]`, `system` in front if given.

    A function call becomes an assistant turn with `tool_calls`. A turn that is no turn or has an unknown speaker is
    a data error that names the turn.
    """
    if not isinstance(turns, list):
        raise UserError(f"{where}: 'conversations' is {type_name(turns)}, should be a list of turns", ExitCode.DATA)
    messages = [to_message(turn, f"{where}: turn {number}") for number, turn in enumerate(turns, 1)]
    if isinstance(system, str) and system.strip():
        return [{"role": "system", "content": system}, *messages]
    return messages


def to_message(turn: Any, place: str) -> dict[str, Any]:
    """One turn; turns that already have a role stay as they are, but for tool calls.

    Beside these a content of null becomes an empty text, and arguments that are JSON text become what it says.
    """
    if not isinstance(turn, dict):
        raise UserError(f"{place} is {type_name(turn)}, should be an object", ExitCode.DATA)
    if "from" not in turn and "role" in turn:
        if not (calls := turn.get("tool_calls")):
            return turn
        content = "" if turn.get("content") is None else turn["content"]
        return {**turn, "content": content, "tool_calls": parse_calls(calls, place)}
    speaker = turn.get("from")
    weight = {} if turn.get("weight") is None else {"weight": turn["weight"]}  # whether it is trained: not to be lost
    if speaker == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": parse_calls(turn.get("value"), place)} | weight
    if not isinstance(speaker, str) or speaker not in ROLE_OF_SPEAKER:
        known = ", ".join([*ROLE_OF_SPEAKER, "function_call"])
        raise UserError(
            f"{place} has the unknown speaker {speaker!r}", ExitCode.DATA, hint=f"speakers under 'from': {known}"
        )
    return {"role": ROLE_OF_SPEAKER[speaker], "content": turn.get("value")} | weight


def parse_calls(value: Any, place: str) -> list[dict[str, Any]]:
    """The calls in `{"name": ..., "arguments": {...}}`, or in a list of such, written as JSON text or given as such.

    OpenAI's calls keep what stands beside their `function`, as an `id`.
    """
    found = parse_json(value, f"{place}: the function call")
    calls = found if isinstance(found, list) else [found]
    wrapped = [call if isinstance(call, dict) and "function" in call else {"function": call} for call in calls]
    for call in (call["function"] for call in wrapped):
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise UserError(
                f"{place}: the function call names no function",
                ExitCode.DATA,
                hint='a call is {"name": "...", "arguments": {...}}',
            )
    return [{"type": "function", **call, "function": parse_arguments(call["function"], place)} for call in wrapped]


def parse_arguments(function: dict[str, Any], place: str) -> dict[str, Any]:
    """A called function with its arguments as an object; without any they are empty."""
    given = parse_json(function.get("arguments") or {}, f"{place}: the arguments of {function['name']}")
    return {"name": function["name"], "arguments": given}


def parse_tools(value: Any, where: str) -> list[dict[str, Any]]:
    """The tools of a conversation as OpenAI's list of functions; given as such, as bare functions, or as JSON text."""
    if value is None or value == "":
        return []
    tools = parse_json(value, f"{where}: 'tools'")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{where}: 'tools' should be a list of functions", ExitCode.DATA)
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def parse_json(value: Any, what: str) -> Any:
    """What a JSON text says; anything but text is taken as it is."""
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{what} is not JSON: {error.msg.partition(': line')[0]}", ExitCode.DATA) from None


def refuse_tools(messages: list[dict[str, Any]], tools: list[dict[str, Any]], template: str, where: str) -> None:
    """A data error for tools and for turns that call one, where the template has no place for them."""
    called = [f"turn {number} calls a tool" for number, message in enumerate(messages, 1) if message.get("tool_calls")]
    if called or tools:
        raise UserError(
            f"{where}: {called[0] if called else 'it has tools'}, and template {template} has no place for tools",
            ExitCode.DATA,
            hint="leave out --template: the model's own chat template renders them; "
            "or leave such conversations out: --on-error skip --rejects FILE",
        )


def common_turns(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many turns at the beginning of two conversations are the same."""
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    return same
