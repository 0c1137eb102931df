"""A file of training rows, read whole and checked: of one kind, made with one template."""

import sys
from dataclasses import dataclass
from typing import Any

from ftkit import console
from ftkit.errors import ExitCode, UserError
from ftkit.io.jsonl import STDIN, read_rows, source_name
from ftkit.io.records import TRAINED, Kind, check_row, refuse_calls_in_pairs


@dataclass(frozen=True)
class RowFile:
    """Rows, each with its place (`file:line`); `template` is the fingerprint that they carry, if they do."""

    source: str
    rows: list[dict[str, Any]]
    places: list[str]
    kind: Kind
    template: str | None


def read_row_file(source: str, command: str, *, kinds: tuple[Kind, ...] = TRAINED) -> RowFile:
    """All rows of a file or of stdin (`-`); the first bad one is a data error at its place.

    `command` is for hints; `kinds` are those that it can use.
    """
    if source == STDIN and console.is_terminal(sys.stdin):
        hint = f"ftkit {command} rows.jsonl, or: ftkit prep FILE --template alpaca | ftkit {command} -"
        raise UserError("no rows: stdin is a terminal", ExitCode.USAGE, hint=hint)
    name = source_name(source)
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    found: dict[Kind, str] = {}
    for number, row in read_rows(source):
        place = f"{name}:{number}"
        found.setdefault(check_row(row, place, kinds=kinds), place)
        refuse_calls_in_pairs(row, place)
        rows.append(row)
        places.append(place)
    if not rows:
        raise UserError(
            f"{name}: 0 rows", ExitCode.DATA, hint="make some: ftkit prep FILE --template alpaca > rows.jsonl"
        )
    if len(found) > 1:
        first = "; ".join(f"{kind} at {place}" for kind, place in found.items())
        hint = f"{command} takes one kind at a time"
        raise UserError(f"rows of {len(found)} kinds in one file: {first}", ExitCode.DATA, hint=hint)
    return RowFile(name, rows, places, next(iter(found)), one_template(rows, places))


def one_template(rows: list[dict[str, Any]], places: list[str]) -> str | None:
    """The fingerprint that all rows carry; different ones are a data error."""
    named = rows[0].get("template")
    if named is not None and not isinstance(named, str):
        raise UserError(f"{places[0]}: 'template' should be text like alpaca@0123456789ab", ExitCode.DATA)
    for row, place in zip(rows, places, strict=True):
        if row.get("template") != named:
            hint = "use rows of one template at a time"
            raise UserError(
                f"{place}: template {row.get('template')}, the rows before it have {named}", ExitCode.DATA, hint=hint
            )
    return named
