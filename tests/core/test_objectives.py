"""What a run minimises beside plain likelihood: rows with weights, smoothed labels, noise on the embeddings."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from architectures import build_model

from ftkit.core import loss as loss_module
from ftkit.core.adapters import make_trainable, trainable_parameters
from ftkit.core.batching import make_batch, packed_batches
from ftkit.core.chunked_loss import Targets
from ftkit.core.encoding import Example
from ftkit.core.objectives import noisy_embeddings, training_objective
from ftkit.core.packed_attention import packed_attention
from ftkit.core.train_settings import TrainSettings
from ftkit.core.training import accumulate


def rows(weights=(1.0, 1.0, 1.0), start=0):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in (17, 9, 12)]
    common = list(range(3, 3 + start))
    counted = [[False] * (4 + start) + [True] * (len(row) - 4) for row in ids]
    return [Example(common + row, flags, weight) for row, flags, weight in zip(ids, counted, weights, strict=True)]


def step(examples, *, packed, settings):
    """(mean loss, gradients) of one global batch."""
    model = make_trainable(build_model("llama"), TrainSettings(full=True))
    batches = (
        packed_batches(examples, 200, share=True) if packed else [make_batch(examples[:2]), make_batch(examples[2:])]
    )
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def work():
        nats = accumulate(model, batches, training_objective(settings), scaler)
        return float(nats) / sum(b.divisor for b in batches), [p.grad.clone() for p in trainable_parameters(model)]

    if packed:
        with packed_attention(model):
            return work()
    return work()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("in_chunks", [False, True])
def test_a_row_of_weight_two_is_the_row_twice_in_the_same_batch(packed, in_chunks, monkeypatch):
    if in_chunks:
        monkeypatch.setattr(loss_module, "chunk_size", lambda _: 3)
    settings = TrainSettings(label_smoothing=0.1)
    examples = rows((2.0, 1.0, 1.0), start=20)
    twice = [replace(examples[0], weight=1.0), replace(examples[0], weight=1.0), *examples[1:]]
    weighted, expected = step(examples, packed=packed, settings=settings), step(twice, packed=packed, settings=settings)
    assert weighted[0] == pytest.approx(expected[0], rel=1e-6)
    for ours, theirs in zip(weighted[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    plain = step([replace(e, weight=1.0) for e in examples], packed=packed, settings=settings)
    assert abs(plain[0] - expected[0]) > 1e-3


def test_weights_that_are_all_the_same_change_nothing_but_rounding():
    plain, doubled = (step(rows((w, w, w)), packed=False, settings=TrainSettings()) for w in (1.0, 3.0))
    assert plain[0] == pytest.approx(doubled[0], rel=1e-6)
    assert make_batch(rows()).weights is None and make_batch(rows()).divisor == 26


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("in_parts", [False, True])
def test_smoothed_and_weighted_nats_are_torchs_cross_entropy(smoothing, in_parts):
    generator = torch.Generator().manual_seed(2)
    logits = (5 * torch.randn(7, 30, generator=generator)).double().requires_grad_()
    labels, weights = torch.randint(0, 30, (7,), generator=generator), torch.rand(7, generator=generator) + 0.5
    exact = logits.detach().clone().requires_grad_()
    losses = F.cross_entropy(exact, labels, reduction="none", label_smoothing=smoothing)
    (losses * weights).sum().mul(0.3).backward()
    targets = Targets(labels, weights, smoothing)
    ours = targets.nats(logits) if not in_parts else sum(part.nats(row) for part, row in zip(
        targets.split(3), torch.split(logits, 3), strict=True))  # fmt: skip
    ours.mul(0.3).backward()
    assert float(ours.detach()) == pytest.approx(float((losses * weights).sum().detach()), rel=1e-12)
    torch.testing.assert_close(logits.grad, exact.grad, rtol=1e-10, atol=1e-12)


def test_smoothing_by_hand():
    """Three tokens, p = 1/2, 1/4, 1/4: 0.9 * ln 2 + 0.1 * (ln 2 + 2 ln 4) / 3."""
    logits = torch.tensor([[math.log(2), 0.0, 0.0]], dtype=torch.float64)
    expected = 0.9 * math.log(2) + 0.1 * (math.log(2) + 2 * math.log(4)) / 3
    assert float(Targets(torch.tensor([0]), None, 0.1).nats(logits)) == pytest.approx(expected, rel=1e-12)


def embedded(model, batch, alpha):
    """(embeddings without, with noise), (B, T, D)."""
    layer = model.get_input_embeddings()
    with torch.no_grad():
        plain = layer(batch.input_ids)
        with noisy_embeddings(model, batch, alpha):
            noisy = layer(batch.input_ids)
        assert torch.equal(layer(batch.input_ids), plain)  # the noise is gone with the block
    return plain, noisy


def test_noise_has_the_size_that_neftune_gives_it_row_by_row_packed_or_padded():
    """Uniform in +-alpha / sqrt(L D), so its standard deviation is that over sqrt(3)."""
    model, alpha = build_model("llama"), 5.0
    examples = [Example([3] * length, [False] + [True] * (length - 1)) for length in (401, 101)]
    torch.manual_seed(0)
    padded, (pack,) = make_batch(examples), packed_batches(examples, 1000, share=False)
    for batch, cut in ((padded, None), (pack, pack.lengths)):
        plain, noisy = embedded(model, batch, alpha)
        noise = (noisy - plain).flatten(0, 1) if cut else noisy - plain
        parts = torch.split(noise, list(cut)) if cut else [noise[i, :n] for i, n in enumerate(batch.lengths)]
        for part, length in zip(parts, batch.lengths, strict=True):
            widest = alpha / math.sqrt(length * 32)
            assert part.shape[0] == length and float(part.abs().max()) <= widest * 1.0001
            assert float(part.std()) == pytest.approx(widest / math.sqrt(3), rel=0.05)
            assert abs(float(part.mean())) < 0.05 * widest


def test_noise_is_torchs_so_the_same_seed_gives_the_same_loss():
    model, batch = build_model("llama").train(), make_batch(rows())
    noisy = training_objective(TrainSettings(neftune=10.0))
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(noisy(model, batch).detach()))
    plain = float(training_objective(TrainSettings())(model, batch).detach())
    assert losses[0] == losses[1] != losses[2] and plain not in losses
