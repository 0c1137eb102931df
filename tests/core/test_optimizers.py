"""Optimizers are what they are called, and the learning rate takes its course."""

import math

import pytest
import torch
from torch import nn

from ftkit.core.optimizers import decay_groups, learning_rate, make_optimizer, set_learning_rate
from ftkit.errors import ExitCode, UserError


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def descend(model, optimizer, steps):
    """Losses of a regression on fixed data."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(32, model[0].in_features, generator=generator), torch.randn(32, 4, generator=generator)
    losses = []
    for _ in range(steps):
        loss = (model(x) - y).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_adamw_takes_the_steps_of_torchs_reference():
    ours, theirs = small_model(), small_model()
    matrices, vectors = ([p for p in theirs.parameters() if p.ndim == n] for n in (2, 1))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.999), eps=1e-8, foreach=False, fused=False)
    assert descend(ours, make_optimizer(ours, "adamw", 0.01, 0.1), 20) == pytest.approx(
        descend(theirs, reference, 20), rel=1e-5
    )
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_adamw_by_hand():
    """Decay shrinks the weight by lr * decay; then Adam's first step is lr in the gradient's direction."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(2.0)
    optimizer = make_optimizer(layer, "adamw", 0.1, 0.5)
    (layer.weight.sum() * 3).backward()
    optimizer.step()
    assert float(layer.weight) == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, abs=1e-6)


def test_sgd_has_momentum():
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(0.0)
    optimizer = make_optimizer(layer, "sgd", 0.1, 0.0)
    for _ in range(2):
        optimizer.zero_grad()
        layer.weight.sum().backward()
        optimizer.step()
    assert float(layer.weight) == pytest.approx(-0.1 - 0.1 * 1.9, abs=1e-6)


def test_eight_bit_adamw_runs_on_the_cpu_and_learns_as_adamw_does():
    wide = nn.Sequential(
        nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 4)
    )  # smaller tensors than 4096 are kept in 32 bits
    state = {name: value.clone() for name, value in wide.state_dict().items()}
    exact = descend(wide, make_optimizer(wide, "adamw", 0.01, 0.0), 30)
    wide.load_state_dict(state)
    optimizer = make_optimizer(wide, "adamw-8bit", 0.01, 0.0)
    coarse = descend(wide, optimizer, 30)
    kinds = {
        value.dtype for moments in optimizer.state.values() for key, value in moments.items() if key.startswith("state")
    }
    assert torch.uint8 in kinds
    assert coarse[0] == pytest.approx(exact[0], rel=1e-6) and coarse[-1] < 0.2 * coarse[0]
    assert coarse[-1] == pytest.approx(exact[-1], abs=0.05 * exact[0]) and coarse[-1] != exact[-1]


@pytest.mark.parametrize("name", ["paged-adamw-8bit", "paged-adamw", "paged-lion-8bit"])
def test_paged_optimizers_need_a_gpu(name):
    with pytest.raises(UserError, match="needs a CUDA GPU") as caught:
        make_optimizer(small_model(), name, 0.01, 0.0)
    assert caught.value.exit_code == ExitCode.ENVIRONMENT and name.removeprefix("paged-") in caught.value.hint


def test_lion_by_hand():
    """Every step is lr in the direction of the sign of 0.9 m + 0.1 g, after the decay (arXiv:2302.06675, algorithm 2)."""
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    optimizer = make_optimizer(layer, "lion", 0.1, 0.5)
    (layer.weight * torch.tensor([[5.0, -0.1], [2.0, -3.0]])).sum().backward()
    optimizer.step()
    expected = torch.tensor([[0.95 - 0.1, -1.9 + 0.1], [2.85 - 0.1, 3.8 + 0.1]])
    torch.testing.assert_close(layer.weight.data, expected)


@pytest.mark.parametrize(("name", "rate"), [("adafactor", 0.01), ("lion", 0.003), ("lion-8bit", 0.003)])
def test_other_optimizers_learn(name, rate):
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 4))
    losses = descend(wide, make_optimizer(wide, name, rate, 0.0), 40)
    assert losses[-1] < 0.3 * losses[0]


def test_adafactors_first_step_is_the_rate_whatever_the_gradients_size():
    """Without its own schedule and scale: lr times a gradient of unit root mean square (arXiv:1804.04235, algorithm 4)."""
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.data.fill_(1.0)
    optimizer = make_optimizer(layer, "adafactor", 0.1, 0.0)
    (layer.weight.sum() * 1000).backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight.data, torch.full((4, 4), 0.9), rtol=1e-4, atol=1e-4)


def test_matrices_decay_and_vectors_do_not():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    matrices, vectors = decay_groups(list(model.parameters()), 0.1)
    assert [p.ndim for p in matrices["params"]] == [2] and matrices["weight_decay"] == 0.1
    assert [p.ndim for p in vectors["params"]] == [1, 1, 1] and vectors["weight_decay"] == 0.0
    assert len(decay_groups([model[0].weight], 0.1)) == 1  # an adapter has matrices only


def test_only_what_is_trained_is_optimised():
    model = small_model()
    model[0].requires_grad_(False)
    optimizer = make_optimizer(model, "adamw", 0.01, 0.0)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in model[2].parameters()
    }


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("linear", [0.5, 1.0, 0.8, 0.6, 0.4, 0.2]),  # down to 0 at a step 7
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("wsd", [0.5, 1.0, 1.0, 1.0, 1.0, 0.5]),
        ("cosine", [0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * share / 5)) for share in (1, 2, 3, 4))]),
    ],
)
def test_a_schedule_by_hand(schedule, rates):
    """6 steps, a third of them warm-up, to a peak of 1."""
    assert [learning_rate(step, 6, 1.0, schedule, 1 / 3) for step in range(1, 7)] == pytest.approx(rates)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 3, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.9])
def test_no_step_is_wasted_and_none_goes_beyond_the_peak(schedule, total, warmup):
    rates = [learning_rate(step, total, 2e-4, schedule, warmup) for step in range(1, total + 1)]
    assert all(0 < rate <= 2e-4 for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)


def test_warm_up_is_a_share_below_one_and_steps_from_one_on():
    rates = [[learning_rate(step, 20, 1.0, "constant", warmup) for step in range(1, 21)] for warmup in (0.2, 4)]
    assert rates[0] == rates[1] == [0.25, 0.5, 0.75, *[1.0] * 17]
    assert learning_rate(1, 20, 1.0, "constant", 1) == 1.0


def test_warmup_stable_decay_falls_in_the_last_tenth():
    rates = [learning_rate(step, 100, 1.0, "wsd", 10) for step in range(1, 101)]
    assert rates[9:90] == [1.0] * 81 and rates[90:] == pytest.approx([share / 11 for share in range(10, 0, -1)])


def test_without_warm_up_a_constant_rate_is_the_peak_throughout():
    assert {learning_rate(step, 7, 0.5, "constant", 0.0) for step in range(1, 8)} == {0.5}


def test_a_rate_is_set_for_all_groups():
    optimizer = make_optimizer(small_model(), "adamw", 0.01, 0.1)
    set_learning_rate(optimizer, 0.003)
    assert [group["lr"] for group in optimizer.param_groups] == [0.003, 0.003]
