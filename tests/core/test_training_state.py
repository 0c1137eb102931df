"""The state of a run goes through a file and comes back to the bit."""

import json
import random

import numpy as np
import pytest
import torch
from architectures import build_model
from safetensors.torch import load_file, save_file
from test_training import PLAN, ragged_examples

from ftkit.core.adapters import make_trainable, trainable_parameters
from ftkit.core.loss import summed_loss
from ftkit.core.optimizers import make_optimizer
from ftkit.core.random_state import random_state, restore_random
from ftkit.core.train_settings import TrainSettings
from ftkit.core.training import begin_training, train_steps
from ftkit.core.training_state import collect_state, restore_state


def begin(optimizer, dtype=torch.float32, **options):
    torch.manual_seed(42)
    model = make_trainable(build_model("llama", dtype), TrainSettings(r=16, dropout=0.2, **options))
    made = make_optimizer(model, optimizer, PLAN.lr, 0.01)
    if optimizer == "adamw-8bit":
        made.args.min_8bit_size = 16  # these tensors are small: 8 bits for them too
    return model, begin_training(model, made, PLAN)


def steps(model, training, count):
    results = train_steps(model, training, ragged_examples(), summed_loss, "cpu")
    return [next(results).loss for _ in range(count)]


def through_files(state, folder):
    tensors, values = state
    save_file(tensors, folder / "state.safetensors")
    return load_file(folder / "state.safetensors"), json.loads(json.dumps(values))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16 with a scaler"])
def test_the_steps_after_it_are_the_same_to_the_bit(optimizer, dtype, tmp_path):
    whole, training = begin(optimizer, dtype)
    expected = steps(whole, training, 5)
    model, training = begin(optimizer, dtype)
    steps(model, training, 2)
    tensors, values = through_files(collect_state(training), tmp_path)
    assert any(value.dtype == torch.uint8 for key, value in tensors.items() if "state1" in key) == ("8bit" in optimizer)
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    again, training = begin(optimizer, dtype)
    for name, parameter in again.named_parameters():
        if name in weights:
            parameter.data.copy_(weights[name])
    torch.manual_seed(1)  # somebody draws in between
    random.random()
    restore_state(training, tensors, values)
    training.step = 2
    assert steps(again, training, 3) == expected[2:]
    for ours, theirs in zip(trainable_parameters(again), trainable_parameters(whole), strict=True):
        assert torch.equal(ours, theirs)


def test_every_generator_goes_on_where_it_was(tmp_path):
    def draw():
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()

    torch.manual_seed(3)
    draw()
    tensors, values = through_files(random_state(), tmp_path)
    expected = draw()
    assert draw() != expected
    restore_random(tensors, values)
    assert draw() == expected


def test_a_state_of_other_parameters_is_refused(tmp_path):
    model, training = begin("adamw")
    steps(model, training, 1)
    tensors, values = collect_state(training)
    _, fewer = begin("adamw", targets="q_proj")
    with pytest.raises(ValueError, match="does not train"):
        restore_state(fewer, tensors, values)


def test_a_state_of_another_optimizer_is_refused():
    model, training = begin("adamw-8bit")
    steps(model, training, 1)
    tensors, values = collect_state(training)
    wrong = {key: value[:1] if value.dtype == torch.uint8 else value for key, value in tensors.items()}
    _, again = begin("adamw-8bit")
    with pytest.raises((ValueError, RuntimeError)):
        restore_state(again, wrong, values)
