"""Values inside values: `meta.title`, `answers.0.text`; and the list of records inside a JSON object."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ftkit.errors import ExitCode, UserError
from ftkit.io.json_array import broken, end_of_value, skip_space

MISSING = object()


def look_up(values: Any, path: str) -> Any:
    """The value at a dotted path (`answers.0.text`); MISSING where there is none."""
    for part in path.split("."):
        if isinstance(values, Mapping) and part in values:
            values = values[part]
        elif isinstance(values, list) and part.isdecimal() and int(part) < len(values):
            values = values[int(part)]
        else:
            return MISSING
    return values


def dotted_names(columns: Sequence[str], sample: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[str]:
    """The dotted paths that --map texts name and some record of the sample has, but no column is called."""
    import re

    asked = [name for text in texts for name in (text, *re.findall(r"\{([^{}]*)\}", text))]
    paths = [name for name in dict.fromkeys(asked) if "." in name and name not in columns]
    return [path for path in paths if any(look_up(record, path) is not MISSING for record in sample)]


def with_nested(values: Mapping[str, Any], paths: Sequence[str]) -> Mapping[str, Any]:
    """The record with these dotted paths as columns of their own."""
    found = {path: look_up(values, path) for path in paths}
    return {**values, **{path: value for path, value in found.items() if value is not MISSING}}


def find_list(text: str, path: str, name: str) -> int:
    """Where the list at a dotted path begins in the JSON text of an object; its absence is a data error."""
    at = skip_space(text, 0)
    for part in path.split("."):
        at = find_key(text, at, part, name, path)
    if text[at : at + 1] != "[":
        raise broken(text, at, name, f"--records {path}: no list of records begins here")
    return at


def find_key(text: str, at: int, key: str, name: str, path: str) -> int:
    """Where the value of a key begins, in the object that begins at `at`."""
    if text[at : at + 1] != "{":
        raise broken(text, at, name, f"--records {path}: no object begins here")
    start, keys = at, list[str]()
    at = skip_space(text, at + 1)
    while text[at : at + 1] == '"':
        end = end_of_value(text, at, name)
        found = str(json.loads(text[at:end], strict=False))
        keys.append(found)
        at = skip_space(text, end)
        if text[at : at + 1] != ":":
            raise broken(text, at, name, "a colon is missing")
        at = skip_space(text, at + 1)
        if found == key:
            return at
        at = skip_space(text, end_of_value(text, at, name))
        if text[at : at + 1] == ",":
            at = skip_space(text, at + 1)
    line = text.count("\n", 0, start) + 1
    raise UserError(
        f"{name}:{line}: no key '{key}'", ExitCode.DATA, hint=f"--records takes one of: {', '.join(keys) or 'none'}"
    )
