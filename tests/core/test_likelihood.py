import random
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM, LlamaConfig, LlamaForCausalLM

from ftkit.core.encoding import Example
from ftkit.core.likelihood import row_likelihoods, small_batches, windows

torch.set_num_threads(1)
VOCABULARY, CONTEXT = 120, 32


@cache
def random_model(shape):
    options = dict(vocab_size=VOCABULARY, initializer_range=0.3)
    torch.manual_seed(0)
    if shape == "gpt-2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, **options)).eval()
    options |= dict(hidden_size=32, max_position_embeddings=CONTEXT)
    if shape == "gpt-neo":
        kinds = [[["global", "local"], 1]]
        return GPTNeoForCausalLM(
            GPTNeoConfig(num_layers=2, num_heads=4, attention_types=kinds, window_size=8, **options)
        ).eval()
    return LlamaForCausalLM(
        LlamaConfig(intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **options)
    ).eval()


def random_examples(count=20):
    draw = random.Random(0)
    examples = []
    for _ in range(count):
        length = draw.randint(3, CONTEXT)
        prompt = draw.randint(0, length - 2)
        ids = [draw.randrange(VOCABULARY) for _ in range(length)]
        examples.append(Example(ids, [False] * prompt + [True] * (length - prompt)))
    return examples


@torch.no_grad()
def plain_nats(model, example):
    """The likelihood as anybody would write it: one row, all logits."""
    ids = torch.tensor([example.ids])
    log_p = F.log_softmax(model(ids).logits[0].double(), dim=-1)
    counted = [at for at in range(1, len(example.ids)) if example.counted[at]]
    return -sum(float(log_p[at - 1, example.ids[at]]) for at in counted), len(counted)


@pytest.mark.parametrize("shape", ["llama", "gpt-2", "gpt-neo"])
def test_the_likelihood_of_every_answer_is_that_of_a_plain_loop(shape):
    model, examples = random_model(shape), random_examples()
    ours = row_likelihoods(model, examples, CONTEXT, VOCABULARY)
    for example, likelihood in zip(examples, ours, strict=True):
        nats, tokens = plain_nats(model, example)
        assert likelihood.tokens == tokens
        assert likelihood.nats == pytest.approx(nats, rel=1e-5)


def test_a_text_longer_than_the_context_is_read_in_windows_that_predict_each_token_once():
    ids = list(range(10))
    pieces = list(windows(Example(ids, [True] * 10), 4))
    assert [piece.ids for piece in pieces] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    predicted = [token for piece in pieces for token, counts in zip(piece.ids, piece.counted, strict=True) if counts]
    assert predicted == ids[1:]


def test_the_likelihood_of_a_long_text_is_the_sum_over_its_windows():
    model = random_model("llama")
    text = Example([i % VOCABULARY for i in range(100)], [True] * 100)
    [whole] = row_likelihoods(model, [text], CONTEXT, VOCABULARY)
    parts = [plain_nats(model, piece) for piece in windows(text, CONTEXT)]
    assert whole.tokens == 99 == sum(tokens for _, tokens in parts)
    assert whole.nats == pytest.approx(sum(nats for nats, _ in parts), rel=1e-5)


def test_micro_batches_stay_within_their_bytes_and_lose_no_row():
    pieces = list(enumerate(random_examples(50)))
    vocabulary = 2**28 // 4 // 40  # 40 counted tokens fill a micro-batch
    batches = list(small_batches(pieces, vocabulary))
    assert sorted(row for batch in batches for row, _ in batch) == list(range(50))
    assert len(batches) > 5
    assert all(len(batch) == 1 or sum(sum(piece.counted) for _, piece in batch) <= 40 for batch in batches)
