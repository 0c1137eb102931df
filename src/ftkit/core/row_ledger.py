"""Where every row that came in has gone. The sum always holds: nothing is lost, and nothing comes from nowhere."""

from collections import Counter
from dataclasses import dataclass, field

from ftkit.errors import ExitCode, UserError

SHOWN_OF_A_KIND = 5


class NothingLeft(UserError):
    """No row came out."""


@dataclass
class Ledger:
    """rows in + made by --augment = out + rejected + duplicates + filtered + not sampled."""

    rows_in: int = 0
    made: int = 0
    out: int = 0
    rejected: int = 0
    duplicates: int = 0
    near_duplicates: int = 0
    """Of the duplicates, those that are only nearly equal."""
    filtered: Counter[str] = field(default_factory=Counter)
    """Rows left out as asked, by the option that asked for it."""
    not_sampled: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Why rows were rejected, with numbers as N."""
    lines: dict[str, list[int]] = field(default_factory=dict)
    """The first lines of each reason."""
    parts: Counter[str] = field(default_factory=Counter)
    """Rows in each part of a split."""
    mixed: Counter[str] = field(default_factory=Counter)
    """Rows of each weighted input."""
    misread: int = 0
    misread_example: str = ""
    special: int = 0
    """Rows with text that looks like a special token."""
    special_example: str = ""
    too_long: int = 0
    """Rejected rows that were too long."""
    truncated: int = 0
    lost_tokens: int = 0
    """Answer tokens of rows that were too long: cut, dropped or rejected."""

    def take(self, other: "Ledger") -> None:
        """Add what another process has counted of the records that it made rows of."""
        self.rows_in += other.rows_in
        self.made += other.made
        self.too_long += other.too_long
        self.truncated += other.truncated
        self.lost_tokens += other.lost_tokens

    def notice(self, what: str, example: str) -> None:
        """Count a row that looks misread or holds the text of a special token; the first is the example."""
        if what == "misread":
            self.misread += 1
            self.misread_example = self.misread_example or example
        else:
            self.special += 1
            self.special_example = self.special_example or example

    @property
    def beyond(self) -> str:
        """What became of rows that were too long, in words; empty if there are none."""
        counts = {"cut": self.truncated, "dropped": self.filtered["--max-tokens"], "rejected": self.too_long}
        return ", ".join(f"{count:,} rows {what}" for what, count in counts.items() if count)

    @property
    def is_balanced(self) -> bool:
        """True if every row is accounted for."""
        left_out = self.rejected + self.duplicates + self.filtered.total() + self.not_sampled
        return self.rows_in + self.made == self.out + left_out

    def require_rows(self) -> None:
        """Raise a data error if no row came out."""
        if self.out == 0:
            reasons = [self.describe(reason) for reason, _ in self.reasons.most_common(SHOWN_OF_A_KIND)]
            reasons += [f"{count:,} left out by {option}" for option, count in self.filtered.items()]
            reasons += [f"{self.not_sampled:,} not sampled"] if self.not_sampled else []
            hint = "mend the rows, or choose other columns with --map"
            if self.filtered or self.not_sampled:
                hint = "ask for more with --where, --min-chars, --max-chars, --max-tokens or --sample"
            raise NothingLeft(f"0 rows left of {self.rows_in:,}: {'; '.join(reasons)}", ExitCode.DATA, hint=hint)

    def describe(self, reason: str) -> str:
        """A reason, how often it came up and the first lines where."""
        count, lines = self.reasons[reason], ", ".join(map(str, self.lines[reason]))
        return f"{reason} ({count:,} times, lines {lines}{', ...' if count > SHOWN_OF_A_KIND else ''})"

    def sum_line(self) -> str:
        """The sum in words; what did not happen is not in it, but for rejected rows and duplicates."""
        parts = f" ({', '.join(f'{name} {count:,}' for name, count in self.parts.items())})" if self.parts else ""
        made = f" + {self.made:,} made" if self.made else ""
        by = ", ".join(f"{option} {count:,}" for option, count in self.filtered.items())
        filtered = f" + {self.filtered.total():,} filtered ({by})" if self.filtered else ""
        near = f" ({self.near_duplicates:,} of them near)" if self.near_duplicates else ""
        sampled = f" + {self.not_sampled:,} not sampled" if self.not_sampled else ""
        return (
            f"{self.rows_in:,} rows in{made} = {self.out:,} out{parts} + {self.rejected:,} rejected"
            f" + {self.duplicates:,} duplicates{near}{filtered}{sampled}"
        )
