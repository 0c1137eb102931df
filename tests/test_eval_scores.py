"""`ftkit eval` on every kind of row, with every kind of score, on a model of random weights."""

import json
import math
import signal

import pytest
from conftest import CHECKOUT, assert_refused
from eval_place import lines_of

from ftkit.errors import ExitCode


@pytest.fixture
def score(run_here, tiny_model, tmp_path):
    """`ftkit eval rows.jsonl --model tiny ...` on these rows: (summary, predictions), or the refusal."""

    def run(rows, *options, exit_code=0):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
        outputs = ("--json", "-o", "out.jsonl", "--force")
        result = run_here("eval", "rows.jsonl", "--model", tiny_model, "--max-new", "6", *outputs, *options)
        assert result.exit_code == exit_code, result.stderr
        if exit_code:
            return result
        return json.loads(result.stdout), lines_of((tmp_path / "out.jsonl").read_text())

    return run


@pytest.fixture
def plain_nats(tiny_model):
    """-log p(continuation and end of text | prompt), as anybody would compute it with transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)

    @torch.no_grad()
    def nats(prompt, continuation):
        before, after = tokenizer(prompt).input_ids, [*tokenizer(continuation).input_ids, tokenizer.eos_token_id]
        log_p = model(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
        start = max(1, len(before))
        ids = before + after
        return -sum(float(log_p[at - 1, ids[at]]) for at in range(start, len(ids))), len(ids) - start

    return nats


ROUNDING = 5e-3
"""Of bfloat16, in which a foreign model runs on a CPU that is fast at it; in float32 likelihoods agree to 1e-5."""
ANSWERS = [{"prompt": "Q: a?\nA:", "completion": " yes, it is"}, {"prompt": "Q: longer?\nA:", "completion": " no"}]
PAIRS = [
    {"prompt": "Below is", "chosen": " an instruction.", "rejected": " xyz"},
    {"prompt": "Write a", "chosen": " qqq zzz", "rejected": " response"},
    {"prompt": "The", "chosen": " task", "rejected": " ~ task that is longer"},
]
CLASSES = [
    {"text": "I like it", "label": "good"},
    {"text": "no, never", "label": "bad"},
    {"text": "fine", "label": "good"},
    {"text": "meh", "label": 7},
]
JSON_ROWS = [{"prompt": f"city {n}:", "completion": json.dumps({"city": f"C{n}", "days": n})} for n in range(3)]
CHINESE = [{"prompt": "hello", "completion": "你好，世界"}, {"prompt": "bye", "completion": "再见"}]


def test_text_rows_get_loss_perplexity_and_bits_per_byte_of_a_plain_loop(score, plain_nats):
    texts = ["Below is an instruction.", "Zürich, 你好"]
    summary, _ = score([{"text": text} for text in texts])
    nats, tokens = map(sum, zip(*(plain_nats("", text) for text in texts), strict=True))
    assert summary["scores"]["loss"] == pytest.approx(nats / tokens, rel=ROUNDING)
    assert summary["scores"]["perplexity"] == pytest.approx(math.exp(summary["scores"]["loss"]))
    size = sum(len(text.encode()) for text in texts)
    assert summary["scores"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=ROUNDING)
    assert set(summary["scores"]) == {"loss", "perplexity", "bits_per_byte"}
    for low, high in summary["intervals"].values():
        assert low <= high


def test_pairs_are_scored_by_which_answer_is_likelier(score, plain_nats):
    summary, rows = score(PAIRS)
    for pair, row in zip(PAIRS, rows, strict=True):
        (good, of_good), (bad, of_bad) = (plain_nats(pair["prompt"], pair[side]) for side in ("chosen", "rejected"))
        assert row["scores"]["chosen_likelier"] == float(good < bad)
        assert row["scores"]["chosen_likelier_per_token"] == float(good / of_good < bad / of_bad)
        assert row["scores"]["rejected_loss"] == pytest.approx(bad / of_bad, rel=ROUNDING)
        assert row["chosen"] == pair["chosen"] and "prediction" not in row
    share = sum(row["scores"]["chosen_likelier"] for row in rows) / 3
    assert summary["scores"]["chosen_likelier"] == pytest.approx(share)


def test_pairs_of_turns_count_only_what_follows_their_common_prompt(score):
    asked = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "?"},
    ]
    pair = {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "Yes"), ("rejected", "No!"))}
    _, [row] = score([{"prompt": asked, **pair}], "--template", "chatml")
    alone = {"messages": [*asked, *pair["chosen"]]}
    _, [whole] = score([alone], "--template", "chatml", "--metrics", "loss")
    assert 0 < row["scores"]["tokens"] < whole["scores"]["tokens"]  # `Hello` is no part of the answer


def test_templates_of_pairs_and_classes_shape_rows_and_are_nobodys_prompt(score):
    from ftkit.io.template_files import load_template

    plain, _ = score(PAIRS)
    shaped = [{**pair, "template": load_template("preference").fingerprint} for pair in PAIRS]
    assert score(shaped)[0]["scores"] == plain["scores"]
    assert score(shaped, "--template", "chatml")[0]["scores"] == plain["scores"]  # which renders turns, not texts
    classes = [{**row, "template": load_template("classify").fingerprint} for row in CLASSES]
    assert score(classes)[0]["scores"] == score(CLASSES)[0]["scores"]


def test_classes_are_predicted_by_likelihood_and_from_the_text(score, plain_nats):
    summary, rows = score(CLASSES)
    labels = ["7", "bad", "good"]
    for row, found in zip(CLASSES, rows, strict=True):
        nats = {label: plain_nats(f"{row['text']}\nLabel:", f" {label}")[0] for label in labels}
        assert found["likeliest"] == min(nats, key=nats.get)
        assert found["scores"]["accuracy"] == float(found["likeliest"] == str(row["label"]))
        assert found["reference"] == f" {row['label']}" and "prediction" in found
    assert summary["confusion"]["labels"] == labels
    for table in (summary["confusion"]["likelihood"], summary["confusion"]["text"]):
        assert [sum(line) for line in table] == [1, 1, 2] and {len(line) for line in table} == {4}
    assert set(summary["scores"]) >= {"accuracy", "macro_f1", "text_accuracy", "text_macro_f1"}
    assert "bleu" not in summary["scores"]


def test_answers_may_be_scored_as_labels_but_not_free_texts(score):
    rows = [{"prompt": f"{n}:", "completion": " even" if n % 2 else " odd"} for n in range(6)]
    summary, found = score(rows, "--metrics", "labels")
    assert summary["confusion"]["labels"] == ["even", "odd"] and "f1" not in summary["scores"]
    assert {row["likeliest"] for row in found} <= {"even", "odd"}
    free = [{"prompt": f"{n}:", "completion": f" {n}"} for n in range(6)]
    refused = score(free, "--metrics", "labels", exit_code=ExitCode.DATA)
    assert_refused(refused, ExitCode.DATA, "6 different answers in 6 rows are no labels")


def test_free_text_gets_bleu_chrf_and_rouge_by_default_and_only_what_is_named_otherwise(score):
    summary, rows = score(ANSWERS)
    assert {"exact_match", "f1", "bleu", "chrf", "rouge1", "rougeL", "stopped"} <= set(summary["scores"])
    assert {"bleu", "chrf"} <= set(rows[0]["scores"])
    summary, _ = score(ANSWERS, "--metrics", "chrf,loss")
    assert set(summary["scores"]) == {"loss", "perplexity", "bits_per_byte", "chrf", "stopped"}
    summary, rows = score(ANSWERS, "--metrics", "loss")
    assert "stopped" not in summary["scores"] and "prediction" not in rows[0]


def test_corpus_scores_are_those_of_sacrebleu_on_the_written_answers(score):
    from sacrebleu.metrics import BLEU, CHRF

    for rows, language in ((ANSWERS, None), (CHINESE, "zh")):
        options = ("--lang", language) if language else ()
        summary, found = score(rows, *options)
        answers, references = [row["prediction"] for row in found], [row["reference"] for row in found]
        bleu = BLEU(trg_lang=language or "").corpus_score(answers, [references]).score
        assert summary["scores"]["bleu"] == pytest.approx(bleu)
        assert summary["scores"]["chrf"] == pytest.approx(CHRF().corpus_score(answers, [references]).score)


def test_text_without_latin_letters_gets_chrf_and_the_others_are_refused_with_what_to_type(score):
    summary, _ = score(CHINESE)
    assert "chrf" in summary["scores"] and not {"rouge1", "bleu", "f1"} & set(summary["scores"])
    for metric, hint in (("rouge", "--metrics chrf"), ("bleu", "--metrics bleu --lang zh"), ("f1", "--metrics chrf")):
        refused = score(CHINESE, "--metrics", metric, exit_code=ExitCode.DATA)
        assert_refused(refused, ExitCode.DATA, f"--metrics {metric}:", hint)


def test_json_answers_are_scored_as_json_against_a_schema(score, tmp_path):
    properties = {"city": {"type": "string"}, "days": {"type": "integer"}}
    (tmp_path / "schema.json").write_text(json.dumps({"type": "object", "properties": properties}))
    summary, rows = score(JSON_ROWS, "--schema", "schema.json")
    assert {"json_valid", "schema_valid", "json_equal", "field_accuracy", "field.city"} <= set(summary["scores"])
    assert "bleu" not in summary["scores"] and set(rows[0]["scores"]) >= {"schema_valid", "field.days"}


def test_references_that_do_not_fit_the_schema_are_said(run_here, tiny_model, tmp_path):
    (tmp_path / "schema.json").write_text('{"properties": {"days": {"maximum": 1}}}')
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in JSON_ROWS))
    result = run_here("eval", "rows.jsonl", "--model", tiny_model, "--max-new", "2", "--schema", "schema.json")
    assert "1 of 3 reference answers do not fit the schema; rows.jsonl:3: 2 is greater than" in result.stderr


def test_extract_and_own_scorers_have_their_columns(score, tmp_path):
    (tmp_path / "mine.py").write_text("def words(answer, reference, row):\n    return len(reference.split())\n")
    rows = [{"prompt": "1+1", "completion": " so #### 2"}]
    summary, [row] = score(rows, "--extract", r"#### (\d+)", "--scorer", "mine.py:words", "--metrics", "loss")
    assert summary["scores"]["words"] == 3 and {"extracted", "extracted_match"} <= set(summary["scores"])
    assert row["scores"]["words"] == 3


@pytest.mark.parametrize(
    ("rows", "options", "code", "words"),
    [
        (ANSWERS, ["--metrics", "rogue"], ExitCode.USAGE, ["rogue", "did you mean 'rouge'?"]),
        (ANSWERS, ["--metrics", ","], ExitCode.USAGE, ["names no score"]),
        (ANSWERS, ["--schema", "none.json"], ExitCode.USAGE, ["none.json: no such file"]),
        (ANSWERS, ["--schema", "broken.json"], ExitCode.DATA, ["broken.json: not JSON"]),
        (ANSWERS, ["--schema", "wrong.json"], ExitCode.DATA, ["wrong.json: no valid JSON schema (type:"]),
        (JSON_ROWS, ["--schema", "remote.json"], ExitCode.DATA, ["refers to https://example.org/a.json"]),
        (ANSWERS, ["--extract", "("], ExitCode.USAGE, ["--extract: no regular expression"]),
        (ANSWERS, ["--extract", "yes"], ExitCode.DATA, ["rows.jsonl:2: --extract finds nothing", "' no'"]),
        (ANSWERS, ["--scorer", "mine.py:none"], ExitCode.USAGE, ["mine.py has no function 'none'"]),
        (ANSWERS, ["--scorer", "mine.py:fails"], ExitCode.DATA, ["rows.jsonl:1: --scorer fails: KeyError: 'x'"]),
        (ANSWERS, ["--lang", "Chinese"], ExitCode.USAGE, ["--lang Chinese: not a language code"]),
        (ANSWERS, ["--fail-under", "f1"], ExitCode.USAGE, ["should be NAME=NUMBER"]),
        (ANSWERS, ["--fail-under", "blue=3"], ExitCode.USAGE, ["--fail-under blue", "did you mean 'bleu'?"]),
        (ANSWERS, ["--fail-if-worse"], ExitCode.USAGE, ["--fail-if-worse needs something to compare with"]),
        (ANSWERS, ["--seed", "1", "--seed", "2"], ExitCode.USAGE, ["several --seed", "--temperature"]),
        (ANSWERS, ["--seed", "-1"], ExitCode.USAGE, ["--seed -1 is out of range"]),
        (ANSWERS, ["--forgetting", "default"], ExitCode.USAGE, ["--forgetting", "no untuned base"]),
        ([{"text": "a b"}], ["--metrics", "bleu"], ExitCode.DATA, ["rows.jsonl:1", "no reference answer, which bleu needs"]),
        ([{"text": "a b"}], ["--extract", "a"], ExitCode.DATA, ["which --extract needs"]),
        (PAIRS, ["--metrics", "f1"], ExitCode.DATA, ["rows of preference have no reference answer"]),
        ([{"prompt": "a", "completion": "b", "label": True}], [], ExitCode.DATA, ["rows.jsonl:1: one answer and its label"]),
        ([ANSWERS[0], PAIRS[0]], [], ExitCode.DATA, ["2 kinds"]),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused_before_anything_is_generated(score, tmp_path, rows, options, code, words):
    (tmp_path / "mine.py").write_text("def fails(answer, reference, row):\n    return row['x']\n")
    (tmp_path / "broken.json").write_text('{"type": ')
    (tmp_path / "wrong.json").write_text('{"type": "thing"}')
    (tmp_path / "remote.json").write_text('{"$ref": "https://example.org/a.json"}')
    refused = score(rows, *options, exit_code=code)
    assert_refused(refused, code, *words)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_gate_that_fails_is_exit_8_and_everything_is_written_all_the_same(run_here, tiny_model, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ANSWERS))
    command = ("eval", "rows.jsonl", "--model", tiny_model, "--max-new", "3", "--json", "-o", "out.jsonl", "--force")
    passed = run_here(*command, "--fail-under", "f1=0", "--fail-under", "loss=1000")
    assert passed.exit_code == ExitCode.OK and json.loads(passed.stdout)["failed"] == []
    failed = run_here(*command, "--fail-under", "f1=0.99", "--fail-under", "loss=0.01")
    assert failed.exit_code == ExitCode.GATE
    summary = json.loads(failed.stdout)
    assert len(summary["failed"]) == 2 and len(lines_of((tmp_path / "out.jsonl").read_text())) == 2
    assert "f1 is" in failed.stderr and "under 0.99" in failed.stderr and "above 0.01" in failed.stderr


def test_several_seeds_are_averaged_and_each_is_told(score):
    options = ("--temperature", "1.5", "--max-new", "8")
    both, rows = score(ANSWERS, *options, "--seed", "1", "--seed", "2")
    alone = [score(ANSWERS, *options, "--seed", seed) for seed in ("1", "2")]
    for number, row in enumerate(rows):
        assert row["predictions"] == [found[1][number]["prediction"] for found in alone]
    assert len(set(rows[0]["predictions"])) == 2  # the seeds draw different answers
    for metric in ("f1", "chrf", "stopped"):
        assert [seed[metric] for seed in both["by_seed"]] == [found[0]["scores"][metric] for found in alone]
    assert both["scores"]["f1"] == pytest.approx(sum(seed["f1"] for seed in both["by_seed"]) / 2)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, ExitCode.STOPPED)], ids=str
)
def test_an_interrupted_evaluation_goes_on_from_its_cache_and_ends_the_same(number, code, score, tmp_path, monkeypatch):
    from ftkit.commands import eval_scores

    rows = [{"prompt": f"Question {'x' * n}", "completion": f" {n}"} for n in range(6)]
    options = ("--cache", "answers.cache", "--batch", "2")
    whole, expected = score(rows, "--batch", "2")
    asked = []
    generate = eval_scores.generate

    def interrupted(model, task, items, *rest, **options):
        asked.append(list(items))
        for at, batch in enumerate(generate(model, task, items, *rest, **options)):
            if len(asked) == 1 and at == 2:
                signal.raise_signal(number)
            yield batch

    monkeypatch.setattr(eval_scores, "generate", interrupted)
    stopped = score(rows, *options, exit_code=code)
    assert "answers so far are in answers.cache" in stopped.stderr and stopped.stdout == ""
    with (tmp_path / "answers.cache").open("ab") as file:
        file.write(b'["ftkit.cache/1", "half a li')
    again, found = score(rows, *options)
    assert [len(items) for items in asked] == [6, 2]
    assert found == expected and again == whole
    score(rows, *options)
    assert len(asked) == 2  # nothing is left to generate
    score(rows, *options, "--max-new", "3")
    assert len(asked[-1]) == 6  # other settings, other answers


def test_a_cache_that_is_another_file_is_refused(score, tmp_path):
    (tmp_path / "notes.txt").write_text("keep me\n")
    refused = score(ANSWERS, "--cache", "notes.txt", exit_code=ExitCode.DATA)
    assert_refused(refused, ExitCode.DATA, "notes.txt:1: not a line of ftkit's cache")
    assert (tmp_path / "notes.txt").read_text() == "keep me\n"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"text": "Below is an instruction."}], ["Nothing to compare with: add --baseline", "rows: 1", "loss"]),
        (PAIRS, ["chosen likelier", "<h3>rejected</h3>", "<h3>chosen</h3>"]),
        (CLASSES, ["The likeliest label", "The label that was written", "macro-F1"]),
        (JSON_ROWS, ["valid JSON", "field city"]),
    ],
)
def test_every_kind_of_row_has_its_page(score, tmp_path, rows, says):
    score(rows, "--report", "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert html.count("<article>") == len(rows) and all(words in html for words in says)
    assert "ftkit eval rows.jsonl --model" in html


def test_the_schema_of_real_slots_takes_every_reference_and_refuses_what_is_none(shared):
    """SNIPS, as docs/eval.md scores it."""
    import sys

    from ftkit.commands.eval_metrics import fault_of, load_schema

    sys.path.insert(0, str(CHECKOUT / "docs" / "examples"))
    try:
        from slots import slots
    finally:
        sys.path.pop(0)
    schema = load_schema(str(CHECKOUT / "tests" / "schemas" / "weather_slots.json"))
    path = shared / "data" / "extract" / "snips_validate_GetWeather.json"
    records = json.loads(path.read_text(encoding="utf-8"))["GetWeather"]
    references = [row["completion"] for record in records for row in slots(record)]
    assert len(references) == 100 and [fault_of(schema, text) for text in references] == [None] * 100
    assert fault_of(schema, '{"city": "Oslo"}') and fault_of(schema, '{"town": ["Oslo"]}') and fault_of(schema, "Oslo")
