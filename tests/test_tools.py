"""Rows with tools, end to end: prepared, trained, scored and asked, where the model's chat template shows tools."""

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import assert_refused
from prep_shell import jsonl
from transformers import AutoTokenizer

from ftkit.core.encoding import Encoder
from ftkit.errors import ExitCode, UserError

TEMPLATE = (  # tools, calls and results as JSON, between the small model's special tokens
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "area", "parameters": {}}}]


def call(arguments):
    return {"id": "1", "type": "function", "function": {"name": "area", "arguments": arguments}}


def conversation(side, arguments, *, tools=TOOLS, end=4):
    turns = [
        {"role": "user", "content": f"A square of {side}?"},
        {"role": "assistant", "content": "", "tool_calls": [call(arguments)]},
        {"role": "tool", "content": str(side * side)},
        {"role": "assistant", "content": f"{side * side}."},
    ]
    return {"messages": turns[:end]} | ({"tools": tools} if tools else {})


ROWS = jsonl(*[conversation(side, {"side": side}) for side in range(1, 9)])


@pytest.fixture(scope="module")
def tool_model(tiny_model, tmp_path_factory):
    """The small model with a chat template that shows tools."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("models") / "tools")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_calls_are_trained_and_scored_and_answers_come_from_prompts_with_the_tools(run_here, tool_model, tmp_path):
    trained = run_here("train", "-", "--model", tool_model, "--steps", 2, "--valid", 0, "--run", "run", stdin=ROWS)
    assert trained.exit_code == 0 and "context only" not in trained.stderr, trained.stderr
    (tmp_path / "test.jsonl").write_text(ROWS)
    scored = run_here("eval", "test.jsonl", "--run", "run", "--max-new", 4)
    assert scored.exit_code == 0, scored.stderr
    first = json.loads(scored.stdout.splitlines()[0])
    assert first["tools"] == TOOLS and len(first["messages"]) == 3 and first["reference"] == "1."

    asked = [json.loads(line) for line in ROWS.splitlines()[:2]]
    without = [{key: value for key, value in row.items() if key != "tools"} for row in asked]
    greedy = ("chat", "run", "--json", "--temperature", 0, "--max-new", 8)
    answers = run_here(*greedy, stdin=jsonl(*asked))
    others = run_here(*greedy, stdin=jsonl(*without))
    assert answers.exit_code == others.exit_code == 0 and answers.stdout != others.stdout


def test_rows_that_end_in_a_call_are_scored_by_their_loss_or_refused(run_here, tool_model, tmp_path):
    (tmp_path / "calls.jsonl").write_text(jsonl(*[conversation(n, {"side": n}, end=2) for n in (2, 3)]))
    scored = run_here("eval", "calls.jsonl", "--model", tool_model)
    assert scored.exit_code == 0 and "calls.jsonl:1: the last turn calls a tool" in scored.stderr, scored.stderr
    refused = run_here("eval", "calls.jsonl", "--model", tool_model, "--metrics", "labels")
    assert_refused(refused, ExitCode.DATA, "calls.jsonl:1: the last turn calls a tool", "labels", "--metrics loss")


def test_a_model_that_cannot_show_tools_is_refused_before_it_is_trained_or_asked(run_here, tiny_model):
    refused = run_here("train", "-", "--model", tiny_model, "--template", "chatml", stdin=ROWS)
    assert_refused(refused, ExitCode.MODEL, "<stdin>:1: the chat template leaves out", "chat template takes tools")
    asked = run_here("chat", tiny_model, "--template", "chatml", stdin=jsonl(conversation(2, {}, end=1)))
    assert_refused(asked, ExitCode.MODEL, "<stdin>:1: the chat template leaves out the tool area")
    alone = run_here("chat", tiny_model, stdin=jsonl(conversation(2, {}, end=1)))
    assert_refused(alone, ExitCode.MODEL, "<stdin>:1: 'tools' for a model without a chat template")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (conversation(2, '{"side": 2}'), "turn 2: the arguments of a call are text, should be an object"),
        (conversation(2, {}, tools=["area"]), "'tools' should be a list of functions"),
        ({"messages": [{"role": "user", "content": "?", "tool_calls": [call({})]}, {"role": "assistant", "content": "a"}]},
         "turn 1: only the assistant calls tools"),
    ],
)  # fmt: skip
def test_tools_in_another_shape_are_refused_by_row(run_here, tool_model, row, words):
    assert_refused(run_here("train", "-", "--model", tool_model, stdin=jsonl(row)), ExitCode.DATA, "<stdin>:1", words)


def test_prep_makes_openais_rows_trainable(prep, run_here, tool_model):
    row = conversation(2, '{"side": 2}')
    row["messages"][1]["content"] = None
    made = prep(stdin=jsonl(row))
    assert made.rows == [conversation(2, {"side": 2})]
    result = run_here("train", "-", "--model", tool_model, "--valid", 0, "--dry-run", stdin=made.stdout)
    assert result.exit_code == 0, result.stderr


def test_real_tool_calls_are_trained_after_prep(prep, run_here, tool_model, shared):
    made = prep(shared / "data/chat/glaive_toolcall_en_demo.json", "--sample", 40)
    assert '"tool_calls"' in made.stdout and '"tools"' in made.stdout
    options = ("--max-length", 1024, "--overlength", "truncate", "--dry-run")
    result = run_here("train", "-", "--model", tool_model, *options, stdin=made.stdout)
    assert result.exit_code == 0, result.stderr


SIDE = {"type": "object", "properties": {"side": {"type": "number", "description": "its side"}}, "required": ["side"]}
AREA = {"name": "area", "description": "Of a square.", "parameters": SIDE}
ROW = conversation(3, {"side": 3}, tools=[{"type": "function", "function": AREA}])
REAL = {
    "llama3_2": '{"name": "area", "parameters": {"side": 3}}<|eot_id|>|9.<|eot_id|>',
    "qwen2_5": '<tool_call>\n{"name": "area", "arguments": {"side": 3}}\n</tool_call><|im_end|>|9.<|im_end|>',
    "qwen3": "<think>\n\n</think>\n\n9.<|im_end|>",
    "gptoss": ' to=functions.area<|channel|>commentary json<|message|>{"side": 3}<|call|>'
    "|<|channel|>final<|message|>9.<|return|>",
}
REFUSED = {
    "llama3": "leaves out the call of area in turn 2",
    "gemma3": "roles must alternate",
    "glm4moe": "without a stop token",
}
SPECIAL = re.compile(r"<\|?[A-Za-z_]+\|?>")


def real_encoder(name, folder):
    """The small model's tokenizer with a chat template of a real model and the special tokens in it; TRL ships these."""
    if find_spec("trl") is None:
        pytest.skip("trl is not installed")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = (Path(find_spec("trl").origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(SPECIAL.findall(template)))})
    tokenizer.bos_token, tokenizer.chat_template = "<s>", template
    return Encoder(tokenizer)


@pytest.mark.parametrize("name", REAL)
def test_real_templates_train_the_call_and_the_answer_with_their_stop_tokens(name, tiny_model):
    encoder = real_encoder(name, tiny_model)
    example = encoder.example(ROW)
    stretches = [
        (counts, encoder.tokenizer.decode([i])) for i, counts in zip(example.ids, example.counted, strict=True)
    ]
    told = "".join(text if counts else "\0" for counts, text in stretches)
    assert "|".join(filter(None, told.split("\0"))) == REAL[name]
    prompt = encoder.input_ids(ROW)
    assert example.ids[: len(prompt)] == prompt


@pytest.mark.parametrize("name", REFUSED)
def test_real_templates_that_would_lose_a_part_are_refused(name, tiny_model):
    with pytest.raises(UserError, match=REFUSED[name]):
        real_encoder(name, tiny_model).example(ROW)


def test_a_template_that_drops_what_is_said_is_refused(tiny_model):
    """Those of models that see pictures take a list of parts, and show nothing of a plain text."""
    encoder = real_encoder("smolvlm", tiny_model)
    row = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]}
    with pytest.raises(UserError, match="leaves out what the user says in turn 1 and 1 more"):
        encoder.example(row)
