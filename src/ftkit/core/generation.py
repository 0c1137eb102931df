"""Prompts -> answers: batched or streamed generation with a KV cache, the same for eval and chat.

Legend: B rows, T tokens of a row, V vocabulary.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ftkit.core.decoding import Decoding, SharedStart
from ftkit.core.encoding import decode_answer
from ftkit.core.kept_cache import KeptCaches
from ftkit.core.packing import SHORTEST_SHARED
from ftkit.core.packing_check import window_of
from ftkit.errors import ExitCode, UserError

Finish = Literal["stop", "length"]
BROKEN = "�"
"""What decoders write for bytes that are no whole character (yet)."""
MOST_ROUNDING = 0.05
"""Between batches a row's logits may differ by this share of their spread: bfloat16 rounds so, wrong masks do more."""


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    ids: the generated tokens without the stop token. text: decoded, cut before a stop string.
    finish: `stop` if the model ended it, by a stop token or string; `length` if the limit did.
    """

    ids: list[int]
    text: str
    finish: Finish


class Writing:
    """One answer while it grows: takes tokens, gives the text that can no longer change.

    `next_piece` never gives half a character, nor the beginning of what may become a stop string; pieces joined are
    the text of the answer. An empty prompt becomes the token that begins a text.
    """

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int], stop_ids: Sequence[int], stop_strings: Sequence[str], room: int
    ) -> None:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.tokenizer, self.prompt, self.room = tokenizer, list(prompt) or [start], room
        self.stop_ids, self.stop_strings = frozenset(stop_ids), tuple(filter(None, stop_strings))
        self.ids: list[int] = []
        self.finish: Finish | None = None if room > 0 else "length"
        self.first_at: float | None = None
        self._text = ""
        self._given = 0
        self._known: list[int] = self.prompt
        self._unread: list[int] = []

    def take(self, token: int) -> bool:
        """Add a generated token; False if the answer ends with it. first_at: when the first one came (perf_counter)."""
        self.first_at = self.first_at or time.perf_counter()
        if token in self.stop_ids:
            self.finish = "stop"
            return False
        self.ids.append(token)
        self._unread.append(token)
        if self.stop_strings and self._cut_at_stop():
            self.finish = "stop"
        elif len(self.ids) >= self.room:
            self.finish = "length"
        return self.finish is None

    def next_piece(self) -> str:
        """The text that became certain since the last call; after the end, all that is left."""
        self._read()
        sure = len(self._text) if self.finish else len(self._text) - beginning_of_stop(self._text, self.stop_strings)
        piece = self._text[self._given : sure]
        self._given = max(sure, self._given)
        return piece

    @property
    def answer(self) -> Answer:
        """The answer as far as it goes."""
        self._read()
        return Answer(self.ids, self._text, self.finish or "length")

    def _read(self) -> None:
        """Decode unread tokens once they end in a whole character, behind the tokens read before (for their spaces)."""
        if not self._unread:
            return
        piece = decode_answer(self.tokenizer, self._known, self._unread)
        if self.finish is None and (not piece or piece.endswith(BROKEN)):
            return
        self._text += piece
        self._known, self._unread = self._unread, []

    def _cut_at_stop(self) -> bool:
        self._read()
        cut = cut_before_stop(self._text, self.stop_strings)
        found = len(cut) < len(self._text)
        self._text = cut
        return found


def cut_before_stop(text: str, stop_strings: Sequence[str]) -> str:
    """The text before the first stop string in it; all of it if there is none."""
    found = [at for string in stop_strings if string and (at := text.find(string)) >= 0]
    return text[: min(found)] if found else text


def beginning_of_stop(text: str, stop_strings: Sequence[str]) -> int:
    """How many characters at the end of the text may be the beginning of a stop string."""
    longest = max(map(len, stop_strings), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(string.startswith(text[-length:]) for string in stop_strings):
            return length
    return 0


@dataclass(frozen=True)
class Sampling:
    """How answers are chosen: the likeliest token at temperature 0, else drawn by the seed; at most max_new tokens.

    Drawn from the top_k likeliest (0: all), and of these from as few as together have the probability top_p.
    """

    max_new: int
    temperature: float = 0.0
    seed: int = 42
    top_k: int = 0
    top_p: float = 1.0


def start_of(model: Any, prompts: Sequence[Sequence[int]]) -> SharedStart | None:
    """What all prompts begin with (a template's preamble, examples), computed once; None where that gains or holds not.

    Pads between the start and the rest would move an attention window, so models that have one compute all of it.
    """
    from transformers.cache_utils import DynamicLayer

    shortest = min((len(prompt) for prompt in prompts), default=0) - 1  # of each, one token at least is left to feed
    length = next((at for at, same in enumerate(zip(*prompts, strict=False)) if len(set(same)) > 1), shortest)
    length = min(length, shortest)
    if len(prompts) < 2 or length < SHORTEST_SHARED or window_of(model) is not None:
        return None
    decoding = Decoding(model, [prompts[0][:length]])
    decoding.logits()
    if not decoding.takes_positions or any(type(layer) is not DynamicLayer for layer in decoding.cache.layers):
        return None
    return SharedStart(decoding.width, decoding.cache)


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    stop_strings: Sequence[str] = (),
    max_new: int,
    temperature: float = 0.0,
    seed: int = 42,
    context: int | None = None,
    start: SharedStart | None = None,
) -> list[Answer]:
    """Answers to prompts (ids), generated together, in the order of the prompts; each as it would be alone.

    max_new and context (tokens of prompt and answer together) end an answer with finish `length`.
    start: what all of them begin with, from `start_of` these prompts or more.
    """
    sampling = Sampling(max_new, temperature, seed)
    asked = [Asked(tokenizer, prompt, stop_ids, stop_strings, sampling, context) for prompt in prompts]
    return answer_together(model, asked, start)


@dataclass(frozen=True)
class Asked:
    """A prompt (ids) and all that decides its answer but the model; `adapter` as in `Decoding`."""

    tokenizer: Any
    prompt: Sequence[int]
    stop_ids: Sequence[int]
    stop_strings: Sequence[str]
    sampling: Sampling
    context: int | None = None
    adapter: str | None = None

    def writing(self) -> Writing:
        """An answer that has not begun."""
        room = room_for(self.prompt, self.sampling.max_new, self.context)
        return Writing(self.tokenizer, self.prompt, self.stop_ids, self.stop_strings, room)

    def chooser(self) -> "Chooser":
        """How its tokens are chosen."""
        return chooser(self.sampling, self.prompt)


def answer_together(model: Any, asked: Sequence[Asked], start: SharedStart | None = None) -> list[Answer]:
    """Answers generated in one batch; each as it would be alone."""
    writings = [one.writing() for one in asked]
    choosers = [one.chooser() for one in asked]
    alive = [row for row, writing in enumerate(writings) if writing.finish is None]
    prompts, adapters = [writings[row].prompt for row in alive], [asked[row].adapter for row in alive]
    decoding = Decoding(model, prompts, start, adapters) if alive else None
    while decoding is not None and alive:
        tokens = choose_tokens(decoding.logits(), [choosers[row] for row in alive])
        going = [place for place, row in enumerate(alive) if writings[row].take(tokens[place])]
        decoding.append(tokens)
        if len(going) < len(alive):
            alive = [alive[place] for place in going]
            if alive:
                decoding.keep(going)
    return [writing.answer for writing in writings]


def length_batches(prompts: Sequence[Sequence[int]], rows: int, *, equal_lengths: bool = False) -> list[list[int]]:
    """Places of the prompts in batches of at most `rows`, longest first, so that a lack of memory shows at once.

    equal_lengths: no padding at all, for models that do not honour it.
    """
    batches: list[list[int]] = []
    for place in sorted(range(len(prompts)), key=lambda place: -len(prompts[place])):
        fits = batches and len(batches[-1]) < rows
        if fits and not (equal_lengths and len(prompts[batches[-1][0]]) != len(prompts[place])):
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


def honours_padding(model: Any, prompts: Sequence[Sequence[int]], start: SharedStart | None = None) -> bool:
    """True if the shortest prompt beside the longest has nearly the same next logits as alone.

    Checked by trying: an architecture may ignore attention masks or positions without a word (recurrent ones do).
    """
    short, long = min(filter(None, prompts), key=len, default=()), max(prompts, key=len, default=())
    if len(short) == len(long):
        return True
    alone, together = Decoding(model, [short]).logits()[0], Decoding(model, [short, long], start).logits()[0]
    spread = float(alone.max() - alone.min())
    return float((alone - together).abs().max()) <= MOST_ROUNDING * spread


class Stream:
    """Pieces of one answer as they become certain; joined they are `answer.text`.

    `answer` is what has been generated so far: the whole answer after the last piece, a part after an interruption.
    """

    def __init__(self, writing: Writing, pieces: Iterator[str]) -> None:
        self._writing, self._pieces = writing, pieces

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    @property
    def answer(self) -> Answer:
        """The answer so far."""
        return self._writing.answer

    @property
    def first_at(self) -> float | None:
        """When the first token came, in seconds of perf_counter; None as long as there is none."""
        return self._writing.first_at

    def stop(self) -> None:
        """End the answer with the token that is being computed; safe to call from a signal handler."""
        self._writing.room = 0


def stream_answer(model: Any, asked: Asked, kept: KeptCaches | None = None) -> Stream:
    """One answer, piece by piece: `for piece in (stream := stream_answer(...))`, then `stream.answer`.

    kept: what earlier answers have left, from which this one goes on where it begins alike.
    """
    writing = asked.writing()
    return Stream(writing, stream_pieces(model, asked, writing, kept or KeptCaches()))


def stream_pieces(model: Any, asked: Asked, writing: Writing, kept: KeptCaches) -> Iterator[str]:
    """The text of an answer as it is generated."""
    if writing.finish is not None:
        return
    choose = asked.chooser()
    with kept.decoding(model, asked.adapter, writing.prompt, writing.ids) as decoding:
        while True:
            [token] = choose_tokens(decoding.logits(), [choose])
            goes_on = writing.take(token)
            if piece := writing.next_piece():
                yield piece
            if not goes_on:
                return
            decoding.append([token])


def own_stop_ids(model: Any) -> list[int]:
    """The end tokens that a model's makers wrote into generation_config.json."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def room_for(prompt: Sequence[int], max_new: int, context: int | None) -> int:
    """Tokens that an answer to this prompt may have."""
    return max_new if context is None else min(max_new, context - len(prompt))


Chooser = Callable[[Tensor], int] | None
"""Logits (V,) of a row -> its next token; None takes the likeliest."""


def chooser(sampling: Sampling, prompt: Sequence[int]) -> Chooser:
    """Sampling from softmax(logits / temperature); the seed and the prompt decide the draws, not its company."""
    if sampling.temperature == 0:
        return None
    generator = torch.Generator().manual_seed(random.Random(f"{sampling.seed}:{list(prompt)}").getrandbits(63))

    def sample(logits: Tensor) -> int:
        weights = torch.softmax(logits.double().cpu() / sampling.temperature, dim=-1)
        if sampling.top_k or sampling.top_p < 1:
            weights = narrowed(weights, sampling.top_k, sampling.top_p)
        return int(torch.multinomial(weights, 1, generator=generator))

    return sample


def narrowed(weights: Tensor, top_k: int, top_p: float) -> Tensor:
    """Probabilities (V,) with 0 for all but the top_k likeliest (0: all), and of these the fewest that have top_p.

    Nucleus sampling: Holtzman et al. 2020 (arXiv:1904.09751), section 3.1. What is left does not sum to 1.
    """
    ordered, order = weights.sort(descending=True, stable=True)
    if top_k:
        ordered[top_k:] = 0
    before = ordered.cumsum(0) - ordered
    ordered[before >= top_p * ordered.sum()] = 0
    return torch.zeros_like(weights).scatter(0, order, ordered)


def choose_tokens(logits: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """The next token of each row of logits (B, V)."""
    highest, likeliest = logits.max(dim=-1)
    if any(map(math.isnan, highest.tolist())):
        hint = "its weights are damaged, or too large for 16 bits"
        raise UserError("the model computes NaN (not a number)", ExitCode.MODEL, hint=hint)
    tokens: list[int] = likeliest.tolist()
    return [
        token if choose is None else choose(row) for token, choose, row in zip(tokens, choosers, logits, strict=True)
    ]
