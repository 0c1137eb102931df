"""The rows of `ftkit train`: read, checked, turned into examples, some of them held out."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import orjson

from ftkit import console
from ftkit.core.encoding import Encoder, Example
from ftkit.core.examples import Ledger, encode_rows
from ftkit.core.holdout import content_hash, hold_out
from ftkit.core.settings import TrainSettings
from ftkit.errors import ExitCode, UserError
from ftkit.io.jsonl import STDIN
from ftkit.io.row_file import RowFile, read_row_file
from ftkit.io.template import Template
from ftkit.io.template_files import load_template, template_of_rows


@dataclass(frozen=True)
class Data:
    """The rows of a run, checked: each with its place (file:line), all of one kind and one template."""

    source: str
    rows: list[dict[str, Any]]
    places: list[str]
    kind: str
    template: Template | None
    sha256: str


def read_data(settings: TrainSettings) -> Data:
    """All rows of DATA or stdin; the first bad one stops with its place."""
    file = read_row_file(settings.data or STDIN, "train")
    if (settings.data or STDIN) == STDIN:
        console.info(f"{len(file.rows):,} rows from stdin")
    if len(file.rows) > 1 and all(row == file.rows[0] for row in file.rows):
        console.warn(f"all {len(file.rows):,} rows are the same")
    given = load_template(settings.template) if settings.template else None
    template = template_of_rows(file.template, given) if file.template else given
    return Data(file.source, file.rows, file.places, file.kind, template, rows_sha256(file.rows))


def rows_sha256(rows: list[dict[str, Any]]) -> str:
    """Of the rows in their order, in hex; the order of a row's keys does not count."""
    return hashlib.sha256(b"\n".join(orjson.dumps(row, option=orjson.OPT_SORT_KEYS) for row in rows)).hexdigest()


def settle_objective(settings: TrainSettings, data: Data) -> Any:
    """sft or text, by the rows; asking for the one that they are not is a data error."""
    found = "text" if data.kind == "text" else "sft"
    if settings.objective not in ("auto", found):
        raise UserError(
            f"--objective {settings.objective}: the rows of {data.source} are for {found}",
            ExitCode.DATA,
            hint="--objective text takes rows with a text, sft takes prompt and completion, or messages",
        )
    return found


def make_examples(
    settings: TrainSettings, data: Data, encoder: Encoder
) -> tuple[list[Example], list[dict[str, Any]], list[Example], Ledger]:
    """(examples to train, rows held out, their examples, ledger of all rows)."""
    examples, origin, ledger = encode(settings, encoder, data.rows, data.places)
    warn_of_losses(data.source, ledger, settings.max_length)
    if not examples:
        raise UserError(
            f"{data.source}: no row fits into {settings.max_length} tokens with something to learn",
            ExitCode.DATA,
            hint="a longer --max-length, or shorter prompts",
        )
    share = share_of(settings.valid)
    if share is None:
        return examples, *read_held_out(settings, data, encoder), ledger
    kept = sorted(set(origin))  # a long text is one row of many examples, all on one side
    held = {kept[place] for place in hold_out([data.rows[i] for i in kept], share)[1]}
    train, valid = (
        [example for example, i in zip(examples, origin, strict=True) if (i in held) is side] for side in (False, True)
    )
    return train, [data.rows[i] for i in sorted(held)], [replace(example, weight=1.0) for example in valid], ledger


def read_held_out(settings: TrainSettings, data: Data, encoder: Encoder) -> tuple[list[dict[str, Any]], list[Example]]:
    """(rows, their examples) of the file that --valid names."""
    file = read_row_file(settings.valid, "train")
    rows, places = file.rows, file.places
    require_same_template(data, file)
    trained = {content_hash(row) for row in data.rows}
    if known := sum(content_hash(row) in trained for row in rows):
        console.warn(
            f"{settings.valid}: {known:,} of {len(rows):,} rows are in the training data too: their loss says little"
        )
    examples, origin, ledger = encode(settings, encoder, rows, places)
    warn_of_losses(settings.valid, ledger, settings.max_length)
    return [rows[i] for i in sorted(set(origin))], [replace(example, weight=1.0) for example in examples]


def warn_of_losses(source: str, ledger: Ledger, max_length: int) -> None:
    """Rows that are not used as they stand are said and counted, never silent."""
    fates = [f"{ledger.dropped:,} dropped"] if ledger.dropped else []
    fates += [f"{ledger.truncated:,} cut, so without a trained stop"] if ledger.truncated else []
    if fates:
        console.warn(
            f"{source}: of {ledger.rows:,} rows, beyond {max_length} tokens: {', '.join(fates)}"
            f" ({ledger.lost_tokens:,} answer tokens lost)"
        )
    if ledger.untrained_turns:
        why = "they begin the conversation, or the chat template changes them once others follow"
        console.warn(f"{source}: {ledger.untrained_turns:,} assistant turns are context only: {why}")


def encode(
    settings: TrainSettings, encoder: Encoder, rows: list[dict[str, Any]], places: list[str]
) -> tuple[list[Example], list[int], Ledger]:
    """Rows as examples of at most --max-length tokens."""
    return encode_rows(
        zip(places, rows, strict=True), encoder, max_length=settings.max_length, overlength=settings.overlength
    )


def share_of(valid: str) -> float | None:
    """--valid as a share of the rows; None if it names a file."""
    try:
        share = float(valid)
    except ValueError:
        return None
    if not 0 <= share < 1:
        raise UserError(f"--valid {valid} is out of range", ExitCode.USAGE, hint="a share from 0 to below 1, or a file")
    return share


def require_same_template(data: Data, held_out: RowFile) -> None:
    """Held-out rows must be made with the template of the training rows."""
    ours = data.rows[0].get("template")
    if held_out.template != ours:
        raise UserError(
            f"{held_out.places[0]}: template {held_out.template}, the training rows have {ours}",
            ExitCode.DATA,
            hint="prepare both files alike",
        )
