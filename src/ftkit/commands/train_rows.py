"""The rows of `ftkit train`: read, checked, turned into examples, some of them held out."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from ftkit import console
from ftkit.core.classes import balanced_weights, class_names
from ftkit.core.encoding import Encoder, Example
from ftkit.core.example_store import Chosen, ExampleStore
from ftkit.core.examples import Ledger, encode_rows, join_documents
from ftkit.core.holdout import content_hash, held_of
from ftkit.core.train_settings import TrainSettings
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
    if file.kind == "classification":
        template = None  # it shaped rows, not prompts
    return Data(file.source, file.rows, file.places, file.kind, template, rows_sha256(file.rows))


def rows_sha256(rows: list[dict[str, Any]]) -> str:
    """Of the rows in their order, in hex; the order of a row's keys does not count."""
    return hashlib.sha256(b"\n".join(orjson.dumps(row, option=orjson.OPT_SORT_KEYS) for row in rows)).hexdigest()


def settle_objective(settings: TrainSettings, data: Data) -> Any:
    """sft, text or classify, by the rows; asking for one that they are not for is a data error."""
    found = {"text": "text", "classification": "classify"}.get(data.kind, "sft")
    if settings.class_weights != "none" and found != "classify":
        hint = "rows of other kinds may have a 'weight' each; or leave --class-weights out"
        raise UserError(f"--class-weights is for rows with a label; those of {data.source} are for {found}",
                        ExitCode.DATA, hint=hint)  # fmt: skip
    if settings.across and found != "text":
        what = f"--across joins documents; the rows of {data.source} are for {found}"
        raise UserError(what, ExitCode.DATA, hint='give rows of text: {"text": "..."}')
    if settings.train_turns == "last" and data.kind != "messages":
        what = f"--train-turns last is about turns of conversations; the rows of {data.source} are for {found}"
        raise UserError(what, ExitCode.DATA, hint="leave it out, or give rows of messages")
    if settings.objective not in ("auto", found):
        raise UserError(
            f"--objective {settings.objective}: the rows of {data.source} are for {found}",
            ExitCode.DATA,
            hint="--objective text takes rows with a text, classify text and label, sft prompt and completion, or messages",
        )
    return found


def classes_of(settings: TrainSettings, data: Data) -> tuple[str, ...]:
    """The labels of rows with a label, at least two; none of other rows."""
    if data.kind != "classification":
        return ()
    if settings.init:
        hint = "leave --init out: a head for classes goes on a trained model"
        raise UserError("--init trains models that write, the rows have labels", ExitCode.USAGE, hint=hint)
    names = class_names(row["label"] for row in data.rows)
    if len(names) < 2:
        raise UserError(
            f"{data.source}: every row has the label '{names[0]}', nothing to learn",
            ExitCode.DATA,
            hint="give rows of at least two labels",
        )
    return names


def make_examples(
    settings: TrainSettings, data: Data, encoder: Encoder, examples: Sequence[Example], origin: list[int]
) -> tuple[Sequence[Example], list[dict[str, Any]], list[Example]]:
    """(examples to train, rows held out, their examples). origin: the row that each example is of."""
    if not examples:
        raise UserError(
            f"{data.source}: no row fits into {settings.max_length} tokens with something to learn",
            ExitCode.DATA,
            hint="a longer --max-length, or shorter prompts",
        )
    share = share_of(settings.valid)
    if share is None:
        require_every_class(encoder.classes, examples, data.source)
        return as_trained(settings, examples, origin), *read_held_out(settings, data, encoder)
    held = held_of(data.rows, origin, share)
    train, valid = (
        Chosen(examples, (place for place, i in enumerate(origin) if (i in held) is side)) for side in (False, True)
    )
    of_train = [i for i in origin if i not in held]
    require_every_class(encoder.classes, train, data.source)
    held_rows = [data.rows[i] for i in sorted(held)]
    return as_trained(settings, train, of_train), held_rows, [replace(example, weight=1.0) for example in valid]


def require_every_class(names: tuple[str, ...], train: Sequence[Example], source: str) -> None:
    """A label that only held-out rows have cannot be learned."""
    trained = {example.ids[-1] for example in train} if names else set()
    for number, name in enumerate(names):
        if number not in trained:
            raise UserError(
                f"{source}: no row with the label '{name}' is left to train: all are held out, or too long",
                ExitCode.DATA,
                hint="more rows of it, --valid FILE, --valid 0, or a longer --max-length",
            )


def as_trained(settings: TrainSettings, train: Sequence[Example], origin: list[int]) -> Sequence[Example]:
    """The examples of training: of classes with --class-weights, which multiply the rows' own; of text joined (--across)."""
    if settings.across:
        if any(example.weight != 1 for example in train):
            hint = "leave out --across, or the weights"
            raise UserError("--across joins documents, so none can have a weight of its own", ExitCode.DATA, hint=hint)
        return join_documents(train, origin, settings.max_length)
    if settings.class_weights == "none":
        return train
    weights = balanced_weights([example.ids[-1] for example in train])
    return [replace(e, weight=e.weight * weight) for e, weight in zip(train, weights, strict=True)]


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
    warn_of_losses(settings.valid, ledger, settings)
    return [rows[i] for i in sorted(set(origin))], [replace(example, weight=1.0) for example in examples]


def warn_of_losses(source: str, ledger: Ledger, settings: TrainSettings) -> None:
    """Rows that are not used as they stand are said and counted, never silent."""
    fates = [f"{ledger.dropped:,} dropped"] if ledger.dropped else []
    stop = "" if settings.objective == "classify" else ", so without a trained stop"
    fates += [f"{ledger.truncated:,} cut{stop}"] if ledger.truncated else []
    if fates:
        console.warn(
            f"{source}: of {ledger.rows:,} rows, beyond {settings.max_length} tokens: {', '.join(fates)}"
            f" ({ledger.lost_tokens:,} answer tokens lost)"
        )
    if ledger.untrained_turns and settings.train_turns == "all":
        why = "they begin the conversation, or the chat template changes them once others follow"
        console.warn(f"{source}: {ledger.untrained_turns:,} assistant turns are context only: {why}")


def encode(
    settings: TrainSettings, encoder: Encoder, rows: list[dict[str, Any]], places: list[str]
) -> tuple[ExampleStore, list[int], Ledger]:
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
