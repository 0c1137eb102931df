import random
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM, LlamaConfig, LlamaForCausalLM

from ftkit.core.batching import AUTO_TOKENS
from ftkit.core.encoding import Example
from ftkit.core.likelihood import as_batch, micro_batches_of, row_likelihoods, token_nats, windows

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
    ours = row_likelihoods(model, examples, CONTEXT)
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
    [whole] = row_likelihoods(model, [text], CONTEXT)
    parts = [plain_nats(model, piece) for piece in windows(text, CONTEXT)]
    assert whole.tokens == 99 == sum(tokens for _, tokens in parts)
    assert whole.nats == pytest.approx(sum(nats for nats, _ in parts), rel=1e-5)


def examples_that_share():
    """Two prompts, each with five answers of a few tokens, as the labels of a row are scored."""
    draw = random.Random(3)
    prompts = [[draw.randrange(VOCABULARY) for _ in range(length)] for length in (20, 25)]
    answers = [[draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 5))] for _ in range(5)]
    return [Example(p + a, [False] * len(p) + [True] * len(a)) for a in answers for p in prompts]


def test_packed_rows_and_shared_starts_change_no_likelihood():
    model, examples = random_model("llama"), [*random_examples(), *examples_that_share()]
    for example, likelihood in zip(examples, row_likelihoods(model, examples, CONTEXT, packed=True), strict=True):
        nats, tokens = plain_nats(model, example)
        assert likelihood.tokens == tokens and likelihood.nats == pytest.approx(nats, rel=1e-5)


def test_a_shared_prompt_is_in_a_pack_once():
    examples = examples_that_share()
    [pack] = micro_batches_of(list(enumerate(examples)), packed=True)
    assert sorted(row for row, _ in pack) == list(range(10))
    fed = as_batch(pack, packed=True).input_ids.numel()
    assert fed < 0.5 * sum(len(example.ids) for example in examples)


def test_padded_micro_batches_stay_within_their_tokens_and_lose_no_row():
    examples = [Example([1] * length, [False] + [True] * (length - 1)) for length in (5000, *range(2, 400))]
    batches = micro_batches_of(list(enumerate(examples)), packed=False)
    assert sorted(row for batch in batches for row, _ in batch) == list(range(len(examples)))
    sizes = [len(batch) * max(len(piece.ids) for _, piece in batch) for batch in batches]
    assert len(batches) > 5 and all(
        size <= AUTO_TOKENS or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True)
    )


def test_the_output_head_in_chunks_gives_the_same_likelihoods(monkeypatch):
    model, examples = random_model("gpt-2"), random_examples()
    whole = row_likelihoods(model, examples, CONTEXT)
    monkeypatch.setattr("ftkit.core.likelihood.chunk_size", lambda vocabulary: 7)
    for one, other in zip(whole, row_likelihoods(model, examples, CONTEXT), strict=True):
        assert one.nats == pytest.approx(other.nats, rel=1e-6)


def test_memory_that_runs_out_halves_the_micro_batch_and_changes_nothing(monkeypatch):
    model, examples = random_model("llama"), random_examples()
    whole = row_likelihoods(model, examples, CONTEXT)

    def scarce(model, batch):
        if batch.input_ids.shape[0] > 3:
            raise MemoryError
        return token_nats(model, batch)

    monkeypatch.setattr("ftkit.core.likelihood.token_nats", scarce)
    for one, other in zip(whole, row_likelihoods(model, examples, CONTEXT), strict=True):
        assert one.tokens == other.tokens and one.nats == pytest.approx(other.nats, rel=1e-5)


@pytest.mark.parametrize("name", ["stories260k", "tinystories-chat-3m"])
def test_perplexity_of_real_models_on_real_text_is_that_of_a_plain_loop(name, shared):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ftkit.core.packing_check import packing_fault

    folder = shared / "models" / name
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = (shared / "data" / "chat" / "tinychat_val.txt").read_text(encoding="utf-8").split("\n\n")[:12]
    examples = [Example(ids[:250], [True] * len(ids[:250])) for ids in (tokenizer(text).input_ids for text in texts)]
    packed = packing_fault(model, examples, "cpu") is None
    assert packed == (name == "stories260k")  # GPT-Neo brings its own attention
    for example, found in zip(examples, row_likelihoods(model, examples, 256, packed=packed), strict=True):
        nats, tokens = plain_nats(model, example)
        assert (found.tokens, found.nats) == (tokens, pytest.approx(nats, rel=1e-5))
