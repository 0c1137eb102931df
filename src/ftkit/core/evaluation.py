"""Rows -> what a model is asked and what should come out, and the scores of what did; for eval."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ftkit.core.answer_scores import Scoring, read_fields, score_answer
from ftkit.core.answering import Together, answer_batches
from ftkit.core.encoding import Encoder, Example
from ftkit.core.examples import checked_example
from ftkit.core.generation import Answer, Asked, Sampling, cut_before_stop
from ftkit.core.labels import label_counts, label_in
from ftkit.core.likelihood import Likelihood, row_likelihoods
from ftkit.core.scoring import RowScore
from ftkit.errors import ExitCode, UserError
from ftkit.io.card import Card
from ftkit.io.row_file import RowFile
from ftkit.io.template import Template

Row = dict[str, Any]
LABEL_ROW = ("{text}\nLabel:", " {label}")
"""How a row of text and label is asked, and how the answer begins."""
CANDIDATES = 256
"""Labels whose likelihoods are computed together, of one row or of several."""


@dataclass(frozen=True)
class Task:
    """What models are asked, the same for tuned and base: one item a row, in the order of the rows.

    places: which rows of the file the items are (the others are longer than `context` tokens).
    rows: the items as prompt and completion, messages or text; of a pair, with the chosen answer.
    texts: what the likelihood is about, the answers or the whole text.
    prompts, references and fields are empty where there is no answer to generate.
    rejected: the other answers of pairs. classes: the labels, where rows are scored as classes.
    """

    data: RowFile
    encoder: Encoder
    places: list[int]
    rows: list[Row]
    examples: list[Example]
    texts: list[str]
    prompts: list[list[int]]
    references: list[str]
    fields: list[dict[str, str]]
    stop_ids: list[int]
    stop_strings: tuple[str, ...]
    context: int | None
    rejected: list[Example] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)

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

    def where(self, item: int) -> str:
        """The place of an item (`file:line`)."""
        return self.data.places[self.places[item]]

    def asked(self, item: int) -> str:
        """What a person would have typed to ask an item, for samples and pages."""
        row = self.rows[item]
        return asked_text(row, self.template) or str(row.get("prompt", row.get("text", "")))


def make_task(
    data: RowFile,
    encoder: Encoder,
    card: Card | None,
    own_stops: Sequence[int],
    context: int | None,
    *,
    generates: bool,
    as_classes: bool,
) -> Task:
    """Rows as ids, references and fields. own_stops: end tokens that the model itself names."""
    rows = [scored_row(row, data.kind) for row in data.rows]
    examples = [checked_example(encoder, row, place) for row, place in zip(rows, data.places, strict=True)]
    rejected = rejected_examples(data, encoder, examples) if data.kind == "preference" else []
    is_text = data.kind == "text"
    lengths = [max(len(side[item].ids) for side in (examples, rejected) if side) for item in range(len(rows))]
    places = [item for item, length in enumerate(lengths) if is_text or context is None or length <= context]
    if not places:
        what = f"every row is longer than the model's context of {context} tokens"
        raise UserError(f"{data.source}: {what}", ExitCode.DATA, hint="use shorter rows")
    rows, examples = [rows[place] for place in places], [examples[place] for place in places]
    template = encoder.template
    strings = (*(template.stop if template else ()), *(card.stop_strings if card else ()))
    answers = generates and data.kind not in ("text", "preference")
    references = [] if is_text else [cut_before_stop(reference_of(row), strings) for row in rows]
    return Task(
        data=data,
        encoder=encoder,
        places=places,
        rows=rows,
        examples=examples,
        texts=[counted_text(row, example, encoder.tokenizer) for row, example in zip(rows, examples, strict=True)],
        prompts=[encoder.input_ids(row) for row in rows] if answers else [],
        references=references,
        fields=[fields_of(row, template, card.pattern if card else None) for row in rows] if answers else [],
        stop_ids=sorted({*encoder.stop_ids, *(card.stop_tokens if card else own_stops)}),
        stop_strings=tuple(dict.fromkeys(strings)),
        context=context,
        rejected=[rejected[place] for place in places] if rejected else [],
        classes=classes_of(data, references) if as_classes or data.kind == "classification" else [],
    )


def scored_row(row: Row, kind: str) -> Row:
    """A row as prompt and completion, messages or text: of a pair the chosen answer, of a class its label."""
    if kind == "classification":
        prompt, completion = LABEL_ROW
        return {
            "prompt": prompt.replace("{text}", row["text"]),
            "completion": completion.replace("{label}", str(row["label"])),
        }
    return with_answer(row, row["chosen"]) if kind == "preference" else row


def with_answer(row: Row, answer: Any) -> Row:
    """The prompt of a pair with one of its answers."""
    if isinstance(row["prompt"], str):
        return {"prompt": row["prompt"], "completion": answer}
    return {"messages": [*row["prompt"], *answer]}


def rejected_examples(data: RowFile, encoder: Encoder, chosen: list[Example]) -> list[Example]:
    """The rejected answers; in both sides only what follows the common prompt is counted."""
    others = []
    for number, (row, place) in enumerate(zip(data.rows, data.places, strict=True)):
        other = checked_example(encoder, with_answer(row, row["rejected"]), place)
        if isinstance(row["prompt"], list):
            prompt = len(encoder.chat_ids(row["prompt"]))
            chosen[number], other = after(chosen[number], prompt), after(other, prompt)
        others.append(other)
    return others


def after(example: Example, prompt: int) -> Example:
    """The example with nothing counted in its first `prompt` tokens."""
    return Example(example.ids, [counts and at >= prompt for at, counts in enumerate(example.counted)])


def classes_of(data: RowFile, references: Sequence[str]) -> list[str]:
    """The labels of rows: their different answers. Free texts, most of them different, are no labels."""
    classes = sorted({reference.strip() for reference in references})
    if data.kind != "classification" and len(classes) > max(2, len(references) // 2):
        what = f"{len(classes)} different answers in {len(references)} rows are no labels"
        raise UserError(f"{data.source}: {what}", ExitCode.DATA, hint="take labels out of --metrics")
    return classes


def reference_of(row: Row) -> str:
    """The answer that the row gives: its completion, or the last turn."""
    return str(row["messages"][-1]["content"] if "messages" in row else row["completion"])


def counted_text(row: Row, example: Example, tokenizer: Any) -> str:
    """The text of the counted tokens: all of a text, a completion, the answers that the chat template lets us train.

    Calls of tools are text as the chat template writes them, without its special tokens.
    """
    if "messages" not in row:
        return str(row["text"] if "text" in row else row["completion"])
    if any(turn.get("tool_calls") for turn in row["messages"]):
        counted = [token for token, counts in zip(example.ids, example.counted, strict=True) if counts]
        return str(tokenizer.decode(counted, skip_special_tokens=True))
    answers = [str(turn["content"]) for turn in row["messages"] if turn["role"] == "assistant"]
    before = [False, *example.counted[:-1]]
    trained = sum(now and not was for was, now in zip(before, example.counted, strict=True))
    return "".join(answers[-trained:])


def fields_of(row: Row, template: Template | None, pattern: str | None) -> dict[str, str]:
    """The values that the row's instruction names, where `ftkit prep` made it from columns by a pattern."""
    pattern = row.get("pattern") or pattern
    if not isinstance(pattern, str):
        return {}
    instruction = asked_text(row, template)
    return read_fields(pattern, instruction) if instruction is not None else {}


def asked_text(row: Row, template: Template | None) -> str | None:
    """What a person typed to get this row's prompt: the last user turn, or the prompt without its template."""
    if "messages" in row:
        return next((str(turn["content"]) for turn in reversed(row["messages"]) if turn["role"] == "user"), None)
    if "prompt" not in row:
        return None
    is_rendered = template is not None and template.kind == "completion"
    return template.typed_text(row["prompt"]) if template and is_rendered else str(row["prompt"])


def score_likelihoods(model: Any, task: Task, *, packed: bool) -> list[RowScore]:
    """The likelihood of every row's answer or text; of pairs, which of the two is likelier."""
    likely = row_likelihoods(model, [*task.examples, *task.rejected], task.context, packed=packed)
    rows = [RowScore(item, len(text.encode())) for item, text in zip(likely, task.texts, strict=False)]
    if not task.rejected:
        return rows
    return [with_rejected(row, other) for row, other in zip(rows, likely[len(rows) :], strict=True)]


def with_rejected(row: RowScore, other: Likelihood) -> RowScore:
    """A pair: is the chosen answer likelier, as a whole and for each of its tokens? A tie is half a win."""
    chosen = row.likelihood
    each = wins(chosen.nats / chosen.tokens, other.nats / other.tokens)
    scores = {"chosen_likelier": wins(chosen.nats, other.nats), "chosen_likelier_per_token": each}
    return replace(row, rejected=other, scores=scores)


def wins(nats: float, others: float) -> float:
    """1 for fewer nats than the other, 0.5 for as many."""
    return 1.0 if nats < others else 0.5 if nats == others else 0.0


def likeliest_labels(model: Any, task: Task, items: Sequence[int], *, packed: bool) -> Iterator[list[tuple[int, str]]]:
    """(item, label of the largest probability, its stop token included), some rows at a time."""
    spelled = dict(zip((text.strip() for text in task.references), map(reference_of, task.rows), strict=True))
    classes = task.classes
    at_once = max(1, CANDIDATES // len(classes))
    for first in range(0, len(items), at_once):
        some = items[first : first + at_once]
        examples = [
            task.encoder.example(answered(task.rows[item], spelled[label])) for item in some for label in classes
        ]
        nats = [found.nats for found in row_likelihoods(model, examples, task.context, packed=packed)]
        each = [nats[at : at + len(classes)] for at in range(0, len(nats), len(classes))]
        yield [(item, classes[values.index(min(values))]) for item, values in zip(some, each, strict=True)]


def answered(row: Row, answer: str) -> Row:
    """The row with another answer."""
    if "messages" not in row:
        return {**row, "completion": answer}
    *turns, last = row["messages"]
    return {**row, "messages": [*turns, {**last, "content": answer}]}


def with_label(row: RowScore, label: str, truth: str, classes: Sequence[str]) -> RowScore:
    """The row with its likeliest label."""
    counts = {**row.counts, "macro_f1": label_counts(truth, label, classes)}
    return replace(row, label=label, scores={**row.scores, "accuracy": float(label == truth)}, counts=counts)


def generate(
    model: Any, task: Task, items: Sequence[int], sampling: Sampling, *, batch: int, together: Together
) -> Iterator[tuple[list[int], list[Answer]]]:
    """(items, their answers) batch by batch, longest prompts first; a batch that memory lacks for goes on in halves."""
    ends = (task.stop_ids, task.stop_strings, sampling, task.context)
    asked = [Asked(task.encoder.tokenizer, task.prompts[item], *ends) for item in items]
    for places, answers in answer_batches(model, asked, batch=batch, together=together):
        yield [items[place] for place in places], answers


def score_answers(rows: Sequence[RowScore], task: Task, answers: Sequence[Answer], scoring: Scoring) -> list[RowScore]:
    """The rows with their answers and the scores of these."""
    return [
        with_answer_scores(row, task, item, answer, scoring)
        for item, (row, answer) in enumerate(zip(rows, answers, strict=True))
    ]


def with_answer_scores(row: RowScore, task: Task, item: int, answer: Answer, scoring: Scoring) -> RowScore:
    """One row with one answer."""
    reference, source = task.references[item], task.data.rows[task.places[item]]
    found = score_answer(scoring, answer.text, reference, fields=task.fields[item], row=source, where=task.where(item))
    scores, counts = {**row.scores, **found.scores}, {**row.counts, **found.counts}
    if task.classes:
        truth, label = reference.strip(), label_in(answer.text, task.classes)
        scores["text_accuracy"] = float(label == truth)
        counts["text_macro_f1"] = label_counts(truth, label, task.classes)
    return replace(
        row,
        predictions=(answer.text,),
        finishes=(answer.finish,),
        lengths=(len(answer.ids),),
        scores={**scores, "stopped": float(answer.finish == "stop")},
        counts=counts,
        extracted=found.extracted,
    )
