"""The elements of a JSON array, each with the line it starts on, so that a wrong one can be named and left out."""

import json
import re
from collections.abc import Iterator

from ftkit.errors import ExitCode, UserError

SPACE = re.compile(r"[ \t\n\r]*")


def array_elements(text: str, name: str, start: int | None = None) -> Iterator[tuple[int, str]]:
    """(line number from 1, source text) of each element of the array that the text is, or that begins at `start` in it.

    What lies between the elements is checked here; what is inside one is for the caller to parse.
    """
    at, line, counted = skip_space(text, start or 0), 1, 0
    if text[at : at + 1] != "[":
        raise broken(text, at, name, "a JSON array should begin here with [")
    at = skip_space(text, at + 1)
    if text[at : at + 1] == "]":
        return check_end(text, at + 1, name) if start is None else None
    while True:
        line, counted = line + text.count("\n", counted, at), at
        end = end_of_value(text, at, name)
        yield line, text[at:end]
        at = skip_space(text, end)
        mark = text[at : at + 1]
        if mark == "]":
            return check_end(text, at + 1, name) if start is None else None
        if mark != ",":
            raise broken(text, at, name, "a comma or ] is missing" if mark else CUT_OFF)
        at = skip_space(text, at + 1)
        if text[at : at + 1] == "]":
            raise broken(text, at, name, "a comma stands before the closing ]")


CUT_OFF = "ends inside the array (file cut off?)"


def end_of_value(text: str, at: int, name: str) -> int:
    """Where the JSON value that begins at `at` ends."""
    try:
        return DECODER.raw_decode(text, at)[1]
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        reason = CUT_OFF if cut else f"not JSON: {error.msg[:1].lower()}{error.msg[1:]}"
        raise broken(text, min(error.pos, len(text.rstrip())), name, reason) from None
    except RecursionError:
        raise broken(text, at, name, "nested too deep") from None


DECODER = json.JSONDecoder(strict=False, parse_int=len, parse_float=len)  # only the end is wanted: any number will do


def check_end(text: str, at: int, name: str) -> None:
    """Nothing but space may follow the array."""
    at = skip_space(text, at)
    if at < len(text):
        raise broken(text, at, name, "more text after the end of the array")


def skip_space(text: str, at: int) -> int:
    """The next place that is not space."""
    return SPACE.match(text, at).end()  # type: ignore[union-attr]


def broken(text: str, at: int, name: str, reason: str) -> UserError:
    """The error for a place in the text, as file:line:column."""
    line, column = text.count("\n", 0, at) + 1, at - (text.rfind("\n", 0, at) + 1) + 1
    return UserError(f"{name}:{line}:{column}: {reason}", ExitCode.DATA, hint="mend the file there")
