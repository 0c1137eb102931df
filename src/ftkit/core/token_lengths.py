"""How many tokens a row has for a model, and what becomes of a row that has too many."""

from dataclasses import dataclass
from typing import Any, Literal

from ftkit.core.encoding import Encoder, Example
from ftkit.errors import ExitCode, UserError

Row = dict[str, Any]


@dataclass(frozen=True)
class Fitted:
    """A row that is short enough, or None; answer tokens lost on the way; whether something was cut."""

    row: Row | None
    tokens: int
    lost_tokens: int = 0
    was_cut: bool = False
    error: UserError | None = None
    """Why a row that is too long is rejected."""


@dataclass(frozen=True)
class TokenLimit:
    """Rows of at most `most` tokens (no limit: None), as this encoder counts them."""

    encoder: Encoder
    most: int | None
    overlength: Literal["drop", "truncate", "error"]

    def fit(self, row: Row, where: str) -> Fitted:
        """The row if it is short enough; otherwise what --overlength says. A row is never cut to nothing."""
        try:
            example = longest_example(self.encoder, row)
        except UserError as error:
            raise UserError(f"{where}: {error.message}", error.exit_code, hint=error.hint) from None
        tokens = len(example.ids)
        if self.most is None or tokens <= self.most:
            return Fitted(row, tokens)
        answer = sum(example.counted)
        if self.overlength == "drop":
            return Fitted(None, tokens, answer)
        if self.overlength == "error":
            reason, hint = f"--max-tokens is {self.most:,}", "--overlength drop or truncate"
        elif is_preference(row):
            reason, hint = f"--max-tokens is {self.most:,}, and answers to be compared are not cut", "--overlength drop"
        elif (shorter := self.cut(row)) is None:
            reason, hint = (
                f"and cut to {self.most:,} no answer would be left",
                "a larger --max-tokens; --overlength drop",
            )
        else:
            left = longest_example(self.encoder, shorter)
            return Fitted(shorter, len(left.ids), answer - sum(left.counted), was_cut=True)
        refusal = UserError(f"{where}: {tokens:,} tokens, {reason}", ExitCode.DATA, hint=hint)
        return Fitted(None, tokens, answer, error=refusal)

    def cut(self, row: Row) -> Row | None:
        """The row with its answer cut to fit: later turns of a conversation go first; None if no answer is left."""
        if "messages" in row:
            return self.cut_messages(row)
        for key in ("completion", "text"):
            if isinstance(row.get(key), str):
                return self.longest_fitting(row, key)
        return None

    def cut_messages(self, row: Row) -> Row | None:
        """The longest beginning of a conversation that fits and ends with an answer."""
        turns = row["messages"]
        for end in range(len(turns) - 1, 0, -1):
            shorter = {**row, "messages": turns[:end]}
            is_answered = turns[end - 1]["role"] == "assistant" and not turns[end - 1].get("tool_calls")
            if is_answered and len(longest_example(self.encoder, shorter).ids) <= (self.most or 0):
                return shorter
        return None

    def longest_fitting(self, row: Row, key: str) -> Row | None:
        """The row with the longest beginning of a text that fits, found by halving; a word may be cut."""
        text, fits = row[key], 0
        too_long = len(text)
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if len(longest_example(self.encoder, {**row, key: text[:middle]}).ids) <= (self.most or 0):
                fits = middle
            else:
                too_long = middle
        return {**row, key: text[:fits]} if text[:fits].strip() else None


def longest_example(encoder: Encoder, row: Row) -> Example:
    """The row as the model sees it; of a pair of answers the longer one; of a labelled text the text."""
    return max(examples_of(encoder, row), key=lambda example: len(example.ids))


def is_preference(row: Row) -> bool:
    """True for a pair of answers, and for one that is labelled good or bad."""
    return "chosen" in row or isinstance(row.get("label"), bool)


def examples_of(encoder: Encoder, row: Row) -> list[Example]:
    """A row's examples: one, or one for each answer of a preference."""
    if is_preference(row):
        answers = [row[key] for key in ("chosen", "rejected", "completion") if key in row]
        if isinstance(row["prompt"], list):
            return [encoder.example({"messages": [*row["prompt"], *answer]}) for answer in answers]
        return [encoder.example({"prompt": row["prompt"], "completion": answer}) for answer in answers]
    return [encoder.example({"text": row["text"]} if "label" in row else row)]


def token_texts(tokenizer: Any, example: Example) -> list[tuple[str, bool]]:
    """(text, is trained) for each token; tokens that only together make up a character stand as one."""
    pieces: list[tuple[str, bool]] = []
    waiting: list[int] = []
    seen: list[int] = []
    for number, (token, trained) in enumerate(zip(example.ids, example.counted, strict=True)):
        waiting.append(token)
        seen = [*seen[-16:], token]
        text = decoded(tokenizer, [*seen[: -len(waiting)], *waiting])
        context = decoded(tokenizer, seen[: -len(waiting)])
        piece = text[len(context) :] if text.startswith(context) else decoded(tokenizer, waiting)
        if piece.endswith("\ufffd") and len(waiting) < 8 and number + 1 < len(example.ids):
            continue
        pieces.append((piece, trained))
        waiting = []
    return pieces


def decoded(tokenizer: Any, ids: list[int]) -> str:
    """The text of ids as they stand."""
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) if ids else ""
