"""Preference data in the shapes that are around -> a prompt and a good and a bad answer (or one answer and its label).

DPO: prompt, chosen, rejected as texts; as turns beside `conversations` or `messages`; whole dialogues that share their
beginning (hh-rlhf, UltraFeedback). KTO: a conversation or a completion with a label of true or false.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ftkit.core.columns import NoAnswer, is_missing, missing_answer
from ftkit.core.sharegpt import common_turns, to_message, to_messages
from ftkit.core.transcripts import Marks, split_turns
from ftkit.errors import ExitCode, UserError

Row = dict[str, Any]
PROMPTS = ("prompt", "question", "instruction", "query")
CONVERSATIONS = ("messages", "conversations")


def holds_preferences(columns: Sequence[str], sample: Sequence[Mapping[str, Any]]) -> bool:
    """True for pairs of answers, and for answers labelled true or false."""
    if "chosen" in columns and "rejected" in columns:
        return True
    labelled = any(isinstance(record.get("label"), bool) for record in sample)
    return labelled and any(name in columns for name in ("completion", *CONVERSATIONS))


def preference_row(values: Mapping[str, Any], marks: Marks | None, where: str) -> Row:
    """prompt, chosen, rejected, or prompt, completion, label: all texts, or all turns. `marks` cut dialogues."""
    if "chosen" in values and "rejected" in values:
        return pair_row(values, marks, where)
    if not isinstance(values.get("label"), bool):
        raise UserError(f"{where}: 'label' should be true or false", ExitCode.DATA)
    key = next((name for name in CONVERSATIONS if name in values), None)
    if key is None:
        row = {name: values.get(name) for name in ("prompt", "completion", "label")}
        return require_answers(row, ("completion",), where)
    turns = to_messages(values[key], values.get("system"), where)
    return require_answers(
        {"prompt": turns[:-1], "completion": turns[-1:], "label": values["label"]}, ("completion",), where
    )


def pair_row(values: Mapping[str, Any], marks: Marks | None, where: str) -> Row:
    """A prompt with a chosen and a rejected answer."""
    chosen, rejected = values["chosen"], values["rejected"]
    key = next((name for name in CONVERSATIONS if isinstance(values.get(name), list)), None)
    if key is not None:
        prompt: Any = to_messages(values[key], values.get("system"), where)
        chosen, rejected = as_turns(chosen, f"{where}: 'chosen'"), as_turns(rejected, f"{where}: 'rejected'")
    elif marks is not None:
        prompt, chosen, rejected = cut_common(split_turns(chosen, marks, where), split_turns(rejected, marks, where))
    elif isinstance(chosen, list) and isinstance(rejected, list):
        before = values["prompt"] if isinstance(values.get("prompt"), list) else []
        sides = [as_turns(side, where) for side in (chosen, rejected)]
        shared = common_turns(sides[0][:-1], sides[1][:-1])
        prompt = as_turns(before, where) if shared == 0 else sides[0][:shared]
        chosen, rejected = sides[0][shared:], sides[1][shared:]
        if not prompt and isinstance(values.get("prompt"), str):
            prompt = [{"role": "user", "content": values["prompt"]}]
    else:
        prompt = text_prompt(values, where)
        if isinstance(values.get("system"), str) and isinstance(prompt, str):
            prompt = with_system(values["system"], prompt)
            chosen, rejected = as_turns(chosen, where), as_turns(rejected, where)
    return require_answers({"prompt": prompt, "chosen": chosen, "rejected": rejected}, ("chosen", "rejected"), where)


def text_prompt(values: Mapping[str, Any], where: str) -> Any:
    """The prompt under one of its usual names, with Alpaca's input below it."""
    name = next((name for name in PROMPTS if name in values), None)
    if name is None:
        raise UserError(
            f"{where}: 'chosen' and 'rejected' have no prompt (there is {', '.join(values)})",
            ExitCode.DATA,
            hint=f"a prompt is called one of {', '.join(PROMPTS)}, or stands in 'conversations' or 'messages'",
        )
    extra = values.get("input")
    return f"{values[name]}\n\n{extra}" if isinstance(extra, str) and extra.strip() else values[name]


def with_system(system: str, prompt: str) -> list[dict[str, str]]:
    """A system message and a question as turns."""
    turns = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    return turns if system.strip() else turns[1:]


def as_turns(answer: Any, where: str) -> list[dict[str, Any]]:
    """An answer as turns: a text is one turn of the assistant, an object is one turn, a list is all of them."""
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    return [to_message(turn, where) for turn in (answer if isinstance(answer, list) else [answer])]


def cut_common(one: list[Any], other: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """(what two dialogues share, the rest of one, the rest of the other); the last turns are never shared."""
    shared = common_turns(one[:-1], other[:-1])
    return one[:shared], one[shared:], other[shared:]


def require_answers(row: Row, answers: Sequence[str], where: str) -> Row:
    """The row; one whose answer is empty, or whose two answers are the same, is left out as a row without an answer."""
    for name in answers:
        if is_empty(row[name]):
            raise NoAnswer(where, name, f"'{name}' is empty, nothing to learn")
        if (missing := next(filter(is_missing, texts_in(row[name])), None)) is not None:
            raise missing_answer(missing, where, name, f"'{name}': ")
    if len(answers) == 2 and row[answers[0]] == row[answers[1]]:
        raise NoAnswer(where, answers[0], "'chosen' and 'rejected' are the same, nothing to learn")
    return row


def is_empty(answer: Any) -> bool:
    """True for a blank text, and for turns of which one is blank without calling a tool."""
    if isinstance(answer, str):
        return not answer.strip()
    turns = answer if isinstance(answer, list) else []
    return any(is_empty(turn.get("content")) and not turn.get("tool_calls") for turn in turns)


def texts_in(answer: Any) -> list[str]:
    """The text of an answer, or those of its turns."""
    if isinstance(answer, str):
        return [answer]
    contents = [turn.get("content") for turn in answer] if isinstance(answer, list) else []
    return [content for content in contents if isinstance(content, str)]


def to_dialogue(row: Row) -> Row:
    """A preference of texts as one of turns, for a chat template."""
    if not isinstance(row["prompt"], str):
        return row
    turned: Row = {name: as_turns(row[name], "") for name in ("chosen", "rejected", "completion") if name in row}
    return {**row, "prompt": [{"role": "user", "content": row["prompt"]}], **turned}
