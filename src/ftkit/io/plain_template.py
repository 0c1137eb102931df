"""Templates that only put fields into text, as Python expressions: the same text as Jinja's in a tenth of the time."""

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

Build = Callable[[Mapping[str, Any]], dict[str, str] | None]


def builder(sources: Mapping[str, str], condition: str, results: Mapping[str, str]) -> Build:
    """A function of a record: each key of `results` with the value of its expression; None where `condition` fails.

    `sources` are expressions of `record` that fill `fields`, of which the other expressions are. The function raises
    KeyError for a missing value and TypeError for one that is no text.
    """
    made = f"lambda fields: {dict_of(results)} if {condition} else None"
    # names and texts have gone through repr: nothing of a template or a table is executed
    return eval(f"lambda record: ({made})({dict_of(sources)})", {"__builtins__": {}})  # type: ignore[no-any-return]


def dict_of(expressions: Mapping[str, str]) -> str:
    """The source of a dict with the values of expressions."""
    return "{" + ", ".join(f"{key!r}: {expression}" for key, expression in expressions.items()) + "}"


def expression_of(environment: ImmutableSandboxedEnvironment, source: str) -> str | None:
    """A template's text as an expression of `fields`; None where it does more than put and choose fields."""
    return joined(environment.parse(source).body)


def joined(body: list[nodes.Node]) -> str | None:
    """The source of an expression for a piece of template."""
    parts: list[str] = []
    for node in body:
        pieces = node.nodes if isinstance(node, nodes.Output) else [node]
        for piece in pieces:
            part = written(piece)
            if part is None:
                return None
            parts.append(part)
    return f"''.join(({', '.join(parts)},))" if len(parts) > 1 else "".join(parts) or "''"  # half the time of +


def written(node: nodes.Node) -> str | None:
    """The source for one node: text, a field, or a choice by whether a field is filled."""
    if isinstance(node, nodes.TemplateData):
        return repr(node.data)
    if isinstance(node, nodes.Name) and node.ctx == "load":
        return f"fields[{node.name!r}]"
    if isinstance(node, nodes.If) and isinstance(node.test, nodes.Name) and not node.elif_:
        then, otherwise = joined(node.body), joined(node.else_)
        if then is not None and otherwise is not None:
            return f"({then} if fields[{node.test.name!r}] else {otherwise})"
    return None
