"""What the rows are like: lengths, labels, leaks between parts. Four bytes a row and length, a few dozen a prompt."""

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ftkit.core.row_filters import texts_of
from ftkit.core.splitting import question_digest

BINS = 12
MOST_LABELS = 1_000


@dataclass
class RowStats:
    """Gathers numbers while rows pass."""

    chars: "array[int]" = field(default_factory=lambda: array("L"))
    tokens: "array[int]" = field(default_factory=lambda: array("L"))
    labels: Counter[str] = field(default_factory=Counter)
    """Rows of each label; of the first 1,000."""
    other_labels: int = 0
    """Rows of all others."""
    parts_of_questions: dict[bytes, str] = field(default_factory=dict)
    straddling: Counter[str] = field(default_factory=Counter)
    """Rows whose question also stands in another part."""

    def add(self, row: dict[str, Any], tokens: int | None, part: str | None) -> None:
        """Count one row."""
        self.chars.append(sum(map(len, texts_of(row))))
        if tokens is not None:
            self.tokens.append(tokens)
        if "label" in row:
            label = str(row["label"])
            if label in self.labels or len(self.labels) < MOST_LABELS:
                self.labels[label] += 1
            else:
                self.other_labels += 1
        digest = question_digest(row) if part is not None else None
        if digest is not None and part is not None:
            first = self.parts_of_questions.setdefault(digest, part)
            if first != part:
                self.straddling[f"{first} and {part}"] += 1

    def summary(self) -> dict[str, Any]:
        """The numbers as JSON."""
        found: dict[str, Any] = {"chars": spread(self.chars)}
        if self.tokens:
            found["tokens"] = spread(self.tokens)
        if self.labels:
            found["labels"] = dict(self.labels.most_common())
        if self.other_labels:
            found["other_labels"] = self.other_labels
        if self.parts_of_questions:
            found["questions_in_two_parts"] = dict(self.straddling)
        return found


def spread(lengths: Sequence[int]) -> dict[str, Any]:
    """Median, 95th percentile, largest, mean, sum, and a histogram as [from, to, count]."""
    ordered = sorted(lengths)
    if not ordered:
        return {}
    return {
        "p50": percentile(ordered, 0.5),
        "p95": percentile(ordered, 0.95),
        "max": ordered[-1],
        "mean": round(sum(ordered) / len(ordered), 1),
        "sum": sum(ordered),
        "histogram": histogram(ordered),
    }


def percentile(ordered: Sequence[int], share: float) -> int:
    """The smallest length that this share of the rows does not exceed (nearest rank)."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def histogram(ordered: Sequence[int]) -> list[list[int]]:
    """[from, to, count] of up to 12 equally wide bins; the last one holds everything beyond the 99th percentile."""
    low, high = ordered[0], percentile(ordered, 0.99)
    width = max(1, math.ceil((high - low + 1) / BINS))
    counts = Counter(min((length - low) // width, BINS - 1) for length in ordered)
    last = max(counts)
    bins = [[low + number * width, low + (number + 1) * width - 1, counts[number]] for number in range(last + 1)]
    bins[-1][1] = max(bins[-1][1], ordered[-1])
    return bins
