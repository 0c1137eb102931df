"""Which records are wanted: an expression over their columns; and what a row's texts are."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateSyntaxError, UndefinedError, meta
from jinja2.exceptions import TemplateError

from ftkit.errors import ExitCode, UserError, did_you_mean
from ftkit.io.template import sandbox

Condition = Callable[[Mapping[str, Any], str], bool]
WHOLE = "row"
"""The name under which an expression sees the whole record: row['a b']."""


def parse_where(text: str) -> tuple[Condition, frozenset[str]]:
    """(condition on a record at a place, the columns it names). The language is Jinja's, in its sandbox."""
    environment = sandbox()
    try:
        names = meta.find_undeclared_variables(environment.parse("{{ " + text + " }}"))
        evaluate = environment.compile_expression(text, undefined_to_none=False)
    except TemplateSyntaxError as error:
        raise UserError(
            f"--where {text}: {error.message}",
            ExitCode.USAGE,
            hint="for example --where \"lang == 'en' and output|length > 20\"",
        ) from None

    def holds(values: Mapping[str, Any], where: str) -> bool:
        try:
            return bool(evaluate({**values, WHOLE: values}))
        except UndefinedError as error:
            raise UserError(f"{where}: --where: {error.message}", ExitCode.DATA) from None
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            hint = "values of a table are text: stars|int > 3, price|float > 1.5"
            raise UserError(f"{where}: --where: {error}", ExitCode.DATA, hint=hint) from None

    return holds, frozenset(names) - {WHOLE, *environment.globals}


def check_where(names: frozenset[str], columns: Sequence[str], where: str) -> None:
    """A data error if the expression names a column that no record has."""
    for name in sorted(names):
        if name not in columns:
            hint = f"{did_you_mean(name, list(columns))}columns: {', '.join(columns)}; text stands in quotes"
            raise UserError(f"{where}: --where: no column '{name}'", ExitCode.DATA, hint=hint)


def texts_of(row: Mapping[str, Any]) -> Iterator[str]:
    """The texts of a row, to look at and to count."""
    for key in ("text", "prompt", "completion", "chosen", "rejected", "messages"):
        value = row.get(key)
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from (turn["content"] for turn in value if isinstance(turn.get("content"), str))


def length_option(row: Mapping[str, Any], least: int | None, most: int | None) -> str | None:
    """The option that leaves a row out for its number of characters; None if none does."""
    if least is None and most is None:
        return None
    characters = sum(map(len, texts_of(row)))
    if least is not None and characters < least:
        return "--min-chars"
    return "--max-chars" if most is not None and characters > most else None
