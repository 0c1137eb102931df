"""The step and its loop: exact accumulation, the same numbers from the same seed, and those of plain PyTorch."""

import math
import random
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from architectures import build_model
from peft import LoraConfig, get_peft_model

from ftkit.core.adapters import make_trainable, trainable_parameters
from ftkit.core.batching import micro_batches
from ftkit.core.encoding import Example
from ftkit.core.loss import summed_loss
from ftkit.core.optimizers import make_optimizer
from ftkit.core.packed_attention import packed_attention
from ftkit.core.plan import Plan
from ftkit.core.train_settings import TrainSettings
from ftkit.core.training import begin_training, require_finite, train_step, train_steps
from ftkit.errors import ExitCode, UserError

PLAN = Plan(batch=8, micro_batch=2, steps=5, lr=0.01, schedule="linear", warmup=0.2, max_grad_norm=1.0, seed=42)
PACKED = replace(PLAN, pack=True, share_prefix=True, micro_tokens=64)


START = [3 + place % 50 for place in range(20)]


def ragged_examples(count=20, vocabulary=64):
    """Rows of 6 to 19 tokens, the first 4 of them context."""
    draw = random.Random(7)
    rows = [[draw.randrange(3, vocabulary) for _ in range(draw.randrange(6, 20))] for _ in range(count)]
    return [Example(ids, [False] * 4 + [True] * (len(ids) - 4)) for ids in rows]


def lora(dtype=torch.float32, base=build_model, **options):
    torch.manual_seed(42)
    return make_trainable(base("llama", dtype), TrainSettings(r=4, **options))


def nf4_model(architecture, dtype=torch.float32):
    """The model with its layers' weights packed by bitsandbytes, the output head as it was."""
    from bitsandbytes.nn import Linear4bit

    model = build_model(architecture, dtype)
    for name, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and name != "lm_head":
            packed = Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
            )
            packed.load_state_dict(layer.state_dict())
            packed.support_avx512bf16_for_cpu = False
            model.set_submodule(name, packed.to("cpu"))
    model.is_loaded_in_4bit = True
    return model.requires_grad_(False)


def losses_of(model, plan, examples=None, objective=summed_loss):
    optimizer = make_optimizer(model, "adamw", plan.lr, 0.0)
    with packed_attention(model) if plan.pack else nullcontext():
        training = begin_training(model, optimizer, plan)
        steps = train_steps(model, training, examples or ragged_examples(), objective, "cpu")
        return [result.loss for result in steps]


def no_scaler():
    return torch.amp.GradScaler("cpu", enabled=False)


# ---------------------------------------------------------------- one step
def one_step(rows_at_once):
    """(passes, loss, gradient norm, gradients) of a global batch: descent with rate 1 moves a weight by its gradient."""
    model = build_model("llama", torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = make_optimizer(model, "sgd", 1.0, 0.0)
    batches = micro_batches(ragged_examples(8), rows_at_once)
    loss, norm = train_step(model, optimizer, batches, summed_loss, no_scaler(), max_norm=1e9)
    return len(batches), loss, norm, [old - p.detach() for old, p in zip(before, model.parameters(), strict=True)]


@pytest.mark.parametrize(("rows_at_once", "passes"), [(1, 8), (2, 4), (4, 2), (3, 3)])
def test_accumulating_small_batches_equals_one_large_batch(rows_at_once, passes):
    once, loss, norm, gradients = one_step(8)
    count, loss_of_many, norm_of_many, gradients_of_many = one_step(rows_at_once)
    assert (once, count) == (1, passes)
    assert loss_of_many == pytest.approx(loss, rel=1e-6) and norm_of_many == pytest.approx(norm, rel=1e-5)
    for a, b in zip(gradients, gradients_of_many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_long_row_weighs_as_many_tokens_as_it_has():
    """The loss is the mean over tokens, not the mean of the rows' means."""
    model, examples = build_model("llama"), ragged_examples(8)
    with torch.no_grad():
        sums = [float(summed_loss(model, micro_batches([example], 1)[0])) for example in examples]
    counts = [sum(example.counted) for example in examples]
    _, loss, _, _ = one_step(2)
    assert loss == pytest.approx(sum(sums) / sum(counts), rel=1e-6)
    assert abs(loss - sum(s / c for s, c in zip(sums, counts, strict=True)) / 8) > 1e-3


def test_gradients_are_clipped_to_the_norm_and_the_true_norm_is_reported():
    model = build_model("llama")
    before = [p.detach().clone() for p in model.parameters()]
    _, _, norm, _ = one_step(8)
    _, reported = train_step(
        model,
        make_optimizer(model, "sgd", 1.0, 0.0),
        micro_batches(ragged_examples(8), 8),
        summed_loss,
        no_scaler(),
        norm / 10,
    )
    moved = math.sqrt(
        sum(float((old - p.detach()).pow(2).sum()) for old, p in zip(before, model.parameters(), strict=True))
    )
    assert reported == pytest.approx(norm, rel=1e-6) and moved == pytest.approx(norm / 10, rel=1e-4)


def test_the_frozen_base_does_not_move_and_gradients_are_cleared():
    model = lora()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    learned = [p.detach().clone() for p in trainable_parameters(model)]
    losses_of(model, PLAN)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if not p.requires_grad)
    assert any(not torch.equal(old, p) for old, p in zip(learned, trainable_parameters(model), strict=True))
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------- the loop
def test_the_loop_tells_each_step():
    model = lora()
    training = begin_training(model, make_optimizer(model, "adamw", 1.0, 0.0), PLAN)
    results = list(train_steps(model, training, ragged_examples(20), summed_loss, "cpu"))
    assert [result.step for result in results] == [1, 2, 3, 4, 5]
    assert [result.epoch for result in results] == [0, 0, 0, 1, 1]  # 8 + 8 + 4 rows are an epoch
    assert [result.lr for result in results] == pytest.approx([0.01, 0.008, 0.006, 0.004, 0.002])
    examples = ragged_examples(20)
    assert sum(result.tokens for result in results[:3]) == sum(len(example.ids) for example in examples)
    assert sum(result.counted for result in results[:3]) == sum(sum(example.counted) for example in examples)
    assert all(result.seconds > 0 and result.grad_norm > 0 for result in results) and model.training


def test_the_rows_at_once_do_not_change_the_course():
    plans = [Plan(**{**vars(PLAN), "micro_batch": size}) for size in (1, 2, 8)]
    single, pairs, whole = (losses_of(lora(), plan) for plan in plans)
    assert single == pytest.approx(whole, rel=1e-5) and pairs == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("tokens", [1, 40, 64, 1000])
def test_packs_of_any_size_take_the_course_of_padded_rows(tokens, share):
    """Rows behind a start that they share, so that sharing has something to do; other rows in no step."""
    examples = [Example(START + e.ids, [False] * len(START) + e.counted) for e in ragged_examples()]
    padded = losses_of(lora(), PLAN, examples)
    assert losses_of(lora(), replace(PACKED, share_prefix=share, micro_tokens=tokens), examples) == pytest.approx(
        padded, rel=1e-5
    )


def test_a_packed_step_counts_tokens_and_rows_as_a_padded_one():
    told = []
    for plan in (PLAN, PACKED):
        model = lora()
        with packed_attention(model):
            optimizer = make_optimizer(model, "adamw", 0.01, 0.0)
            training = begin_training(model, optimizer, plan)
            steps = list(train_steps(model, training, ragged_examples(), summed_loss, "cpu"))
        told.append([(step.epoch, step.lr, step.tokens, step.counted) for step in steps])
    assert told[0] == told[1]


def test_packs_are_cut_to_their_budget():
    assert len(PACKED.cut(ragged_examples(8))) > 1
    assert all(batch.input_ids.shape[1] <= 64 for batch in PACKED.cut(ragged_examples(8)))
    assert [batch.layout for batch in PLAN.cut(ragged_examples(8))] == [None] * 4


def test_the_same_seed_gives_the_same_numbers_to_the_bit_with_dropout_too():
    first, second = (lora(dropout=0.3) for _ in range(2))
    torch.manual_seed(1)
    losses = losses_of(first, PLAN)
    torch.manual_seed(1)
    assert losses_of(second, PLAN) == losses
    for a, b in zip(trainable_parameters(first), trainable_parameters(second), strict=True):
        assert torch.equal(a, b)
    assert losses_of(lora(dropout=0.3), Plan(**{**vars(PLAN), "seed": 43})) != losses


def test_the_zero_adapter_has_the_loss_of_the_base_at_the_first_step():
    examples = ragged_examples(8)
    with torch.no_grad():
        base = float(summed_loss(build_model("llama"), micro_batches(examples, 8)[0])) / sum(
            sum(e.counted) for e in examples
        )
    assert losses_of(lora(), PLAN, examples)[0] == pytest.approx(base, rel=1e-6)


def reference_losses(examples, base=build_model):
    """PLAN by transformers' loss, PEFT's own idea of all-linear and torch's AdamW, in one padded pass a step."""
    torch.manual_seed(42)
    model = get_peft_model(
        base("llama"), LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    model.train()
    rows, losses = [], []
    for epoch in range(2):
        order = list(range(len(examples)))
        random.Random(f"42:{epoch}").shuffle(order)
        rows += [order[:8], order[8:16], order[16:]]
    for step, chosen in enumerate(rows[:5]):
        longest = max(len(examples[i].ids) for i in chosen)
        ids, mask, labels = (torch.full((len(chosen), longest), fill) for fill in (0, 0, -100))
        for at, i in enumerate(chosen):
            size = len(examples[i].ids)
            ids[at, :size], mask[at, :size] = torch.tensor(examples[i].ids), 1
            labels[at, 4:size] = ids[at, 4:size]
        for group in optimizer.param_groups:
            group["lr"] = [0.01, 0.008, 0.006, 0.004, 0.002][step]
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("base", [build_model, nf4_model], ids=["lora", "qlora"])
@pytest.mark.parametrize("plan", [PLAN, PACKED], ids=["padded", "packed"])
def test_five_steps_are_those_of_plain_transformers_and_peft(plan, base):
    losses = losses_of(lora(base=base), plan)
    assert losses == pytest.approx(reference_losses(ragged_examples(), base), rel=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("plan", [PLAN, PACKED], ids=["padded", "packed"])
def test_the_golden_run(plan):
    """Printed by the padded run on an AMD EPYC (AVX-512) with torch 2.13.0+cpu, transformers 5.23.0, peft 0.21.2.

    One and two threads agree to 1e-6. Packs and our LoRA forward came later and gave the same to all digits printed.
    """
    losses = losses_of(lora(), replace(plan, lr=0.002))
    assert losses == pytest.approx([4.989364, 4.740449, 4.852982, 4.343130, 4.687948], abs=1e-4)


def test_float16_bases_train_with_scaled_losses():
    exact, half = losses_of(lora(), PLAN), losses_of(lora(torch.float16), PLAN)
    assert half == pytest.approx(exact, abs=0.05) and half[-1] < half[0]


def test_bfloat16_bases_train():
    exact, narrow = losses_of(lora(), PLAN), losses_of(lora(torch.bfloat16), PLAN)
    assert narrow == pytest.approx(exact, abs=0.2) and narrow[-1] < narrow[0]


# ---------------------------------------------------------------- divergence
def test_a_loss_that_is_no_number_stops_with_its_step():
    def breaks_later(model, batch):
        seen.append(batch)
        return summed_loss(model, batch) * (math.nan if len(seen) > 2 * 4 else 1.0)  # two steps of four passes are well

    seen, done = [], []
    model = lora()
    with pytest.raises(UserError, match="step 3: the loss is nan") as caught:
        training = begin_training(model, make_optimizer(model, "adamw", 0.01, 0.0), PLAN)
        for result in train_steps(model, training, ragged_examples(8), breaks_later, "cpu"):
            done.append(result.step)
    assert done == [1, 2] and caught.value.exit_code == ExitCode.DIVERGED and "--lr" in caught.value.hint


def test_a_rate_beyond_all_measure_diverges():
    """No fault put in: weights of this size give logits that are no numbers."""
    model = make_trainable(build_model("llama"), TrainSettings(full=True))
    with pytest.raises(UserError, match="training diverged"):
        losses_of(model, Plan(**{**vars(PLAN), "lr": 1e30, "schedule": "constant"}))


def test_gradients_that_are_no_numbers_stop_though_the_loss_is_one():
    def breaks_gradients(model, batch):
        weight = trainable_parameters(model)[0]
        return summed_loss(model, batch) + torch.sqrt(weight.sum() * 0)  # sqrt(0): value 0, slope infinite

    with pytest.raises(UserError, match=r"step 1: the loss is [0-9.]+, the gradient norm nan"):
        losses_of(lora(), PLAN, objective=breaks_gradients)


def test_only_float16_may_skip_a_step_with_infinite_gradients():
    require_finite(1.0, math.inf, 1, half=True)
    with pytest.raises(UserError):
        require_finite(1.0, math.inf, 1, half=False)
    with pytest.raises(UserError):
        require_finite(math.inf, 1.0, 1, half=True)
