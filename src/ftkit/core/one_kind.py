"""The rows of one input are of one kind: keys that tell of another are never passed over without a word."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ftkit.core.columns import BadValue, is_filled

TELLING = ("label", "chosen", "rejected", "messages", "conversations", "tools")
"""Keys that make a row one of another kind, or say what its answer is worth."""


@dataclass(frozen=True)
class OneKind:
    """What the first record has decided for all: a telling key that it does not have may not come up later."""

    since: str
    """file:line of the first record."""
    unused: tuple[str, ...]
    """Telling keys of the first record, or of a table, that no row uses: to be said."""
    refused: tuple[str, ...]

    @classmethod
    def of(cls, first: Mapping[str, Any], since: str, used: Collection[str], *, is_table: bool) -> "OneKind":
        """For an input that begins with this record, whose rows use these keys."""
        others = [key for key in TELLING if key not in used]
        unused = tuple(key for key in others if (key in first if is_table else is_filled(first.get(key))))
        return cls(since, unused, tuple(key for key in others if key not in unused))

    def check(self, values: Mapping[str, Any], where: str) -> None:
        """A data error for a record with a telling key that is new: a bad answer would pass for a good one.

        A `label` of true or false is new where the rows are not taken for good and bad answers.
        """
        for key in (*self.refused, *self.unused):
            if key in values and (is_filled(values[key]) if key in self.refused else isinstance(values[key], bool)):
                reason = f"has '{key}': another kind of row than those from {self.since} on"
                raise BadValue(where, key, reason, "prepare rows of each kind on their own, each into its own file")
