"""Predicting a run whose rows are known: the heaviest batch, and the entry that train calls."""

import pytest
import torch
from transformers import LlamaConfig

from ftkit.core import tree_attention, varlen_attention
from ftkit.core.cuda_operators import CPU, CudaKernels
from ftkit.core.encoding import Example
from ftkit.core.memory_simulation import SimulatedDevice
from ftkit.core.plan import Plan
from ftkit.core.planned_run import plan_run
from ftkit.core.train_settings import TrainSettings
from ftkit.core.training_memory import heaviest_batch, predict_training, steps_are_cut, training_memory

CONFIG = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256)


def row(length, first=7):
    return Example([first, *range(1, length)], [False] * (length // 2) + [True] * (length - length // 2))


def plan(**changes):
    settled = {"batch": 4, "micro_batch": 2, "steps": 3, "lr": 0, "schedule": "constant", "warmup": 0, "max_grad_norm": 1,
               "seed": 42, "pack": True, "micro_tokens": 100}  # fmt: skip
    return Plan(**(settled | changes))


def test_the_heaviest_batch_is_that_of_the_longest_rows():
    rows = [row(10, number) for number in range(10)] + [row(90)]
    assert heaviest_batch(plan(), rows).input_ids.shape[1] >= 89
    padded = heaviest_batch(plan(pack=False), rows)
    assert tuple(padded.input_ids.shape) == (2, 89)


def test_steps_are_cut_where_their_rows_do_not_fit_one_pass():
    rows = [row(40, number) for number in range(8)]
    assert steps_are_cut(plan(), rows) and not steps_are_cut(plan(micro_tokens=1000, share_prefix=True), rows)


def test_shared_starts_make_a_batch_lighter():
    rows = [row(60) for _ in range(4)]
    alone, shared = (heaviest_batch(plan(micro_tokens=1000, share_prefix=way), rows) for way in (False, True))
    assert shared.input_ids.numel() < alone.input_ids.numel() == 4 * 59


@pytest.mark.parametrize("pack", [True, False])
def test_rows_as_long_as_allowed_are_predicted_as_without_rows(pack):
    """The entry of train and the command's assumption meet where the rows are what is assumed."""
    settings = TrainSettings(batch=4, micro_batch="2", max_length=40, pack="on" if pack else "off", share_prefix="off")
    rows = [Example([number, *range(1, 40)], [True] * 40) for number in range(8)]
    known = predict_training(
        settings, CONFIG, torch.bfloat16, plan(pack=pack, micro_tokens=80), rows, None, SimulatedDevice(CPU)
    )
    assumed = training_memory(
        settings, plan_run(settings, None, None, 2**17), CONFIG, None, device=SimulatedDevice(CPU)
    )
    assert known.allocated_bytes == assumed.allocated_bytes
    assert known.trained_parameters == assumed.trained_parameters


@pytest.mark.parametrize(
    ("kernels", "in_one"), [(CudaKernels(), True), (CudaKernels(has_flash=False), False), (CPU, False)]
)
def test_a_pack_is_attended_to_as_train_will_on_the_card(kernels, in_one, monkeypatch):
    calls = []
    attention = tree_attention.varlen_attention
    monkeypatch.setattr(tree_attention, "varlen_attention", lambda *i, **o: calls.append(i[3]) or attention(*i, **o))
    settings = TrainSettings(batch=4, max_length=60, gradient_checkpointing="off")
    rows = [Example([*range(30), number, *range(30, 50)], [True] * 51) for number in range(60, 64)]
    predict_training(
        settings,
        CONFIG,
        torch.bfloat16,
        plan(micro_tokens=1000, share_prefix=True),
        rows,
        None,
        SimulatedDevice(kernels),
    )
    assert len(calls) == (6 if in_one else 0)  # two layers, in two steps and an evaluation
    assert all(spans.places.numel() == 30 + 4 * 50 and spans.places.is_meta for spans in calls)


def test_one_call_needs_less_memory_than_a_loop_that_joins_its_pieces(monkeypatch):
    settings = TrainSettings(batch=4, max_length=60, gradient_checkpointing="off")
    rows = [Example([*range(30), number, *range(30, 50)], [True] * 51) for number in range(60, 64)]
    peaks = []
    for width in (varlen_attention.WIDEST_HEAD, 0):
        monkeypatch.setattr(varlen_attention, "WIDEST_HEAD", width)
        found = predict_training(
            settings, CONFIG, torch.bfloat16, plan(micro_tokens=1000, share_prefix=True), rows, None
        )
        peaks.append(found.allocated_bytes)
    assert peaks[0] < peaks[1]


def test_the_prediction_asks_nothing_of_the_rows_but_their_lengths():
    settings = TrainSettings(batch=4, micro_batch="2", max_length=40)
    sizes = []
    for rows in ([row(40, number) for number in range(8)], [row(20, number) for number in range(8)]):
        sizes.append(predict_training(settings, CONFIG, torch.float32, plan(), rows, None).allocated_bytes)
    assert sizes[0] > sizes[1]
