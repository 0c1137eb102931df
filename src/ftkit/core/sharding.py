"""A part of the records for each of several jobs: by their content, so that no job needs to know of the others."""

import re
from dataclasses import dataclass

from orjson import dumps
from xxhash import xxh3_64_intdigest

from ftkit.errors import ExitCode, UserError
from ftkit.io.tables import Fault, Record


@dataclass(frozen=True)
class Shard:
    """Part `number` (from 1) of `count`. Equal records are in the same part, of any input, on any machine."""

    number: int
    count: int

    def holds(self, item: Record | Fault) -> bool:
        """True if a record belongs to this part; one that cannot be read does by its text."""
        content = dumps(item.values, default=str) if isinstance(item, Record) else item.raw.encode()
        return xxh3_64_intdigest(content) % self.count == self.number - 1


def parse_shard(text: str) -> Shard:
    """`2/8` as part 2 of 8."""
    matched = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    number, count = map(int, matched.groups()) if matched else (0, 0)
    if not 1 <= number <= count:
        raise UserError(f"--shard {text} is no part", ExitCode.USAGE, hint="--shard 1/8 to --shard 8/8")
    return Shard(number, count)
