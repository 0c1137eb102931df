"""Rows -> examples no longer than the model may see, with a ledger of what was dropped or cut."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any

from ftkit import faults
from ftkit.core.encoding import Encoder, Example
from ftkit.core.example_store import ExampleStore
from ftkit.errors import ExitCode, UserError
from ftkit.io.records import kind_of

AHEAD = 256
"""Rows whose texts are encoded in one call."""


@dataclass(frozen=True)
class Ledger:
    """What became of the rows: kept whole, dropped, cut, and the answer tokens lost on the way.

    untrained_turns: assistant turns that are context only: the chat template shows them otherwise once others follow.
    """

    rows: int
    kept: int
    dropped: int
    truncated: int
    lost_tokens: int
    longest: int
    """Tokens of the longest example that is kept."""
    tokens: int
    counted: int
    untrained_turns: int = 0


def encode_rows(
    rows: Iterable[tuple[str, dict[str, Any]]], encoder: Encoder, *, max_length: int, overlength: str
) -> tuple[ExampleStore, list[int], Ledger]:
    """(examples, index of the row each came from, ledger). `rows` are (place, row); max_length in tokens.

    A row beyond max_length is dropped, or its answer is cut (`truncate`), but never to nothing. Plain text is cut into
    pieces instead, each beginning with the last token of the one before, so that every token is predicted once.
    """
    examples = ExampleStore()
    origin: list[int] = []
    total = dropped = truncated = lost = untrained = longest = counted = 0
    for number, (place, row) in enumerate(read_ahead(rows, encoder)):
        total += 1
        faults.point("tokenise")
        example, is_text = checked_example(encoder, row, place), kind_of(row) == "text"
        limit = max_length + (kind_of(row) == "classification")  # a class is one more id, which is not fed
        if len(example.ids) > limit > max_length and overlength == "truncate":
            ids = encoder.class_ids(row["text"], max_length)
            pieces = [replace(example, ids=[*ids, example.ids[-1]], counted=[False] * len(ids) + [True])]
        else:
            pieces = fit(example, limit, overlength, is_text=is_text)
        kept = sum(sum(piece.counted) for piece in pieces)
        lost += sum(example.counted) - kept if not is_text else 0
        dropped += not pieces
        truncated += bool(pieces) and len(example.ids) > limit and not is_text
        untrained += untrained_turns(row, example)
        for piece in pieces:
            examples.append(piece)
            longest = max(longest, len(piece.ids))
            counted += sum(piece.counted[1:])
        origin += [number] * len(pieces)
    tokens = len(examples.ids)
    return (
        examples,
        origin,
        Ledger(total, total - dropped, dropped, truncated, lost, longest, tokens, counted, untrained),
    )


def read_ahead(rows: Iterable[tuple[str, dict[str, Any]]], encoder: Encoder) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same rows; the encoder has seen each a little before it comes."""
    waiting = iter(rows)
    while some := list(islice(waiting, AHEAD)):
        encoder.read_ahead([row for _, row in some])
        yield from some


def untrained_turns(row: dict[str, Any], example: Example) -> int:
    """Assistant turns of a conversation that carry no loss; each that does is one stretch of counted tokens."""
    if kind_of(row) != "messages":
        return 0
    starts = sum(now and not before for before, now in pairwise([False, *example.counted]))
    return [message["role"] for message in row["messages"]].count("assistant") - starts


def fit(example: Example, max_length: int, overlength: str, *, is_text: bool) -> list[Example]:
    """The example if it is short enough, otherwise what is left of it: nothing, a cut answer, or pieces of a text."""
    if len(example.ids) <= max_length:
        return [example] if any(example.counted[1:]) else []
    if is_text:
        cuts = range(0, len(example.ids) - 1, max_length - 1)
        return [part_of(example, at, at + max_length) for at in cuts]
    if overlength == "truncate":
        cut = part_of(example, 0, max_length)
        return [cut] if any(cut.counted[1:]) else []
    return []


def join_documents(pieces: Iterable[Example], origin: Iterable[int], max_length: int) -> Sequence[Example]:
    """Pieces of plain texts, in order, as one stream cut into rows of max_length: attention then crosses documents.

    origin: the text that each piece is of. The same tokens are counted as without joining: the first of a document never.
    """
    joined = ExampleStore()
    ids: list[int] = []
    counted: list[bool] = []
    before = None
    for piece, number in zip(pieces, origin, strict=True):
        begins = number != before
        ids += piece.ids if begins else piece.ids[1:]  # a piece begins with the last token of the one before
        counted += [False, *piece.counted[1:]] if begins else piece.counted[1:]
        before = number
        while len(ids) > max_length:  # the last token of a row is the first of the next
            joined.append(Example(ids[:max_length], counted[:max_length]))
            ids, counted = ids[max_length - 1 :], counted[max_length - 1 :]
    if len(joined) or any(counted[1:]):
        joined.append(Example(ids, counted))
    return joined


def part_of(example: Example, start: int, end: int) -> Example:
    """The tokens from start to end."""
    return replace(example, ids=example.ids[start:end], counted=example.counted[start:end])


def checked_example(encoder: Encoder, row: dict[str, Any], place: str) -> Example:
    """The row's example; one that begins with two BOS, or whose answer does not end in a stop token, is refused."""
    try:
        example = encoder.example(row)
    except UserError as error:
        raise UserError(f"{place}: {error.message}", error.exit_code, hint=error.hint) from None
    bos = encoder.tokenizer.bos_token_id
    if bos is not None and bos != encoder.tokenizer.eos_token_id and example.ids[:2] == [bos, bos]:
        raise UserError(
            f"{place}: begins with two BOS tokens (ids {example.ids[:4]})",
            ExitCode.MODEL,
            hint="take bos_token out of the template",
        )
    if kind_of(row) == "classification":
        return example
    last = next((at for at in reversed(range(len(example.ids))) if example.counted[at]), None)
    if last is None:
        raise UserError(
            f"{place}: no answer, nothing to learn",
            ExitCode.DATA,
            hint="the template shows no assistant turn of this row to train",
        )
    if example.ids[last] not in encoder.stop_ids:
        raise UserError(
            f"{place}: the answer does not end in a stop token",
            ExitCode.DATA,
            hint="close the turn with eos_token in the template",
        )
    return example
