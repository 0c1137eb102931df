"""What the columns of a table are called where it does not say so."""

from collections.abc import Sequence
from string import ascii_lowercase


def numbered(cells: Sequence[str]) -> list[str]:
    """Names for the columns of a table without a header: their numbers, from 1."""
    return [str(number) for number in range(1, len(cells) + 1)]


def nameless(number: int) -> str:
    """What a column without a name is called."""
    return f"column {number}"


def stand_ins(count: int) -> str:
    """Names to show for this many columns, as --columns takes them."""
    return ",".join(ascii_lowercase[:count] if count <= len(ascii_lowercase) else (f"c{n + 1}" for n in range(count)))
