"""The defaults and ranges of every option."""

import math
from dataclasses import fields

import pytest

from ftkit.core.chat_settings import ChatSettings
from ftkit.core.eval_settings import EvalSettings
from ftkit.core.model_settings import METHOD_FLAGS
from ftkit.core.options import flag_of, require
from ftkit.core.train_settings import TrainSettings
from ftkit.errors import ExitCode, UserError

IN_RANGE = {
    "r": [1, 4096],
    "alpha": [0.5, 32.0],
    "dropout": [0.0, 0.999],
    "max_length": [2, 10**6],
    "batch": [1, 512],
    "virtual_tokens": [1, 100],
    "lora_plus": [None, 0.5, 16.0],
    "micro_batch": ["auto", "1", "64"],
    "micro_tokens": ["auto", "1", "4096"],
    "lr": [None, 1e-9, 1.0],
    "epochs": [0.01, 3.0],
    "steps": [None, 1],
    "warmup": [0.0, 0.99, 1, 100],
    "checkpoint_every": [1, 8],
    "weight_decay": [0.0, 0.1],
    "max_grad_norm": [1e-3, math.inf],
    "neftune": [0.0, 15.0],
    "label_smoothing": [0.0, 0.99],
    "seed": [0, 2**63 - 1],
    "keep": [1, 100],
    "early_stop": [None, 1],
    "save_every": ["auto", "1", "0.5%", "100%", "90s", "1h30m"],
    "time_limit": [None, "55m", "3600"],
}
OUT_OF_RANGE = {
    "r": [0, -8],
    "alpha": [0.0, -1.0, math.inf, math.nan],
    "dropout": [-0.1, 1.0, math.nan],
    "max_length": [1, 0],
    "batch": [0, -1],
    "virtual_tokens": [0, -1],
    "lora_plus": [0.0, -1.0, math.inf, math.nan],
    "micro_batch": ["0", "-1", "many", "1.5", "", "²"],
    "micro_tokens": ["0", "-1", "all", "1.5", "", "²"],
    "lr": [0.0, -1e-4, 2e4, math.nan, math.inf],
    "epochs": [0.0, -1.0, math.inf, math.nan],
    "steps": [0, -5],
    "warmup": [-0.1, 1.5, math.nan, math.inf],
    "checkpoint_every": [0, -1],
    "weight_decay": [-0.1, math.inf, math.nan],
    "max_grad_norm": [0.0, -1.0, math.nan],
    "neftune": [-1.0, math.inf, math.nan],
    "label_smoothing": [-0.1, 1.0, math.nan],
    "seed": [-1, 2**63],
    "keep": [0, -1],
    "early_stop": [0],
    "save_every": ["0", "-1", "often", "101%", "1.5", ""],
    "time_limit": ["0", "soon", "-5m", ""],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in IN_RANGE.items() for value in values])
def test_a_value_within_range_is_accepted(name, value):
    needed = {"checkpoint_every": {"gradient_checkpointing": "on"}, "virtual_tokens": {"method": "prompt"}}
    TrainSettings(**needed.get(name, {}), **{name: value}).check()


def test_options_about_recomputed_blocks_need_some():
    for options in ({"checkpoint_every": 2}, {"offload_activations": True}):
        with pytest.raises(UserError, match="none are recomputed") as refused:
            TrainSettings(**options).check()
        assert "--gradient-checkpointing on" in refused.value.hint


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
)
def test_a_value_out_of_range_is_refused_with_flag_value_and_range(name, value):
    with pytest.raises(UserError) as refused:
        TrainSettings(**{name: value}, **({"method": "prefix"} if name == "virtual_tokens" else {})).check()
    assert refused.value.exit_code == ExitCode.USAGE
    assert refused.value.message == f"{flag_of(name)} {value} is out of range"
    assert refused.value.hint.startswith(f"{flag_of(name)} takes ")


def test_every_number_of_train_has_its_range_tested():
    numbers = {f.name for f in fields(TrainSettings) if isinstance(f.default, (int, float)) and f.default is not True}
    flags = {f.name for f in fields(TrainSettings) if f.default is False}
    assert numbers - flags <= set(IN_RANGE) and set(IN_RANGE) == set(OUT_OF_RANGE)


def test_lora_is_the_method_where_none_is_named():
    assert TrainSettings().recipe == "lora"
    named = {TrainSettings(**{name: True}).recipe for name in METHOD_FLAGS}
    assert named == {"lora", "qlora", "int8", "full"}


@pytest.mark.parametrize("pair", [("lora", "qlora"), ("qlora", "load_in_8bit"), ("full", "lora")])
def test_two_methods_at_once_are_refused_by_their_flags(pair):
    with pytest.raises(UserError, match="contradict each other") as refused:
        TrainSettings(**dict.fromkeys(pair, True)).check()
    assert all(flag_of(name) in refused.value.message for name in pair)


@pytest.mark.parametrize("name", ["lora", "qlora", "load_in_8bit"])
def test_training_from_scratch_takes_no_adapter(name):
    with pytest.raises(UserError, match="--init trains every weight"):
        TrainSettings(init="folder", **{name: True}).check()
    TrainSettings(init="folder").check()
    TrainSettings(init="folder", full=True).check()


def test_eval_takes_a_run_or_a_model_and_compares_only_runs():
    EvalSettings(run="r", baseline=True).check()
    for options in ({"run": "r", "model": "m"}, {"model": "m", "baseline": True}, {"max_new": 0}, {"batch": 0}):
        with pytest.raises(UserError):
            EvalSettings(**options).check()


def test_chat_refuses_a_temperature_that_is_none():
    ChatSettings(temperature=0.0).check()
    for value in (-0.1, math.nan, math.inf):
        with pytest.raises(UserError, match="--temperature"):
            ChatSettings(temperature=value).check()


def test_a_range_error_says_what_to_type():
    with pytest.raises(UserError) as refused:
        require(False, "--r", 0, "1 or more")
    assert (refused.value.message, refused.value.hint) == ("--r 0 is out of range", "--r takes 1 or more")
