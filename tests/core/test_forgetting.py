import copy
import random
from contextlib import nullcontext

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ftkit.commands.eval_forgetting import warned
from ftkit.core.encoding import Example
from ftkit.core.forgetting import (
    divergence_of,
    divergence_of_two,
    keep_predictions,
    mean_divergence,
    measure_forgetting,
)
from ftkit.core.likelihood import Likelihood

torch.set_num_threads(1)


def test_the_divergence_by_hand():
    before, after = torch.tensor([[0.0, 0.0]]), torch.log(torch.tensor([[0.25, 0.75]]))
    # half log (half / quarter) + half log (half / three quarters)
    assert divergence_of(before, after).tolist() == pytest.approx([0.5 * 0.6931472 - 0.5 * 0.4054651])
    assert divergence_of(after, after).tolist() == pytest.approx([0.0], abs=1e-7)


def test_a_model_does_not_diverge_from_itself_packed_or_not():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model, draw = LlamaForCausalLM(config).eval(), random.Random(0)
    examples = [Example([draw.randrange(60) for _ in range(n)], [True] * n) for n in (5, 30, 12)]
    for packed in (True, False):
        assert mean_divergence(model, nullcontext, examples, 20, packed=packed) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_two_models_diverge_by_what_their_logits_say_though_they_were_never_in_memory_together(tied):
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(LlamaForCausalLM(config).eval())
    draw = random.Random(0)
    examples = [Example([draw.randrange(60) for _ in range(n)], [True] * n) for n in (5, 30, 12)]
    with torch.no_grad():
        logits = [[model(torch.tensor([row.ids])).logits[0, :-1] for row in examples] for model in models]
    expected = torch.cat([divergence_of(*pair) for pair in zip(*logits, strict=True)]).mean()
    for packed in (True, False):
        copies = [copy.deepcopy(model) for model in models]
        kept = [keep_predictions(model, examples, None, packed=packed) for model in copies]
        assert divergence_of_two(*kept) == pytest.approx(float(expected), rel=1e-5)
        assert divergence_of_two(kept[0], kept[0]) == pytest.approx(0, abs=1e-6)
        weights = sum(p.numel() for p in copies[0].parameters())
        assert weights == copies[0].get_output_embeddings().weight.numel(), "the body was not freed"


def test_forgetting_is_the_rise_of_the_loss_and_too_much_of_it_is_warned_of(capsys):
    before = [Likelihood(10.0, 10), Likelihood(30.0, 10)] * 10
    after = [Likelihood(12.0, 10), Likelihood(31.0, 10)] * 10
    found = measure_forgetting("mine.jsonl", before, after, 0.5, seed=1)
    assert (found.before, found.after, found.tokens) == (2.0, pytest.approx(2.15), 200)
    assert found.rise.value == pytest.approx(0.15) and found.rise.low >= 0.1 - 1e-9
    warned(found)
    assert "warning: the model has forgotten: loss on general text 2.0000 -> 2.1500" in capsys.readouterr().err
    little = measure_forgetting(
        "mine.jsonl", before, [Likelihood(r.nats + 0.5, r.tokens) for r in before], None, seed=1
    )
    assert little.rise.low > 0 and not warned(little).is_too_much and capsys.readouterr().err == ""
