"""The words of a command line read without pydantic, which typer loads for them: loading it takes a tenth of a second."""

import re
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import typer

UNKNOWN = object()
"""Not a plain value of its type: typer reads it, and words what is wrong with it."""
NUMBER = {int: re.compile(r"-?[0-9]{1,18}"), float: re.compile(r"-?[0-9]{1,18}(\.[0-9]{1,18})?(e-?[0-9]{1,2})?")}


class QuickValue:
    """In place of typer's reader of one parameter, which it asks where the value is not plain."""

    def __init__(self, kind: Any, own: Callable[[], Any]) -> None:
        self.kind = kind
        self.own = own

    def coerce(self, value: Any, *, param: Any, ctx: Any) -> Any:
        """The value as its parameter's type."""
        quick = plain(value, self.kind)
        return self.own().coerce(value, param=param, ctx=ctx) if quick is UNKNOWN else quick


def read_quickly(group: Any) -> None:
    """Let all parameters of all commands be read so, where this version of typer has a reader for each."""
    for command in (group, *group.commands.values()):
        for parameter in command.get_params(typer.Context(command)):
            own = getattr(parameter, "get_runtime_param", None)
            if own is not None:
                quick = QuickValue(parameter.type_descriptor.annotation, own)
                parameter.get_runtime_param = lambda quick=quick: quick


def plain(value: Any, kind: Any) -> Any:
    """A default, a text, a word of a choice, a simple number, a list of texts; UNKNOWN for all else."""
    if get_origin(kind) is list:
        texts = () if value is None else value
        is_known = get_args(kind) == (str,) and isinstance(texts, (list, tuple))
        return (texts if value is None else list(texts)) if is_known and all(type(t) is str for t in texts) else UNKNOWN
    if value is None:
        return None
    if get_origin(kind) is Literal:
        return value if value in get_args(kind) else UNKNOWN
    if kind in (str, int, float, bool) and type(value) is kind:
        return value
    if kind in NUMBER and type(value) is str and NUMBER[kind].fullmatch(value):
        return kind(value)
    return UNKNOWN
