"""Rows -> what a model is asked and what should come out, and the scores of what did; for eval."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ftkit.core.encoding import Encoder, Example
from ftkit.core.examples import checked_example
from ftkit.core.generation import Answer, cut_before_stop, generate_batch, length_batches
from ftkit.core.likelihood import row_likelihoods
from ftkit.core.scoring import RowScore, read_fields, rouge_can_read, score_answer
from ftkit.errors import ExitCode, UserError
from ftkit.io.card import Card
from ftkit.io.row_file import RowFile
from ftkit.io.template import Template


@dataclass(frozen=True)
class Task:
    """What models are asked, the same for tuned and base: one item a row, in the order of the rows.

    places: which rows of the file the items are (the others are longer than `context` tokens).
    texts: what the likelihood is about, the answers or the whole text.
    prompts, references and fields are empty for plain text, where there is no answer to generate.
    """

    data: RowFile
    encoder: Encoder
    places: list[int]
    examples: list[Example]
    texts: list[str]
    prompts: list[list[int]]
    references: list[str]
    fields: list[dict[str, str]]
    stop_ids: list[int]
    stop_strings: tuple[str, ...]
    context: int | None

    @property
    def template(self) -> Template | None:
        """The template of the rows."""
        return self.encoder.template

    @property
    def generates(self) -> bool:
        """True if there are answers to generate."""
        return bool(self.prompts)

    @property
    def left_out(self) -> int:
        """Rows longer than the context."""
        return len(self.data.rows) - len(self.places)


def make_task(
    data: RowFile, encoder: Encoder, card: Card | None, own_stops: Sequence[int], context: int | None
) -> Task:
    """Rows as ids, references and fields. own_stops: end tokens that the model itself names."""
    examples = [checked_example(encoder, row, place) for row, place in zip(data.rows, data.places, strict=True)]
    is_text = data.kind == "text"
    places = [i for i, example in enumerate(examples) if is_text or context is None or len(example.ids) <= context]
    if not places:
        what = f"every row is longer than the model's context of {context} tokens"
        raise UserError(f"{data.source}: {what}", ExitCode.DATA, hint="use shorter rows")
    rows = [data.rows[place] for place in places]
    template = encoder.template
    strings = (*(template.stop if template else ()), *(card.stop_strings if card else ()))
    return Task(
        data=data,
        encoder=encoder,
        places=places,
        examples=[examples[place] for place in places],
        texts=[counted_text(row, examples[place]) for row, place in zip(rows, places, strict=True)],
        prompts=[] if is_text else [encoder.input_ids(row) for row in rows],
        references=[] if is_text else [cut_before_stop(reference_of(row), strings) for row in rows],
        fields=[] if is_text else [fields_of(row, template, card.pattern if card else None) for row in rows],
        stop_ids=sorted({*encoder.stop_ids, *(card.stop_tokens if card else own_stops)}),
        stop_strings=tuple(dict.fromkeys(strings)),
        context=context,
    )


def reference_of(row: dict[str, Any]) -> str:
    """The answer that the row gives: its completion, or the last turn."""
    return str(row["messages"][-1]["content"] if "messages" in row else row["completion"])


def counted_text(row: dict[str, Any], example: Example) -> str:
    """The text of the counted tokens: all of a text, a completion, the answers that the chat template lets us train."""
    if "messages" not in row:
        return str(row["text"] if "text" in row else row["completion"])
    answers = [str(turn["content"]) for turn in row["messages"] if turn["role"] == "assistant"]
    before = [False, *example.counted[:-1]]
    trained = sum(now and not was for was, now in zip(before, example.counted, strict=True))
    return "".join(answers[-trained:])


def fields_of(row: dict[str, Any], template: Template | None, pattern: str | None) -> dict[str, str]:
    """The values that the row's instruction names, where `ftkit prep` made it from columns by a pattern."""
    pattern = row.get("pattern") or pattern
    if not isinstance(pattern, str):
        return {}
    instruction = asked_text(row, template)
    return read_fields(pattern, instruction) if instruction is not None else {}


def asked_text(row: dict[str, Any], template: Template | None) -> str | None:
    """What a person typed to get this row's prompt: the last user turn, or the prompt without its template."""
    if "messages" in row:
        return next((str(turn["content"]) for turn in reversed(row["messages"]) if turn["role"] == "user"), None)
    return template.typed_text(row["prompt"]) if template else str(row["prompt"])


def answers(
    model: Any, task: Task, *, batch: int, max_new: int, can_pad: bool
) -> Iterator[tuple[list[int], list[Answer]]]:
    """(items, their answers) batch by batch, longest prompts first; always the likeliest token."""
    for items in length_batches(task.prompts, batch, equal_lengths=not can_pad):
        yield (
            items,
            generate_batch(
                model,
                task.encoder.tokenizer,
                [task.prompts[item] for item in items],
                stop_ids=task.stop_ids,
                stop_strings=task.stop_strings,
                max_new=max_new,
                context=task.context,
            ),
        )


def score_likelihoods(model: Any, task: Task) -> list[RowScore]:
    """The likelihood of every row's answer or text."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    likely = row_likelihoods(model, task.examples, task.context, vocabulary)
    return [RowScore(item, len(text.encode())) for item, text in zip(likely, task.texts, strict=True)]


def score_answers(rows: Sequence[RowScore], task: Task, generated: Sequence[Answer]) -> list[RowScore]:
    """The rows with their answers and the scores of these."""
    rouge = rouge_can_read(task.references)
    scored = []
    for item, (row, answer) in enumerate(zip(rows, generated, strict=True)):
        is_stopped = answer.finish == "stop"
        scores = score_answer(
            answer.text, task.references[item], stopped=is_stopped, fields=task.fields[item], rouge=rouge
        )
        scored.append(replace(row, prediction=answer.text, finish=answer.finish, scores=scores))
    return scored
