"""Tokens that a model did not have: read from a file, added to its tokenizer, given rows in its embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftkit.errors import ExitCode, UserError


@dataclass(frozen=True)
class NewTokens:
    """Tokens beyond a base's vocabulary. ids: theirs now. pieces: for each, the ids that its text had before."""

    texts: tuple[str, ...]
    ids: tuple[int, ...]
    pieces: tuple[tuple[int, ...], ...]

    def give_rows(self, model: Any) -> None:
        """Let embeddings and output head have a row for each token: the mean of the rows of its pieces.

        Rows that a model has without a use (vocabularies are often padded) are taken; where they do not do, it is resized.
        """
        import torch

        rows = max(self.ids) + 1
        if model.get_input_embeddings().weight.shape[0] < rows:
            model.resize_token_embeddings(rows, mean_resizing=False)
            model.requires_grad_(False)
        layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
        with torch.no_grad():
            for layer in layers:  # of tied ones the same rows twice
                for number, pieces in zip(self.ids, () if layer.weight.is_meta else self.pieces, strict=False):
                    layer.weight[number] = layer.weight[list(pieces)].float().mean(0)
                if getattr(layer, "bias", None) is not None:
                    layer.bias[list(self.ids)] = 0

    def trained_rows(self, model: Any, targets: Sequence[str]) -> dict[str, list[int]]:
        """PEFT's `trainable_token_indices`: the embeddings' name, and that of a head of its own -> rows that are trained.

        Refused where PEFT would not train what it saves: a head with an adapter of its own (exit 2) or with biases (4).
        """
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        names = {name: module for name, module in model.named_modules() if module is embeddings or module is head}
        if getattr(head, "bias", None) is not None:
            what = "--add-tokens: this model's output head has biases, which PEFT drops beside trained rows"
            raise UserError(what, ExitCode.MODEL, hint="--full --add-tokens FILE, or leave out --add-tokens")
        for name in names:
            if any(name == target or name.endswith("." + target) for target in targets):
                what = f"--targets: {name} gets trained rows for new tokens, and no adapter beside them"
                raise UserError(what, ExitCode.USAGE, hint="leave it out: --targets all-linear")
        is_tied = head is not None and head.weight is embeddings.weight
        return {name: list(self.ids) for name, module in names.items() if module is embeddings or not is_tied}

    def count_used(self, rows: Sequence[Sequence[int]]) -> int:
        """How many of them are in any of the rows of ids."""
        return len(set(self.ids) & {number for row in rows for number in row})


def add_new_tokens(tokenizer: Any, texts: Sequence[str], source: str) -> NewTokens:
    """Add tokens to the tokenizer in place; one that it has already is exit 3. source: file whose line n is token n."""
    pieces = []
    for line, text in enumerate(texts, 1):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) == 1 or text in tokenizer.get_vocab():
            what = f"{source}:{line}: the tokenizer has '{text}' as one token already"
            raise UserError(what, ExitCode.DATA, hint="take the line out: rows that hold it train it as it is")
        pieces.append(tuple(ids))
    tokenizer.add_tokens(list(texts))
    return NewTokens(tuple(texts), tuple(tokenizer.convert_tokens_to_ids(list(texts))), tuple(pieces))


def appended_tokens(texts: Sequence[str], vocabulary: int) -> NewTokens:
    """The same where no tokenizer is at hand: each token is a row behind those that there are."""
    return NewTokens(tuple(texts), tuple(range(vocabulary, vocabulary + len(texts))), ((),) * len(texts))


def read_token_file(name: str) -> list[str]:
    """The tokens of a UTF-8 file, one a line: line n is token n. A line that is no token, or one again, is exit 3."""
    try:
        text = Path(name).read_bytes().decode("utf-8-sig")
    except OSError as error:
        what = f"{name}: {error.strerror or error}"
        raise UserError(what, ExitCode.DATA, hint="--add-tokens takes a file with one token a line") from None
    except UnicodeDecodeError as error:
        what = f"{name}: not UTF-8 (byte {error.start})"
        raise UserError(what, ExitCode.DATA, hint=f"iconv -t UTF-8 {name} > tokens.txt") from None
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if lines == [""]:
        raise UserError(f"{name}: empty, no token to add", ExitCode.DATA, hint="write one token a line")
    first: dict[str, int] = {}
    for number, token in enumerate(lines, 1):
        fault, hint = None, "take the line out"
        if not token.strip():
            fault = "an empty line is no token"
        elif token != token.strip():
            fault, hint = (
                f"'{token}' has a space at its end",
                "write the token alone: it is found between spaces by itself",
            )
        elif token in first:
            fault = f"'{token}' is in line {first[token]} already"
        if fault:
            raise UserError(f"{name}:{number}: {fault}", ExitCode.DATA, hint=hint)
        first[token] = number
    return lines
