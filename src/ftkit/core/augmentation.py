"""Records through a function of the user's own: one in, none, one or several out."""

from collections.abc import Callable, Mapping
from typing import Any

from ftkit.errors import ExitCode, UserError
from ftkit.io.records import type_name

Augment = Callable[[Mapping[str, Any], str], list[tuple[dict[str, Any], bool]]]
"""A record and its place -> records, and whether each was made or changed."""


def augmenter(function: Callable[..., Any], address: str) -> Augment:
    """The function with its results checked. It takes a record (a dict of columns) and returns a list of records."""

    def augment(values: Mapping[str, Any], where: str) -> list[tuple[dict[str, Any], bool]]:
        try:
            found = function(dict(values))
            records = [found] if isinstance(found, dict) else list(found or [])
        except Exception as error:  # whatever the user's code raises
            raise UserError(f"{where}: --augment: {type(error).__name__}: {error}", ExitCode.DATA) from None
        for record in records:
            if not isinstance(record, dict):
                raise UserError(
                    f"{where}: --augment: {address} gave {type_name(record)}, should give a list of records",
                    ExitCode.DATA,
                    hint="return [record, ...]; a record is a dict of columns",
                )
        return [(record, record != values) for record in records]

    return augment
