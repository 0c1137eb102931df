"""A conversation with a model: what is said becomes a prompt by its template, and is answered. Knows no terminal."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ftkit.core.answering import answer_all
from ftkit.core.encoding import Encoder, Tools
from ftkit.core.generation import Answer, Asked, Sampling, Stream, stream_answer
from ftkit.core.kept_cache import KeptCaches
from ftkit.core.out_of_memory import give_memory_back
from ftkit.errors import ExitCode, UserError, is_out_of_memory

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant", "content": text}"""


@dataclass(frozen=True)
class Prompt:
    """The ids to feed, and how many of the oldest exchanges were left out so that they fit into the context."""

    ids: list[int]
    dropped: int = 0


@dataclass(frozen=True)
class Speaker:
    """A loaded model with all that decides what it answers.

    The encoder's template gives the form of prompts: a chat template renders the conversation so far; a single-turn
    template (alpaca) renders the last thing said, alone; without either, the text is continued as it stands.
    """

    model: Any
    encoder: Encoder
    stop_ids: Sequence[int]
    stop_strings: Sequence[str] = ()
    context: int | None = None
    """Tokens of prompt and answer together that the model was made for."""
    name: str = ""
    """What people call it."""
    adapter: str | None = None
    """Which of the adapters on the model it answers with (`adapter_choice`); None where there is no choice."""
    kept: KeptCaches = field(default_factory=KeptCaches)
    """What the model has read last; speakers of one model have it in common."""
    system: str | None = None
    """The system message that it was trained with, for conversations that have none of their own."""
    learnt: str | None = None
    """What made the prompts of its training, in words; None where nobody knows."""

    @property
    def keeps_history(self) -> bool:
        """True if an answer depends on the turns before."""
        return self.encoder.renders_chat

    @property
    def only_continues(self) -> bool:
        """True if there is no template: the model goes on with the text it is given."""
        return not self.encoder.renders_chat and self.encoder.template is None

    def prompt(self, messages: list[Message], max_new: int, tools: Tools = None) -> Prompt:
        """The prompt for the last message, with the tools that may be called.

        The oldest exchanges are left out where the conversation is too long.

        Room is kept for an answer of max_new tokens, but for at most a quarter of the context.
        """
        require_one_turn(messages, self)
        ids = self._ids(messages, tools)
        dropped = 0
        if self.context is not None:
            longest = self.context - min(max_new, self.context // 4)
            while len(ids) > longest and (shorter := without_oldest_exchange(messages)):
                messages, dropped = shorter, dropped + 1
                ids = self._ids(messages, tools)
        return Prompt(self._checked(ids), dropped)

    def rendered_prompt(self, text: str) -> Prompt:
        """The prompt for a text that a template has rendered already."""
        return Prompt(self._checked(self.encoder.prompt_ids(text)))

    def asked(self, prompt: Prompt, sampling: Sampling) -> Asked:
        """The prompt with all that decides its answer."""
        ends = (self.stop_ids, self.stop_strings)
        return Asked(self.encoder.tokenizer, prompt.ids, *ends, sampling, self.context, self.adapter)

    def stream(self, prompt: Prompt, sampling: Sampling) -> Stream:
        """The answer, piece by piece; what was read before is not read again."""
        return stream_answer(self.model, self.asked(prompt, sampling), self.kept)

    def content(self, text: str) -> str:
        """What was answered, without the white space that templates put around it; a continued text stays as it is."""
        return text if self.only_continues else text.strip()

    def _ids(self, messages: list[Message], tools: Tools) -> list[int]:
        if self.keeps_history:
            return self.encoder.chat_ids(messages, tools)
        if tools:
            hint = "ask without 'tools', or a model whose own chat template takes them"
            raise UserError("'tools' for a model without a chat template", ExitCode.MODEL, hint=hint)
        said = messages[-1]["content"]
        template = self.encoder.template
        return self.encoder.prompt_ids(template.prompt_for(said) if template else said)

    def _checked(self, ids: list[int]) -> list[int]:
        if not ids:
            raise UserError("an empty prompt", ExitCode.DATA, hint="this model needs at least one token to begin with")
        if self.context is not None and len(ids) >= self.context:
            raise UserError(
                f"the prompt has {len(ids):,} tokens, the model's context is {self.context:,}: no room for an answer",
                ExitCode.DATA, hint="ask something shorter",
            )  # fmt: skip
        return ids


def answers_to(asked: Sequence[tuple[Speaker, Prompt]], sampling: Sampling) -> list[Answer]:
    """The whole answers of speakers of one model, each to its prompt, in order; rows share passes where they can."""
    speaker = asked[0][0]
    with out_of_memory_told(speaker.kept):
        return answer_all(speaker.model, [speaker.asked(prompt, sampling) for speaker, prompt in asked])


def require_one_turn(messages: list[Message], speaker: Speaker) -> None:
    """Without a chat template only the last thing said reaches the model: more would be lost, so it is refused."""
    if speaker.keeps_history or len(messages) == 1:
        return
    template = speaker.encoder.template
    what = f"template {template.name}" if template else "a model without a chat template"
    has_system = messages[0]["role"] == "system"
    said = "a system message" if has_system else f"a conversation of {len(messages)} messages"
    hint = "chat templates take it: --template chatml"
    raise UserError(f"{said} for {what}, which takes one text", ExitCode.DATA, hint=hint)


def without_oldest_exchange(messages: list[Message]) -> list[Message]:
    """The conversation without its first question and what was answered to it; empty if only one question is left.

    A system message stays.
    """
    first = 1 if messages[0]["role"] == "system" else 0
    questions = [at for at, message in enumerate(messages) if message["role"] == "user" and at > first]
    return [*messages[:first], *messages[questions[0] :]] if questions else []


class Reply:
    """An answer under way: its pieces while they come, and the answer as far as it goes."""

    def __init__(self, speaker: Speaker, prompt: Prompt, sampling: Sampling) -> None:
        self.prompt = prompt
        self._speaker = speaker
        self._stream = speaker.stream(prompt, sampling)

    def __iter__(self) -> Iterator[str]:
        """Pieces of text; white space in front of the first word is left out where `content` leaves it out."""
        started = self._speaker.only_continues
        with out_of_memory_told(self._speaker.kept):
            for piece in self._stream:
                piece = piece if started else piece.lstrip()
                started = started or bool(piece)
                if piece:
                    yield piece

    @property
    def first_at(self) -> float | None:
        """When the first token came, in seconds of perf_counter; None as long as there is none."""
        return self._stream.first_at

    def stop(self) -> None:
        """End the answer with the token that is being computed."""
        self._stream.stop()

    @property
    def answer(self) -> Answer:
        """The answer so far; the whole of it after the last piece."""
        return self._stream.answer

    @property
    def content(self) -> str:
        """The text so far as it goes into the conversation."""
        return self._speaker.content(self.answer.text)


class Conversation:
    """Questions and answers in turn.

    A model that takes no history gets each question alone; the record is kept all the same.
    """

    def __init__(self, speaker: Speaker, sampling: Sampling, system: str | None = None) -> None:
        self.speaker, self.sampling = speaker, sampling
        self.turns: list[Message] = []
        self._asked = 0
        self.set_system(system)

    def set_system(self, text: str | None) -> None:
        """The system message of the turns to come: a text, "" for none, None for the one that the speaker has learnt.

        Refused where the template has no place for it.
        """
        if text:
            try:
                self.speaker.prompt([*system_turn(text), {"role": "user", "content": "?"}], 1)
            except UserError as error:
                hint = "say it in the question; or a chat template that takes it: --template chatml"
                raise UserError(error.message, error.exit_code, hint=hint) from None
        self._system = text

    @property
    def system(self) -> str | None:
        """The system message that the speaker sees now."""
        return self._system_for(self.speaker) or None

    def ask(self, text: str) -> Reply:
        """The answer to a text, not yet part of the conversation: iterate over it, then `keep` it.

        Asking again draws anew where temperature is above 0; a conversation repeated from the start repeats.
        """
        return Reply(self.speaker, self._prompt(text, self.speaker), self._next_sampling())

    def compare(self, text: str, speakers: Sequence[Speaker]) -> list[Answer]:
        """What each of the speakers would answer now, with the same seed; none of it becomes part of the conversation."""
        asked = [(speaker, self._prompt(text, speaker)) for speaker in speakers]
        return answers_to(asked, self._next_sampling())

    def _prompt(self, text: str, speaker: Speaker) -> Prompt:
        """The text, behind the conversation so far where the speaker takes it."""
        message = {"role": "user", "content": text}
        opening = system_turn(self._system_for(speaker))
        messages = [*opening, *self.turns, message] if speaker.keeps_history else [message]
        return speaker.prompt(messages, self.sampling.max_new)

    def _system_for(self, speaker: Speaker) -> str | None:
        return speaker.system if self._system is None else self._system

    def _next_sampling(self) -> Sampling:
        self._asked += 1
        return replace(self.sampling, seed=self.sampling.seed + self._asked - 1)

    def keep(self, text: str, reply: Reply) -> None:
        """Make a question and its answer (even one that was stopped half-way) part of the conversation."""
        self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": reply.content}]

    def undo(self) -> str | None:
        """Take the last question and its answer back; returns the question, None if there is none."""
        if not self.turns:
            return None
        question, _ = self.turns[-2:]
        del self.turns[-2:]
        return str(question["content"])

    def reset(self) -> None:
        """Begin again; the system message stays."""
        self.turns.clear()
        self._asked = 0

    @property
    def opening(self) -> list[Message]:
        """The system message, if there is one."""
        return system_turn(self.system)


def system_turn(text: str | None) -> list[Message]:
    """A system message as the beginning of a conversation; nothing for none."""
    return [{"role": "system", "content": text}] if text else []


@contextmanager
def out_of_memory_told(kept: KeptCaches) -> Iterator[None]:
    """Running out of memory costs this answer and what is kept of earlier ones, with words; the model stays usable."""
    ran_out = False
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        ran_out = True
    if ran_out:  # outside of the block above, where the frames of the attempt are gone
        kept.drop()
        give_memory_back()
        hint = "ask again (Up brings it back); a smaller max-new, or /reset before it, needs less"
        raise UserError("out of memory: this answer was given up", ExitCode.MEMORY, hint=hint)
