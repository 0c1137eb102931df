"""The loss is transformers' own, computed where a token is counted only."""

import math

import pytest
import torch
import torch.nn.functional as F
from architectures import build_model, every_architecture

from ftkit.core.batching import Batch, make_batch
from ftkit.core.encoding import Example
from ftkit.core.loss import counted_logits, mean_loss, selecting, summed_loss

LENGTHS = (17, 9, 12)


def ragged_examples(lengths=LENGTHS, prompt=4, vocabulary=64):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return [Example(ids, [False] * prompt + [True] * (len(ids) - prompt)) for ids in rows]


def as_transformers(examples):
    """input_ids, attention_mask and labels, padded on the right, as transformers wants them."""
    longest = max(len(example.ids) for example in examples)
    ids, mask, labels = (torch.full((len(examples), longest), fill) for fill in (0, 0, -100))
    for row, example in enumerate(examples):
        size = len(example.ids)
        ids[row, :size], mask[row, :size] = torch.tensor(example.ids), 1
        labels[row, :size] = torch.tensor(
            [token if counted else -100 for token, counted in zip(example.ids, example.counted, strict=True)]
        )
    return ids, mask, labels


@every_architecture
def test_summed_loss_is_that_of_transformers(architecture):
    model, examples = build_model(architecture), ragged_examples()
    batch = make_batch(examples)
    ids, mask, labels = as_transformers(examples)
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=mask, labels=labels).loss * batch.counted.numel()
        ours = summed_loss(model, batch)
    assert ours.dtype == torch.float32 and ours.shape == ()
    assert batch.counted.numel() == sum(LENGTHS) - 4 * len(LENGTHS)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


@every_architecture
def test_summed_loss_in_float64_is_that_of_transformers_logits(architecture):
    """Row by row: with a mask, Gemma2's are no numbers in float64."""
    model = build_model(architecture, torch.float64)
    for example in ragged_examples():
        ids, _, labels = as_transformers([example])
        with torch.no_grad():
            logits = model(input_ids=ids[:, :-1]).logits[0]
            theirs = F.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=-100)
            ours = summed_loss(model, make_batch([example]))
        assert logits.dtype == ours.dtype == torch.float64
        assert float(ours) == pytest.approx(float(theirs), rel=1e-10)


@every_architecture
def test_a_padded_batch_is_the_sum_of_its_rows(architecture):
    """To 1e-7: in a float64 model too, some architectures normalise or attend in float32."""
    model, examples = build_model(architecture, torch.float64), ragged_examples()
    with torch.no_grad():
        together = summed_loss(model, make_batch(examples))
        alone = sum(summed_loss(model, make_batch([example])) for example in examples)
    assert float(together) == pytest.approx(float(alone), rel=1e-7)


@every_architecture
def test_more_pads_change_nothing(architecture):
    model = build_model(architecture, torch.float64)
    batch = make_batch(ragged_examples())
    rows, longest = batch.input_ids.shape
    wide = torch.cat([batch.input_ids, torch.full((rows, 7), 5)], dim=1)
    moved = batch.counted // longest * (longest + 7) + batch.counted % longest
    with torch.no_grad():
        narrow = summed_loss(model, batch)
        padded = summed_loss(model, Batch(wide, moved, batch.labels, batch.tokens))
    assert float(padded) == pytest.approx(float(narrow), rel=1e-7)


def test_the_loss_by_hand():
    """One token of probability 1/2 and one of 1/4: 3 ln 2 nats."""

    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Identity()

        def get_output_embeddings(self):
            return self.head

        def forward(self, input_ids, use_cache):
            rows = {0: [0.25, 0.5, 0.25], 1: [0.5, 0.25, 0.25], 2: [0.25, 0.25, 0.5]}
            hidden = torch.tensor([[rows[int(token)] for token in row] for row in input_ids]).log()
            return type("Output", (), {"logits": self.head(hidden)})

    loss = summed_loss(Fixed(), make_batch([Example([1, 0, 0], [False, True, False]), Example([2, 1], [False, True])]))
    assert float(loss) == pytest.approx(3 * math.log(2), rel=1e-6)


def test_the_output_head_sees_counted_positions_only():
    model = build_model("llama")
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    batch = make_batch(ragged_examples())
    logits = counted_logits(model, batch.input_ids, batch.counted)
    assert seen == [(1, batch.counted.numel(), 64)] and logits.shape == (batch.counted.numel(), 64)


def test_gradients_are_those_of_transformers():
    examples = ragged_examples()
    ids, mask, labels = as_transformers(examples)
    theirs, ours = build_model("llama"), build_model("llama")
    batch = make_batch(examples)
    (theirs(input_ids=ids, attention_mask=mask, labels=labels).loss * batch.counted.numel()).backward()
    summed_loss(ours, batch).backward()
    for (name, a), (_, b) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_prompt_tokens_are_context_without_loss():
    """Whatever the prompt's own tokens would cost, the loss is that of the answer's."""
    model = build_model("llama", torch.float64)
    example = ragged_examples((12,))[0]
    with torch.no_grad():
        loss = summed_loss(model, make_batch([example]))
        rows = torch.tensor([example.ids])
        logs = model(input_ids=rows).logits[0, :-1].log_softmax(-1)
        by_hand = -sum(logs[place - 1, example.ids[place]] for place in range(4, 12))
    assert float(loss) == pytest.approx(float(by_hand), rel=1e-10)


def test_the_hook_is_gone_after_an_error():
    model = build_model("llama")
    with pytest.raises(IndexError), selecting(model.lm_head, torch.tensor([0])):
        model(input_ids=torch.tensor([[1_000]]))  # no such id
    assert not model.lm_head._forward_pre_hooks
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 64)


def test_mean_loss_weighs_tokens_and_puts_the_mode_back():
    model, examples = build_model("gpt2").train(), ragged_examples()  # GPT-2 has dropout: evaluation must switch it off
    batches = [make_batch(examples[:1]), make_batch(examples[1:])]
    loss, tokens = mean_loss(model, batches, "cpu")
    again, _ = mean_loss(model, batches, "cpu")
    assert model.training and loss == again
    model.eval()
    with torch.no_grad():
        assert tokens == 26 and loss == pytest.approx(float(summed_loss(model, make_batch(examples))) / 26, rel=1e-6)
