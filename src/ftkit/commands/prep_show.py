"""Rows as the model will see them: tokens, their boundaries, and which of them are trained."""

from typing import TYPE_CHECKING, Any

from ftkit import console

if TYPE_CHECKING:
    from ftkit.core.encoding import Encoder

BOUNDARY = "│"


def show_row(encoder: "Encoder", row: dict[str, Any], number: int) -> None:
    """One row as the model sees it, each of its answers: trained tokens marked, a bar between tokens."""
    from ftkit.core.token_lengths import examples_of, token_texts

    for example in examples_of(encoder, row):
        counted = sum(example.counted)
        console.info(f"row {number}: {len(example.ids):,} tokens, {counted:,} of them trained")
        pieces: list[tuple[str, bool]] = []
        for text, trained in token_texts(encoder.tokenizer, example):
            joint = BOUNDARY if pieces else ""
            if pieces and pieces[-1][1] == trained:
                pieces[-1] = (pieces[-1][0] + joint + text, trained)
            else:
                pieces.append((joint + text if pieces and not trained else text, trained))
        console.marked(pieces)
