"""Rows -> token ids, and which of them are trained. The one place where text becomes ids, for train, eval and chat.

The prompt's ids in training are exactly the ids that inference feeds: ids = encode(prompt) + encode(answer) + stop.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import count
from typing import Any

from ftkit.errors import ExitCode, UserError, did_you_mean
from ftkit.io.records import kind_of
from ftkit.io.template import Template

PRIVATE_USE = range(0xE001, 0xF900)
"""Characters without a meaning of their own; one that no message holds marks places in a conversation."""
ANCHORS = ("\n", "a")
"""Texts to put in front of a continuation: no word merges with both."""
BROKEN = "\ufffd"
Tools = list[dict[str, Any]] | None
"""The functions that a conversation offers, as OpenAI writes them: {"type": "function", "function": {...}}."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row as the model sees it: ids, and for each id whether it is trained (counted in the loss).

    weight: of each of its counted tokens in the loss.
    """

    ids: list[int]
    counted: list[bool]
    weight: float = 1.0


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with the template of the rows: turns rows into examples and prompts into ids.

    `template` is needed for rows of messages; without one, the tokenizer's own chat template renders them. `classes`: the
    labels of a model with a head for them, in the order of its logits. `turns`: which of a conversation's assistant turns
    are trained, all or the last.
    """

    tokenizer: Any
    template: Template | None = None
    classes: tuple[str, ...] = ()
    turns: str = "all"

    @cached_property
    def start_ids(self) -> list[int]:
        """What the tokenizer puts in front of a text: one BOS for most Llamas, nothing for GPT-2."""
        return self._around[0]

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts in front of a text, and behind it."""
        whole = self.tokenizer("a").input_ids
        bare = self.tokenizer("a", add_special_tokens=False).input_ids
        at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return list(whole[:at]), list(whole[at + len(bare) :])

    @cached_property
    def has_dummy_prefix(self) -> bool:
        """True for SentencePiece-like tokenizers, which put a space in front of every text."""
        return bool(self.tokenizer.tokenize("a")[0].startswith("▁"))

    @cached_property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: end of text, and the template's stop strings where they are one token."""
        ids = [self.tokenizer.eos_token_id]
        for string in self.template.stop if self.template else ():
            encoded = self.encode(string, specials=True)
            if len(encoded) == 1:
                ids.append(encoded[0])
        return sorted({*ids, *self._chat_stop_ids})

    @cached_property
    def _chat_stop_ids(self) -> set[int]:
        """Special tokens with which the chat template closes an assistant turn."""
        if not self.renders_chat:
            return set()
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        before, whole = self.render(turns[:1], generate=True), self.render(turns, generate=False)
        closing = self.encode(whole[len(before) :], specials=True) if whole.startswith(before) else []
        return set(closing) & special_tokens(self.tokenizer).keys()

    @property
    def renders_chat(self) -> bool:
        """True if conversations can be rendered: by the template, or by the tokenizer's own."""
        if self.template is not None:
            return self.template.kind == "chat"
        return bool(self.tokenizer.chat_template)

    def encode(self, text: str, *, specials: bool = False, after_text: bool = False) -> list[int]:
        """Ids of a text without BOS. Text that looks like a special token stays text unless `specials`.

        after_text: the text continues another, so a SentencePiece dummy prefix is left out.
        """
        if not text:
            return []
        for anchor in ANCHORS if after_text and self.has_dummy_prefix else ():
            before, both = self._ids(anchor, specials), self._ids(anchor + text, specials)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self._ids(text, specials)

    def _ids(self, text: str, specials: bool) -> list[int]:
        """What the tokenizer makes of a text, or has made of it ahead."""
        if not specials and (ids := self._ahead.get(text)) is not None:
            return list(ids)
        backend = self._backend
        if backend is None or backend.truncation is not None or backend.padding is not None:
            return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=not specials).input_ids)
        if backend.encode_special_tokens is specials:
            backend.encode_special_tokens = not specials
        return list(backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    @cached_property
    def _backend(self) -> Any:
        """What transformers' call of the tokenizer asks for ids, and takes as long around it; None where it does more."""
        from transformers import PreTrainedTokenizerFast as Fast

        kind = type(self.tokenizer)
        is_plain = issubclass(kind, Fast) and kind.__call__ is Fast.__call__ and kind._encode_plus is Fast._encode_plus
        return self.tokenizer.backend_tokenizer if is_plain else None

    @cached_property
    def _ahead(self) -> dict[str, list[int]]:
        """Ids of the texts that `read_ahead` was given last."""
        return {}

    def read_ahead(self, rows: Sequence[dict[str, Any]]) -> None:
        """Encode the texts of rows in one call, which works on all cores, before `example` asks for them one by one.

        Conversations are cut into pieces as they are rendered, so nothing is known of them ahead.
        """
        names = ("prompt", "completion", "text")
        texts = {text for row in rows for name in names if isinstance(text := row.get(name), str)}
        if self.has_dummy_prefix:
            answers = (row.get("completion") for row in rows)
            texts |= {ANCHORS[0] + text for text in answers if isinstance(text, str)} | set(ANCHORS)
        self._ahead.clear()
        if some := sorted(texts - {""}):
            encoded = self.tokenizer(some, add_special_tokens=False, split_special_tokens=True)
            self._ahead.update(zip(some, encoded.input_ids, strict=True))

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of a rendered prompt as they are fed in training and at inference."""
        return self.start_ids + self.encode(prompt)

    def chat_ids(self, messages: list[dict[str, Any]], tools: Tools = None) -> list[int]:
        """Ids of a conversation up to where the assistant's next answer begins."""
        return self._chat_pieces(messages, tools, answer=False).ids

    def input_ids(self, row: dict[str, Any]) -> list[int]:
        """What is fed to let the model answer this row: the prompt, or the conversation before its last turn."""
        if kind_of(row) == "messages":
            return self.chat_ids(row["messages"][:-1], row.get("tools"))
        return self.prompt_ids(row["prompt"])

    def example(self, row: dict[str, Any]) -> Example:
        """The row with its trained tokens marked; its last trained token is a stop token."""
        example = self._unweighted(row)
        return replace(example, weight=float(row["weight"])) if "weight" in row else example

    def _unweighted(self, row: dict[str, Any]) -> Example:
        kind = kind_of(row)
        if kind == "messages":
            example = self._chat_pieces(row["messages"], row.get("tools"), answer=True)
            return last_turn(example) if self.turns == "last" else example
        if kind == "classification":
            ids = self.class_ids(row["text"])
            return Example([*ids, self.class_number(row["label"])], [False] * len(ids) + [True])
        if kind == "text":
            ids = [*self.start_ids, *self.encode(row["text"]), self.tokenizer.eos_token_id]
            return Example(ids, [True] * len(ids))
        prompt = self.prompt_ids(row["prompt"])
        answer = [*self.encode(row["completion"], after_text=bool(row["prompt"])), self.tokenizer.eos_token_id]
        return Example(prompt + answer, [False] * len(prompt) + [True] * len(answer))

    def class_ids(self, text: str, most: int | None = None) -> list[int]:
        """Ids of a text as a head for classes is fed it, between the tokenizer's start and end; at most `most` of them."""
        start, end = self._around
        ids = [*start, *self.encode(text), *end]
        return ids if most is None or len(ids) <= most else [*ids[: most - len(end)], *end]

    def class_number(self, label: str | int) -> int:
        """The number of a label; one that no training row had is a data error."""
        name = str(label).strip()
        if name in self.classes:
            return self.classes.index(name)
        known = ", ".join(self.classes[:10]) + (", ..." if len(self.classes) > 10 else "")
        hint = f"{did_you_mean(name, list(self.classes))}the labels are {known}"
        raise UserError(f"no training row has the label '{label}'", ExitCode.DATA, hint=hint)

    def render(self, messages: list[dict[str, Any]], tools: Tools = None, *, generate: bool) -> str:
        """A conversation as one text, by the template or the tokenizer's own."""
        tools = tools or None  # no tools is what templates ask for, not an empty list
        bos = self.tokenizer.decode(self.start_ids) if self.start_ids else ""
        if self.template is not None and self.template.kind == "chat":
            return self.template.render_chat(
                messages, generate=generate, bos_token=bos, eos_token=self.tokenizer.eos_token, tools=tools
            )
        if not self.tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template for rows of messages", ExitCode.MODEL,
                            hint="choose one when you prepare the rows: ftkit prep FILE --template chatml")  # fmt: skip
        try:
            options = {"tokenize": False, "add_generation_prompt": generate}
            return str(self.tokenizer.apply_chat_template(messages, tools=tools, **options))
        except Exception as error:  # a chat template raises what it likes
            what = f"the chat template refuses this conversation: {error}"
            raise UserError(what, ExitCode.DATA, hint="mend the row, or leave it out") from None

    def _chat_pieces(self, messages: list[dict[str, Any]], tools: Tools, *, answer: bool) -> Example:
        """The conversation cut where assistant turns begin and end, each piece encoded on its own.

        Cutting at the same places in training and at inference makes the ids equal. A template whose rendering of the
        turns so far is not the beginning of the rendering of all (Qwen3 drops earlier thinking) trains the last
        answer only.
        """
        messages, tools, mark = self._guard(messages, tools)
        whole = self.render(messages, tools, generate=not answer)
        require_shown(messages, tools, partial(self.render, generate=not answer), whole)
        cuts = self._turn_cuts(messages, tools, whole)
        ids: list[int] = []
        counted: list[bool] = []
        at = 0
        for start, end in cuts:
            ids += (between := self._encode_guarded(whole[at:start], mark, after_text=at > 0))
            counted += [False] * len(between)
            turn = self._encode_guarded(whole[start:end], mark, after_text=True)
            trained = self._trained_length(turn) if answer else len(turn)
            ids += turn
            counted += [True] * trained + [False] * (len(turn) - trained)
            at = end
        rest = self._encode_guarded(whole[at:], mark, after_text=at > 0)
        return Example(ids + rest, counted + [False] * len(rest))

    def _turn_cuts(self, messages: list[dict[str, Any]], tools: Tools, whole: str) -> list[tuple[int, int]]:
        """Where each assistant turn begins and ends in the rendering, as far as the template lets us see it."""
        cuts: list[tuple[int, int]] = []
        for place, message in enumerate(messages):
            if message["role"] != "assistant" or place == 0:
                continue
            before = self.render(messages[:place], tools, generate=True)
            after = self.render(messages[: place + 1], tools, generate=False)
            if whole.startswith(after) and after.startswith(before):
                cuts.append((len(before), len(after)))
        return cuts

    def _trained_length(self, turn: list[int]) -> int:
        """Tokens of a turn up to and with its stop token; a template that closes without one is an error."""
        specials = special_tokens(self.tokenizer)
        last = max((i for i, token in enumerate(turn) if token in specials), default=None)
        if (
            last is None or self.tokenizer.decode(turn[last + 1 :]).strip()
        ):  # what stands behind it would not be trained
            raise UserError(
                "the chat template ends answers without a stop token: the model would never stop",
                ExitCode.DATA,
                hint="close the assistant's turn with eos_token, or with a special token of this model",
            )
        return last + 1

    def _guard(self, messages: list[dict[str, Any]], tools: Tools) -> tuple[list[dict[str, Any]], Tools, str]:
        """Contents, calls and tools with the text of special tokens replaced: an id between two marks is not the token.

        Returns the mark too; "" if nothing had to be marked.
        """
        contents = "".join(texts_in([messages, tools]))
        found = sorted(
            ((text, i) for i, text in special_tokens(self.tokenizer).items() if text in contents),
            key=lambda pair: -len(pair[0]),
        )
        if not found:
            return messages, tools, ""
        mark = next(chr(code) for code in PRIVATE_USE if chr(code) not in contents)

        def marked(text: str) -> str:
            for special, i in found:
                text = text.replace(special, f"{mark}{i}{mark}")
            return text

        roles = [{"role": message["role"]} for message in messages]
        guarded = [with_texts(message, marked) | role for message, role in zip(messages, roles, strict=True)]
        return guarded, with_texts(tools, marked), mark

    def _encode_guarded(self, text: str, mark: str, *, after_text: bool) -> list[int]:
        """Ids of a piece of rendering: its special tokens are tokens, those that were marked are plain text."""
        if not mark or mark not in text:
            return self.encode(text, specials=True, after_text=after_text)
        ids: list[int] = []
        for place, piece in enumerate(text.split(mark)):
            is_marked = place % 2 == 1
            plain = special_tokens(self.tokenizer)[int(piece)] if is_marked else piece
            ids += self.encode(plain, specials=not is_marked, after_text=after_text or place > 0)
        return ids


def require_shown(messages: list[dict[str, Any]], tools: Tools, render: Callable[..., str], whole: str) -> None:
    """A model error where the rendering `whole` leaves out what somebody says, a tool, a call, its arguments or its
    result: the model would learn to answer from what it cannot see, or an empty turn.

    A word that nothing else holds is put into each of these; those that do not come out again are left out. Contents that
    stand in the rendering as they are need no such word.
    """
    everything = "".join(texts_in([messages, tools]))
    word = next(word for word in map("probe{}".format, count()) if word not in everything)
    wanted: dict[str, str] = {}

    def probe(what: str) -> str:
        return wanted.setdefault(f"{word}x{len(wanted)}x", what) and next(reversed(wanted))

    def probed_call(call: dict[str, Any], turn: int) -> dict[str, Any]:
        function = call["function"]
        named = f"of {function['name']} in turn {turn}"
        name = function["name"] + probe(f"the call {named}")
        arguments = {**function["arguments"], probe(f"the arguments of the call {named}"): ""}
        return {**call, "function": {**function, "name": name, "arguments": arguments}}

    def probed_turn(message: dict[str, Any], turn: int) -> dict[str, Any]:
        if message["role"] == "tool":
            return {**message, "content": message["content"] + probe(f"the tool's result in turn {turn}")}
        if (content := message.get("content")) and content.strip() not in whole:
            message = {**message, "content": content + probe(f"what the {message['role']} says in turn {turn}")}
        calls = [probed_call(call, turn) for call in message.get("tool_calls") or ()]
        return {**message, "tool_calls": calls} if calls else message

    turns = [probed_turn(message, turn) for turn, message in enumerate(messages, 1)]
    functions = [tool["function"] for tool in tools or ()]
    named = [{**f, "name": f["name"] + probe(f"the tool {f['name']}")} for f in functions]
    offered = [{**tool, "function": function} for tool, function in zip(tools or (), named, strict=True)]
    if not wanted:
        return
    rendered = render(turns, offered)
    if left_out := [what for mark, what in wanted.items() if mark not in rendered]:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        hint = (
            "use a model whose own chat template takes tools and plain texts, with rows made without --template;"
            " or leave such rows out"
        )
        raise UserError(f"the chat template leaves out {left_out[0]}{more}", ExitCode.MODEL, hint=hint)


def texts_in(value: Any) -> Iterator[str]:
    """Every text inside a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value:
            yield from texts_in(part)
        for part in value.values() if isinstance(value, dict) else ():
            yield from texts_in(part)


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The JSON value with every text in it changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [with_texts(part, change) for part in value]
    if isinstance(value, dict):
        return {change(key): with_texts(part, change) for key, part in value.items()}
    return value


def last_turn(example: Example) -> Example:
    """The example with only its last stretch of counted tokens."""
    end = len(example.counted) - next((at for at, counts in enumerate(reversed(example.counted)) if counts), 0)
    start = end
    while start and example.counted[start - 1]:
        start -= 1
    return replace(example, counted=[start <= at < end for at in range(len(example.ids))])


@lru_cache(maxsize=8)
def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Ids and texts of all special tokens: also of those without a role, as Phi-3's <|end|>, which closes its turns."""
    named = dict(zip(tokenizer.all_special_ids, map(str, tokenizer.all_special_tokens), strict=True))
    return named | {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def decode_answer(tokenizer: Any, prompt_ids: list[int], answer_ids: list[int]) -> str:
    """The text of an answer's ids, with the space in front that SentencePiece would swallow alone.

    Special tokens (the stop token) are left out.
    """
    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    before = clean_tail(decode, prompt_ids)
    alone, both = decode(before), decode(before + list(answer_ids))
    return str(both[len(alone) :] if both.startswith(alone) else decode(answer_ids))


def clean_tail(decode: Callable[[list[int]], str], ids: Sequence[int]) -> list[int]:
    """The last few ids, more of them where they begin inside a character: its bytes would spoil those that follow."""
    tails = [list(ids[-length:]) for length in (4, 8, 16, 32)]
    return next((tail for tail in tails if BROKEN not in decode(tail)), tails[-1])
