"""Prompts -> answers: batched or streamed generation with a KV cache, the same for eval and chat.

Legend: B rows, T tokens of a row, V vocabulary.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor

from ftkit.core.adapters import virtual_tokens
from ftkit.core.batching import PAD_ID
from ftkit.core.encoding import decode_answer
from ftkit.core.loss import selecting
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
        self._text = ""
        self._given = 0
        self._known: list[int] = self.prompt
        self._unread: list[int] = []

    def take(self, token: int) -> bool:
        """Add a generated token; False if the answer ends with it."""
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
    """How answers are chosen: the likeliest token at temperature 0, else drawn by the seed; at most max_new tokens."""

    max_new: int
    temperature: float = 0.0
    seed: int = 42


@dataclass(frozen=True)
class SharedStart:
    """The tokens that all prompts of a task begin with, and their KV cache, of one row."""

    length: int
    cache: Any


class Decoding:
    """Prompts that are continued together: a batch padded on the left, with its KV cache.

    Pads are masked and positions count from each row's first token, so a row's logits do not depend on its company.
    Rows that have ended are taken out with `keep`, and with them the columns that no remaining row needs.
    With a shared start the pads stand behind it: its columns are the first of every row. An adapter's virtual tokens are
    such a start.

    lengths: tokens of each row so far; width: the longest of them. pending (B, T): tokens not yet in the cache.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], start: SharedStart | None = None) -> None:
        from transformers import DynamicCache

        virtual = virtual_tokens(model)
        if virtual:
            start = start or SharedStart(virtual, virtual_cache(model))
            prompts = [[PAD_ID] * virtual + list(prompt) for prompt in prompts]
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.device = self.model.get_input_embeddings().weight.device
        self.takes_positions = "position_ids" in signature(self.model.forward).parameters
        self.lengths = [len(prompt) for prompt in prompts]
        self.width = max(self.lengths)
        self.shared = start.length if start else 0
        if start:
            self.cache = deepcopy(start.cache)
            self.cache.batch_repeat_interleave(len(prompts))
        else:
            self.cache = DynamicCache(config=self.model.config)
        padded = [[PAD_ID] * (self.width - len(prompt)) + list(prompt[self.shared :]) for prompt in prompts]
        self.pending = torch.tensor(padded, dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Logits (B, V), float32, of each row's next token."""
        rows, new = self.pending.shape
        options: dict[str, Any] = {"past_key_values": self.cache, "use_cache": True}
        columns = torch.arange(self.width, device=self.device)
        # (B, 1): how many columns of each row are pads
        pads = torch.tensor([self.width - length for length in self.lengths], device=self.device).unsqueeze(1)
        if min(self.lengths) < self.width:
            options["attention_mask"] = ((columns < self.shared) | (columns >= self.shared + pads)).long()
        if self.takes_positions:
            options["position_ids"] = (columns[-new:] - pads).clamp(min=0)
        last = torch.arange(1, rows + 1, device=self.device) * new - 1
        with selecting(self.model.get_output_embeddings(), last):
            out = self.model(input_ids=self.pending, **options)
        return out.logits.reshape(rows, -1).float()  # type: ignore[no-any-return]

    def append(self, tokens: Sequence[int]) -> None:
        """The next token of each row."""
        self.pending = torch.tensor(tokens, dtype=torch.int64, device=self.device).unsqueeze(1)
        self.lengths = [length + 1 for length in self.lengths]
        self.width += 1

    def keep(self, places: list[int]) -> None:
        """Go on with these rows of the batch only."""
        index = torch.tensor(places, dtype=torch.int64, device=self.device)
        self.pending, self.lengths = self.pending[index], [self.lengths[place] for place in places]
        self.cache.batch_select_indices(index)
        self._drop_columns(self.width - max(self.lengths))

    def _drop_columns(self, columns: int) -> None:
        """Forget columns that are padding in every row: less work, and no cache longer than the model's context."""
        from transformers.cache_utils import DynamicLayer

        layers = self.cache.layers
        if columns == 0 or any(type(layer) is not DynamicLayer for layer in layers):
            return
        for layer in layers:
            layer.keys, layer.values = (without_columns(t, self.shared, columns) for t in (layer.keys, layer.values))
        self.width -= columns


def without_columns(tensor: Tensor, at: int, count: int) -> Tensor:
    """(B, H, T, d) without `count` columns from `at`."""
    rest = tensor[:, :, at + count :]
    return torch.cat([tensor[:, :, :at], rest], dim=2) if at else rest


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


@torch.no_grad()
def virtual_cache(model: Any) -> Any:
    """The KV cache, of one row, that an adapter's virtual tokens give: a prefix is one, a prompt goes through the model."""
    from transformers import DynamicCache

    found = model.get_prompt(batch_size=1)
    if not isinstance(found, Tensor):
        return found
    base = model.get_base_model()
    embeddings = found.to(base.get_input_embeddings().weight.dtype)
    out = base(inputs_embeds=embeddings, past_key_values=DynamicCache(config=base.config), use_cache=True)
    return out.past_key_values


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
    writings = [
        Writing(tokenizer, prompt, stop_ids, stop_strings, room_for(prompt, max_new, context)) for prompt in prompts
    ]
    alive = [row for row, writing in enumerate(writings) if writing.finish is None]
    choosers = [chooser(temperature, seed, prompt) for prompt in prompts]
    decoding = Decoding(model, [writings[row].prompt for row in alive], start) if alive else None
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

    def stop(self) -> None:
        """End the answer with the token that is being computed; safe to call from a signal handler."""
        self._writing.room = 0


def stream_answer(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    *,
    stop_ids: Sequence[int],
    stop_strings: Sequence[str] = (),
    max_new: int,
    temperature: float = 0.0,
    seed: int = 42,
    context: int | None = None,
) -> Stream:
    """One answer, piece by piece: `for piece in (stream := stream_answer(...))`, then `stream.answer`."""
    writing = Writing(tokenizer, prompt_ids, stop_ids, stop_strings, room_for(prompt_ids, max_new, context))
    return Stream(writing, stream_pieces(model, writing, chooser(temperature, seed, prompt_ids)))


def stream_pieces(model: Any, writing: Writing, choose: "Chooser") -> Iterator[str]:
    """The text of an answer as it is generated."""
    if writing.finish is not None:
        return
    decoding = Decoding(model, [writing.prompt])
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


def chooser(temperature: float, seed: int, prompt: Sequence[int]) -> Chooser:
    """Sampling from softmax(logits / temperature); `seed` and the prompt decide the draws, not its company."""
    if temperature == 0:
        return None
    generator = torch.Generator().manual_seed(random.Random(f"{seed}:{list(prompt)}").getrandbits(63))

    def sample(logits: Tensor) -> int:
        weights = torch.softmax(logits.double().cpu() / temperature, dim=-1)
        return int(torch.multinomial(weights, 1, generator=generator))

    return sample


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
