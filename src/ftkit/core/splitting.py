"""Which part of a split a row belongs to: decided by its content alone, so adding rows moves no other row."""

import math
import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from orjson import dumps
from xxhash import xxh3_128_digest

from ftkit.errors import ExitCode, UserError

DIGEST_BYTES = 16
"""Two different rows of a thousand million get the same digest with a chance of about 1e-21."""
CONTENT = ("prompt", "completion", "chosen", "rejected", "messages", "tools", "text", "label")
"""The keys of what is trained, in the order in which rows have them."""


def content_of(row: Mapping[str, Any]) -> bytes:
    """What a row teaches (its texts, messages, tools and label) as the JSON that its line begins with, brace open."""
    return dumps({key: row[key] for key in CONTENT if key in row})[:-1]


def content_digest(row: Mapping[str, Any]) -> bytes:
    """16 bytes that stand for what a row teaches: two rows with the same digest are duplicates. BLAKE2b, RFC 7693."""
    return lasting_digest(content_of(row))


def quick_digest(content: bytes) -> bytes:
    """16 bytes that stand for a row's content within one run: XXH3, a twentieth of BLAKE2b's time. It decides no split."""
    return xxh3_128_digest(content)


def lasting_digest(content: bytes) -> bytes:
    """What `content_digest` gives for the row with this content."""
    return blake2b(content, digest_size=DIGEST_BYTES).digest()


def question_digest(row: Mapping[str, Any]) -> bytes | None:
    """16 bytes that stand for what a row asks: its prompt, the turns before the last answer, or the labelled text.

    None for plain text, which asks nothing.
    """
    if "messages" in row:
        return digest_of(row["messages"][:-1])
    if "prompt" in row:
        return digest_of(row["prompt"])
    return digest_of(row["text"]) if "label" in row else None


def digest_of(content: Any) -> bytes:
    """16 bytes of a JSON value."""
    return lasting_digest(dumps(content))


class Stratifier:
    """Gives each row of a stratum to a part that is behind, so a stratum has the shares to within a row or two.

    The rows that came before decide: rows added at the end move none. A draw from the row's content decides between
    parts that are behind, so that the order of the rows makes no pattern. Where equal rows may come, each goes to the
    part of the first, which is remembered (about 100 bytes a row).
    """

    def __init__(self, shares: Mapping[str, float], *, has_duplicates: bool = True) -> None:
        self.shares = shares
        self.counts: dict[str | None, dict[str, int]] = {}
        self.parts: dict[bytes, str] | None = {} if has_duplicates else None

    def part_of(self, digest: bytes, stratum: str | None) -> str:
        """The part for the next row of a stratum."""
        counts = self.counts.setdefault(stratum, dict.fromkeys(self.shares, 0))
        part = self.parts.get(digest) if self.parts is not None else None
        if part is None:
            part = self._due(digest, counts)
            if self.parts is not None:
                self.parts[digest] = part
        counts[part] += 1
        return part

    def _due(self, digest: bytes, counts: Mapping[str, int]) -> str:
        """A part that is behind."""
        total = sum(counts.values()) + 1
        behind = {name: share * total - counts[name] for name, share in self.shares.items()}
        fair = {name: share for name, share in self.shares.items() if behind[name] > 0}
        whole = sum(fair.values())
        part = part_of(digest, {name: share / whole for name, share in fair.items()}, salt=f"stratum {total}"[:16])
        due = max(behind, key=lambda name: behind[name])
        return due if behind[due] >= 1 else part


def position(digest: bytes, salt: str) -> float:
    """Where a digest falls in [0, 1), evenly; splits with different salts are independent of each other."""
    mixed = blake2b(digest, digest_size=8, salt=salt.encode()[:16]).digest()
    return (int.from_bytes(mixed, "big") >> 11) / 2**53  # 53 bits: what a float holds exactly, so never 1.0


def part_of(digest: bytes, shares: Mapping[str, float], salt: str = "prep") -> str:
    """The name of the part that a row with this digest belongs to; shares sum to 1, in a fixed order."""
    at, below = position(digest, salt), 0.0
    for name, share in shares.items():
        below += share
        if at < below:
            return name
    return name  # the sum of the shares may round to just under 1


def parse_shares(text: str) -> dict[str, float]:
    """`train=0.9,valid=0.1` as a table; names are file names, shares are positive and sum to 1."""
    shares: dict[str, float] = {}
    for item in text.split(","):
        name, _, number = (piece.strip() for piece in item.partition("="))
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in shares:
            raise wrong_split(text, f"{name!r} is named twice" if name in shares else f"{name!r} is no name for a part")
        shares[name] = parse_share(number, text)
    if not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        raise wrong_split(text, f"the shares sum to {sum(shares.values()):g}, not to 1")
    return shares


def parse_share(number: str, text: str) -> float:
    """A share between 0 and 1."""
    try:
        share = float(number)
    except ValueError:
        raise wrong_split(text, f"{number!r} is no share") from None
    if not 0 < share <= 1:
        raise wrong_split(text, f"{number} is no share")
    return share


def wrong_split(text: str, reason: str) -> UserError:
    """The error for a --split that cannot be used."""
    return UserError(
        f"--split {text}: {reason}", ExitCode.USAGE, hint="for example --split train=0.9,valid=0.1 -o FOLDER"
    )
