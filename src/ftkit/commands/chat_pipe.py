"""Lines or rows in, answers out: as many together as are there already, in the order in which they came."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import orjson

from ftkit import console
from ftkit.commands.chat_subjects import find_speaker
from ftkit.core.adapter_choice import BASE
from ftkit.core.answering import BATCH
from ftkit.core.chat_settings import ChatSettings
from ftkit.core.conversation import Prompt, Speaker, answers_to, system_turn
from ftkit.core.generation import Answer, Sampling
from ftkit.errors import ExitCode, UserError
from ftkit.io.questions import Question, read_questions, typed
from ftkit.io.ready_lines import ReadyLines

STDIN = "<stdin>"
SCHEMA = "ftkit.answer/1"
TOGETHER = 4 * BATCH
"""Questions that are looked at together: sorted by length, batches of them have little padding."""


@dataclass
class Questions:
    """What is asked: the first question is known, the others are read when they are wanted."""

    first: Question
    rest: Iterator[Question]
    lines: ReadyLines | None

    def __iter__(self) -> Iterator[Question]:
        """All of them, one by one, as they come."""
        return chain([self.first], self.rest)

    def groups(self) -> Iterator[tuple[list[Question], UserError | None]]:
        """Questions that are there without waiting, at most TOGETHER of them; and the error that ends them."""
        waiting: Question | None = self.first
        while waiting is not None:
            group, fault = [waiting], None
            try:
                while len(group) < TOGETHER and self.lines is not None and self.lines.is_ready():
                    if (question := next(self.rest, None)) is None:
                        break
                    group.append(question)
            except UserError as error:
                fault = error
            yield group, fault
            waiting = next(self.rest, None)


def one_question(text: str) -> Questions:
    """What -p asks."""
    return Questions(typed(text, "-p"), iter(()), None)


def read_stdin() -> Questions:
    """The lines of stdin; none at all is a data error."""
    lines = ReadyLines(sys.stdin.buffer) if sys.stdin else None
    rest = read_questions(lines, STDIN) if lines else iter(())
    first = next(rest, None)
    if first is None:
        raise UserError(f"{STDIN}: 0 prompts", ExitCode.DATA, hint='echo "Write a haiku." | ftkit chat')
    return Questions(first, rest, lines)


def answer_questions(asked: Questions, settings: ChatSettings, sampling: Sampling, speakers: Sequence[Speaker]) -> None:
    """Answer each question as a conversation of its own; those before a wrong line are answered before its error."""
    answered = cut = 0
    for group, fault in asked.groups():
        prompts, wrong = prompts_for(group, settings.system, sampling.max_new, speakers)
        answers = answers_to(prompts, sampling) if prompts else []
        for question, (speaker, _), answer in zip(group, prompts, answers, strict=False):
            write_answer(question, answer, speaker, as_json=settings.json)
            answered, cut = answered + 1, cut + (answer.finish == "length")
        if error := wrong or fault:
            raise error
    if cut:
        console.info(f"{cut} of {answered} answers ended by length (--max-new {sampling.max_new})")


def prompts_for(
    group: Sequence[Question], system: str | None, max_new: int, speakers: Sequence[Speaker]
) -> tuple[list[tuple[Speaker, Prompt]], UserError | None]:
    """Who is asked what, up to the first question that cannot be asked, and why that one cannot."""
    found: list[tuple[Speaker, Prompt]] = []
    for question in group:
        try:
            speaker = find_speaker(speakers, question.adapter) if question.adapter else speakers[0]
            found.append((speaker, prompt_for(question, system, max_new, speaker)))
        except UserError as error:
            code = ExitCode.DATA if error.exit_code == ExitCode.USAGE else error.exit_code
            return found, UserError(f"{question.where}: {error.message}", code, hint=error.hint)
    return found, None


def prompt_for(question: Question, system: str | None, max_new: int, speaker: Speaker) -> Prompt:
    """The prompt of a question; a conversation without a system message gets `system`, else that of training."""
    require_same_template(question, speaker)
    if question.rendered is not None:
        return speaker.rendered_prompt(question.rendered)
    messages = question.messages
    if messages[0]["role"] != "system":
        messages = [*system_turn(speaker.system if system is None else system), *messages]
    prompt = speaker.prompt(messages, max_new, question.tools)
    if prompt.dropped:
        console.info(f"{question.where}: the context is full, the {prompt.dropped} oldest exchanges are left out")
    return prompt


def require_same_template(question: Question, speaker: Speaker) -> None:
    """A row that was rendered with one template is not for a model that was trained with another."""
    template = speaker.encoder.template
    ours = f"template {template.fingerprint}" if template else speaker.learnt
    if question.template is None or ours in (None, f"template {question.template}"):
        return
    raise UserError(
        f"the row was made with template {question.template}, prompts here are made with {ours}",
        ExitCode.DATA, hint="prepare the rows with the model's template, or choose theirs with --template",
    )  # fmt: skip


def write_answer(question: Question, answer: Answer, speaker: Speaker, *, as_json: bool) -> None:
    """One answer on stdout, at once."""
    text = speaker.content(answer.text)
    if as_json:
        adapter = None if speaker.adapter in (None, BASE) else speaker.name
        said = {"prompt": question.text, "answer": text}
        row = {"schema": SCHEMA, **said, "adapter": adapter, "finish": answer.finish, "tokens": len(answer.ids)}
        line = orjson.dumps(row)
    else:
        line = console.safe(text, sys.stdout).encode("utf-8", "replace")
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()
