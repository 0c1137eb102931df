"""ShareGPT conversations -> messages: the same turns under the names that chat templates use."""

from typing import Any

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

    A turn that is no turn, an unknown speaker or a function call is a data error that names the turn.
    """
    if not isinstance(turns, list):
        raise UserError(f"{where}: 'conversations' is {type_name(turns)}, should be a list of turns", ExitCode.DATA)
    messages = [to_message(turn, f"{where}: turn {number}") for number, turn in enumerate(turns, 1)]
    if isinstance(system, str) and system.strip():
        return [{"role": "system", "content": system}, *messages]
    return messages


def to_message(turn: Any, place: str) -> dict[str, Any]:
    """One turn; turns that already have role and content stay as they are."""
    if not isinstance(turn, dict):
        raise UserError(f"{place} is {type_name(turn)}, should be an object", ExitCode.DATA)
    if "from" not in turn and "role" in turn:
        return turn
    speaker = turn.get("from")
    if speaker == "function_call":
        raise calls_tool(place)
    if not isinstance(speaker, str) or speaker not in ROLE_OF_SPEAKER:
        known = ", ".join(ROLE_OF_SPEAKER)
        raise UserError(
            f"{place} has the unknown speaker {speaker!r}", ExitCode.DATA, hint=f"speakers under 'from': {known}"
        )
    return {"role": ROLE_OF_SPEAKER[speaker], "content": turn.get("value")}


def calls_tool(place: str) -> UserError:
    """The error for a turn that calls a function: no shipped template has a place for it yet."""
    hint = "leave such conversations out: --on-error skip --rejects FILE"
    return UserError(f"{place} calls a tool, and the template has no place for tool calls", ExitCode.DATA, hint=hint)
