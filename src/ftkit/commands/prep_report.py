"""What prep tells: the summary, the statistics, rows as the model sees them, the shipped templates."""

import sys
from typing import TYPE_CHECKING, Any

import orjson

from ftkit import console
from ftkit.core.prep_settings import PrepSettings
from ftkit.core.row_ledger import SHOWN_OF_A_KIND, Ledger
from ftkit.core.row_stats import RowStats
from ftkit.io.template_files import load_template, shipped_names

if TYPE_CHECKING:
    from ftkit.commands.prep_rows import Preparation

SCHEMA = "ftkit.prep/1"
TEMPLATES_SCHEMA = "ftkit.templates/1"
BAR_WIDTH = 40
SHOWN_LABELS = 20
SHOWN_CLUSTERS = 5
BOUNDARY = "│"


def report(settings: PrepSettings, work: "Preparation", stats: RowStats | None, leaks: list[int]) -> None:
    """The summary, whose sum always holds, and what a person should be warned of."""
    ledger = work.ledger
    assert ledger.is_balanced, "rows were lost"
    warn_of(ledger, settings, leaks)
    if work.near is not None and work.near.clusters:
        largest = ", ".join(f"{place} ({n:,})" for place, n in work.near.clusters.most_common(SHOWN_CLUSTERS))
        console.info(f"near duplicates: {len(work.near.clusters):,} clusters; the largest are those of {largest}")
    if ledger.mixed:
        total = ledger.mixed.total()
        shares = (f"{name} {count:,} ({count / total:.2%})" for name, count in ledger.mixed.items())
        console.info(f"mixed: {', '.join(shares)}")
    if stats is not None and not settings.json:
        show_stats(stats)
    console.info(ledger.sum_line())
    if settings.json:
        found = summary(settings, work, stats, leaks)
        sys.stdout.buffer.write(orjson.dumps(found, option=orjson.OPT_APPEND_NEWLINE))


def warn_of(ledger: Ledger, settings: PrepSettings, leaks: list[int]) -> None:
    """What is not as a person may expect."""
    for reason, count in ledger.reasons.items():
        if count > SHOWN_OF_A_KIND:
            console.warn(f"left out: {count - SHOWN_OF_A_KIND:,} more: {reason}")
    if ledger.misread:
        console.warn(
            f"{ledger.misread:,} rows look like UTF-8 that was read as Latin-1, for example {ledger.misread_example}"
        )
    if ledger.special:
        console.warn(
            f"{ledger.special:,} rows hold text that looks like a special token, for example "
            f"{ledger.special_example}; it is trained as plain text"
        )
    if ledger.out == 1 and ledger.duplicates:
        console.warn(f"all {ledger.rows_in - ledger.rejected:,} rows are the same")
    if ledger.beyond:
        console.warn(f"longer than --max-tokens: {ledger.beyond}, {ledger.lost_tokens:,} answer tokens lost")
    if sum(leaks):
        console.warn(f"leak: {leaks[0]:,} rows are also in {settings.against}, {leaks[1]:,} more ask the same")
    if settings.shard and not ledger.out:
        console.warn(f"no row falls into shard {settings.shard}: the output is empty")
    empty = [name for name, count in ledger.parts.items() if not count]
    if empty and ledger.out:
        console.warn(f"no row fell into {', '.join(empty)}: there are too few rows")


def summary(settings: PrepSettings, work: "Preparation", stats: RowStats | None, leaks: list[int]) -> dict[str, Any]:
    """The counts as one JSON object."""
    ledger = work.ledger
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "in": ledger.rows_in,
        "made": ledger.made,
        "out": ledger.out,
        "rejected": ledger.rejected,
        "duplicates": ledger.duplicates,
        "near_duplicates": ledger.near_duplicates,
        "filtered": dict(ledger.filtered),
        "not_sampled": ledger.not_sampled,
        "truncated": ledger.truncated,
        "lost_tokens": ledger.lost_tokens,
        "special_tokens_as_text": ledger.special,
        "kind": work.first[0].kind if work.first else None,
        "template": work.template.fingerprint if work.template else None,
        "shard": settings.shard,
        "output": settings.output,
        "parts": dict(ledger.parts),
        "mixed": dict(ledger.mixed),
        "reasons": dict(ledger.reasons),
    }
    if settings.against:
        found["leaks"] = {"rows": leaks[0], "questions": leaks[1]}
    if stats is not None:
        found["stats"] = stats.summary()
    return found


def show_stats(stats: RowStats) -> None:
    """Lengths, their histogram, labels and leaks between parts, on stderr."""
    found = stats.summary()
    for unit in ("chars", "tokens"):
        if numbers := found.get(unit):
            console.info(
                f"{unit} a row: median {numbers['p50']:,}, 95 % up to {numbers['p95']:,}, longest {numbers['max']:,}, "
                f"{numbers['sum']:,} in all"
            )
            most = max(count for _, _, count in numbers["histogram"])
            for low, high, count in numbers["histogram"]:
                bar = "█" * round(count / most * BAR_WIDTH) or ("▏" if count else "")
                console.info(f"{low:>9,} to {high:>9,}  {bar} {count:,}")
    labels = stats.labels.most_common()
    for label, count in labels[:SHOWN_LABELS]:
        console.info(f"label {label}: {count:,} ({count / len(stats.chars):.1%})")
    if len(labels) > SHOWN_LABELS:
        console.info(
            f"and {len(labels) - SHOWN_LABELS:,} more labels; the rarest is {labels[-1][0]}: {labels[-1][1]:,}"
        )
    if stats.other_labels:
        console.info(f"labels beyond the first {len(labels):,} were not told apart: {stats.other_labels:,} rows")
    for parts, count in stats.straddling.items():
        console.warn(f"leak: {count:,} rows ask what is also asked in the other part of {parts}")


def show_templates(settings: PrepSettings) -> None:
    """The shipped templates on stdout: name, kind, fields, what it is."""
    templates = [load_template(name) for name in shipped_names()]
    if settings.json:
        listed = [
            {
                "name": each.name,
                "fingerprint": each.fingerprint,
                "kind": each.kind,
                "required": each.required,
                "optional": each.optional,
                "stop": each.stop,
                "description": each.description,
            }
            for each in templates
        ]
        found = {"schema": TEMPLATES_SCHEMA, "templates": listed}
        sys.stdout.buffer.write(orjson.dumps(found, option=orjson.OPT_APPEND_NEWLINE))
        return
    for each in templates:
        fields = ", ".join([*each.required, *(f"[{name}]" for name in each.optional)])
        sys.stdout.write(f"{each.name:<12} {each.kind:<14} {fields:<28} {each.description}\n")
