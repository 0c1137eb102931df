"""What a task is, and how its answers are generated when memory is short."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftkit.core import answering
from ftkit.core.answering import how_together
from ftkit.core.encoding import Encoder
from ftkit.core.evaluation import generate, make_task, score_likelihoods
from ftkit.core.generation import Sampling
from ftkit.io.row_file import RowFile

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture
def task(tiny_model):
    return lambda rows, kind="prompt_completion", **options: make_task(
        RowFile("rows.jsonl", rows, [f"rows.jsonl:{n}" for n in range(1, len(rows) + 1)], kind, None),
        Encoder(AutoTokenizer.from_pretrained(tiny_model)),
        None,
        [],
        512,
        **{"generates": True, "as_classes": False, **options},
    )


ROWS = [
    {"prompt": f"Below is an instruction, the same for all rows: {'count ' * n}", "completion": " ok"} for n in range(9)
]


def answers(model, made, batch=4):
    together = how_together(model, made.prompts)
    found = {}
    for items, batch_ in generate(
        model, made, list(range(len(made.prompts))), Sampling(12), batch=batch, together=together
    ):
        found |= zip(items, batch_, strict=True)
    return [found[item] for item in range(len(made.prompts))]


def test_a_batch_that_memory_lacks_for_is_generated_in_halves_with_the_same_answers(model, task, monkeypatch):
    made, sizes = task(ROWS), []
    expected = answers(model, made)
    answer_together = answering.answer_together

    def scarce(model, asked, start):
        sizes.append(len(asked))
        if len(asked) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answer_together(model, asked, start)

    monkeypatch.setattr(answering, "answer_together", scarce)
    assert answers(model, made) == expected
    assert sizes == [4, 2, 2, 4, 2, 2, 1]


def test_prompts_with_one_start_share_it_and_their_answers_are_those_of_each_alone(model, task):
    made = task(ROWS)
    assert how_together(model, made.prompts).start is not None
    assert answers(model, made) == answers(model, made, batch=1) == [answers(model, task([row]))[0] for row in ROWS]


def test_pairs_have_two_examples_a_row_and_the_longer_one_decides_whether_it_fits(model, task):
    pair = {"prompt": "Q", "chosen": " a", "rejected": " b c"}
    long = {"prompt": "Q", "chosen": " a", "rejected": " word" * 600}
    made = task([pair, long], "preference")
    assert made.places == [0] and len(made.examples) == len(made.rejected) == 1 and not made.generates
    [row] = score_likelihoods(model, made, packed=False)
    assert row.likelihood.tokens == sum(made.examples[0].counted) and row.rejected.tokens == sum(
        made.rejected[0].counted
    )


def test_pairs_share_their_prompt_in_a_pack_with_the_same_likelihoods(model, task):
    pairs = [
        {"prompt": "Below is a long instruction for all of you " * n, "chosen": " yes", "rejected": " no!"}
        for n in (2, 3)
    ]
    made = task(pairs, "preference")
    for one, other in zip(*(score_likelihoods(model, made, packed=packed) for packed in (True, False)), strict=True):
        assert one.likelihood.nats == pytest.approx(other.likelihood.nats, rel=1e-5)
        assert one.rejected.nats == pytest.approx(other.rejected.nats, rel=1e-5) and one.scores == other.scores
