"""Where a setting's value comes from, and what is refused on the way."""

import tomllib
from dataclasses import asdict, fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftkit.core.chat_settings import ChatSettings
from ftkit.core.configuration import (
    Layer,
    coerce,
    describe,
    environment_layer,
    resolve,
    settle_unused,
    toml_value,
)
from ftkit.core.estimate_settings import EstimateSettings
from ftkit.core.eval_settings import EvalSettings
from ftkit.core.merge_settings import MergeSettings
from ftkit.core.methods import METHODS, OPTIONS_OF
from ftkit.core.options import flag_of
from ftkit.core.prep_settings import PrepSettings
from ftkit.core.train_settings import TrainSettings
from ftkit.errors import ExitCode, UserError

KINDS = [PrepSettings, EstimateSettings, TrainSettings, EvalSettings, MergeSettings, ChatSettings]


def refusal(*arguments):
    """The usage error of `coerce`."""
    with pytest.raises(UserError) as refused:
        coerce(*arguments)
    assert refused.value.exit_code == ExitCode.USAGE
    return refused.value


def test_the_strongest_layer_that_names_a_setting_decides():
    layers = [Layer("flags", {"r": 1}), Layer("environment", {"r": 2, "seed": 3}), Layer("file", {"r": 4, "batch": 5})]
    resolved, sources = resolve(TrainSettings, layers)
    assert (resolved.r, resolved.seed, resolved.batch, resolved.alpha) == (1, 3, 5, TrainSettings.alpha)
    assert [sources[name] for name in ("r", "seed", "batch", "alpha")] == ["flags", "environment", "file", "default"]
    assert set(sources) == {field.name for field in fields(TrainSettings)}


def test_a_method_on_the_command_line_beats_another_one_in_a_file():
    resolved, sources = resolve(TrainSettings, [Layer("flags", {"full": True}), Layer("file", {"qlora": True})])
    assert resolved.recipe == "full"
    assert (sources["full"], sources["qlora"]) == ("flags", "default")


def test_a_method_that_is_only_switched_off_leaves_the_choice_to_the_next_layer():
    resolved, _ = resolve(TrainSettings, [Layer("environment", {"qlora": "0"}), Layer("file", {"full": True})])
    assert resolved.recipe == "full"
    resolved, _ = resolve(TrainSettings, [Layer("environment", {"qlora": "0"}), Layer("file", {"qlora": True})])
    assert resolved.recipe == "lora"


def test_two_methods_in_one_layer_still_contradict_each_other():
    resolved, _ = resolve(TrainSettings, [Layer("file", {"full": True, "qlora": True})])
    with pytest.raises(UserError, match="contradict"):
        resolved.check()


def test_an_unknown_key_names_its_place_and_the_nearest_one():
    layer = Layer("x.toml", {"max_lenght": 5}, {"max_lenght": "x.toml:3"})
    with pytest.raises(UserError) as refused:
        resolve(TrainSettings, [layer])
    assert refused.value.exit_code == ExitCode.USAGE
    assert refused.value.message == "x.toml:3: unknown setting 'max_lenght'"
    assert "did you mean 'max_length'?" in refused.value.hint


def test_a_wrong_value_in_a_weaker_layer_is_an_error_even_if_a_stronger_one_decides():
    with pytest.raises(UserError, match="file: r = 'x' should be a whole number"):
        resolve(TrainSettings, [Layer("flags", {"r": 4}), Layer("file", {"r": "x"})])


@pytest.mark.parametrize(
    ("value", "wanted", "expected"),
    [
        ("2e-4", float, 2e-4),
        ("2e-4", float | None, 2e-4),
        (3, float, 3.0),
        (8.0, int, 8),
        ("8", int, 8),
        (0.1, str, "0.1"),
        (None, str | None, None),
        ("true", bool, True),
        ("OFF", bool, False),
        (False, bool, False),
        ("a=b", list[str], ["a=b"]),
        (["a", 1], list[str], ["a", "1"]),
    ],
)
def test_a_value_that_means_its_type_becomes_it(value, wanted, expected):
    coerced = coerce(value, wanted, "x")
    assert coerced == expected and type(coerced) is type(expected)


@pytest.mark.parametrize(
    ("value", "wanted", "should_be"),
    [
        ("fast", float, "a number"),
        (8.5, int, "a whole number"),
        ("8.5", int, "a whole number"),
        (float("inf"), int, "a whole number"),
        (True, int, "a whole number"),
        (True, float, "a number"),
        (False, str, "text"),
        (["a"], str, "text"),
        ({"a": 1}, str, "text"),
        ("maybe", bool, "true or false"),
        (2, bool, "true or false"),
        ({"output": "description"}, list[str], "text"),
        ([True], list[str], "text"),
    ],
)
def test_a_value_of_another_type_is_refused_and_never_bent(value, wanted, should_be):
    error = refusal(value, wanted, "x.toml:2: name")
    assert error.message.startswith("x.toml:2: name = ") and error.message.endswith(f"should be {should_be}")


def test_a_value_outside_of_a_choice_names_the_choices_and_the_nearest():
    _, sources = resolve(TrainSettings, [Layer("f", {"schedule": "cosine"})])
    assert sources["schedule"] == "f"
    with pytest.raises(UserError) as refused:
        resolve(TrainSettings, [Layer("f", {"schedule": "linaer"})])
    assert "'linaer' is not one of linear, cosine, constant" in refused.value.message
    assert "did you mean 'linear'?" in refused.value.hint


# ---------------------------------------------------------------- options that a method does not have
ASKED = {
    "lora": {},
    "layers": {"train_layers": "last:1"},
    "full": {"full": True},
    **{name: {"method": name} for name in ("ia3", "prompt", "prefix", "ln", "bitfit")},
}
GIVEN = {
    "r": 16, "alpha": 32.0, "dropout": 0.0, "dora": True, "rslora": True, "lora_init": "zero", "rank_pattern": "q=2",
    "lora_plus": 2.0, "targets": "auto", "virtual_tokens": 20, "add_tokens": "t.txt", "freeze": "mlp", "save": "auto",
}  # fmt: skip
"""Of each option that only some methods have a value, its default where that asks for something."""


def settled(*layers, kind=TrainSettings):
    return settle_unused(*resolve(kind, list(layers)), list(layers))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OPTIONS_OF)
def test_an_option_is_refused_beside_a_method_that_does_not_have_it_though_it_has_its_default(name, method):
    layer = Layer("command line", {**ASKED[method], name: GIVEN[name]})
    if method in OPTIONS_OF[name] or (name == "freeze" and method in ("lora", "full")):  # alone it is a method
        settled(layer)
        return
    with pytest.raises(UserError, match=f"^{flag_of(name)} is an option of .*, the method is ") as refused:
        settled(layer)
    assert refused.value.exit_code == ExitCode.USAGE and refused.value.hint.startswith("leave it out, or ")
    settled(Layer("command line", ASKED[method]))  # defaults are nobody's wish


@pytest.mark.parametrize(
    ("options", "words", "hint"),
    [
        ({"double_quant": "on"}, "--double-quant is about 4-bit bases", "--qlora --double-quant off"),
        ({"double_quant": "on", "quantize": "int8"}, "--double-quant is about 4-bit bases", "--qlora"),
        ({"keep_16bit": "q_proj"}, "--keep-16bit leaves layers out of a quantisation", "--qlora --keep-16bit NAME"),
        ({"init": "x", "r": 16}, "--r is an option of LoRA, --init trains every weight", "leave it out"),
    ],
)
def test_options_about_what_is_not_there_are_refused(options, words, hint):
    with pytest.raises(UserError) as refused:
        settled(Layer("command line", options))
    assert refused.value.message.startswith(words) and hint in refused.value.hint


def test_the_refusal_names_the_file_or_the_variable():
    typed = Layer("command line", {"method": "ia3"})
    for layer, words in (
        (Layer("x.toml", {"r": 8}, {"r": "x.toml:4"}), "x.toml:4: r is an option of LoRA, the method is ia3"),
        (environment_layer(TrainSettings, {"FTKIT_R": "8"}), "FTKIT_R: r is an option of LoRA, the method is ia3"),
    ):
        with pytest.raises(UserError) as refused:
            settled(typed, layer)
        assert refused.value.message == words
    settled(typed, Layer("x.toml", {"dora": False}))  # a switch that is off asks for nothing


def test_what_a_run_wrote_down_gives_way_to_another_method():
    record = Layer("config.toml", {"r": 8, "dora": True, "targets": "mlp", "seed": 7}, is_record=True)
    tuned, sources = settled(Layer("command line", {"full": True}), record)
    assert (tuned.r, tuned.dora, tuned.targets, tuned.seed) == (16, False, "auto", 7)
    assert [sources[name] for name in ("r", "dora", "targets", "seed")] == [*["default"] * 3, "config.toml"]
    tuned.check()
    assert settled(record)[0].r == 8


def test_what_was_settled_for_one_method_is_not_taken_over_by_another():
    record = Layer("c", {"method": "ln", "lr": 1e-3, "targets": "norm", "dtype": "fp32", "batch": 4}, is_record=True)
    assert (settled(record)[0].lr, settled(record)[0].targets) == (1e-3, "norm")
    for typed in ({"method": "ia3"}, {"qlora": True}):
        tuned, sources = settled(Layer("command line", typed), record)
        assert (tuned.lr, tuned.targets, tuned.dtype, tuned.batch) == (None, "auto", "auto", 4)
        assert (sources["lr"], sources["batch"]) == ("default", "c")
    tuned, _ = settled(Layer("command line", {"method": "ia3", "lr": 0.1}), record)
    assert tuned.lr == 0.1
    asked = Layer("x.toml", record.values)
    assert settled(Layer("command line", {"method": "ia3"}), asked)[0].lr == 1e-3


def test_a_method_that_was_typed_replaces_the_layers_of_a_file():
    for asked in ({"lora": True}, {"method": "bitfit"}, {"full": True}):
        tuned, _ = settled(Layer("command line", asked), Layer("x.toml", {"train_layers": "last:2"}))
        assert tuned.train_layers is None and tuned.technique in ("lora", "bitfit", "full")


@pytest.mark.parametrize("method", METHODS)
def test_settings_that_are_shown_can_be_given_whatever_the_method(method):
    resolved, sources = settled(Layer("command line", ASKED[method]))
    table = tomllib.loads("\n".join(describe(resolved, sources)))
    again, _ = settled(Layer("file", table, dict.fromkeys(table, "file:1")))
    assert again == resolved


def test_environment_variables_name_the_fields_and_empty_ones_are_not_set():
    environment = {"FTKIT_MODEL": "m", "FTKIT_LOAD_IN_8BIT": "1", "FTKIT_R": "", "FTKIT_UNHEARD": "x", "HOME": "/"}
    layer = environment_layer(TrainSettings, environment)
    assert layer.values == {"model": "m", "load_in_8bit": "1"}
    assert layer.place("model") == "FTKIT_MODEL"


def test_the_base_in_the_environment_never_replaces_the_run_that_eval_scores():
    assert environment_layer(EvalSettings, {"FTKIT_MODEL": "m", "FTKIT_RUN": "r"}).values == {"run": "r"}
    assert environment_layer(TrainSettings, {"FTKIT_MODEL": "m"}).values == {"model": "m"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_shown_of_the_settings_reads_back_as_the_same_settings(kind):
    resolved, sources = resolve(kind, [])
    table = tomllib.loads("\n".join(describe(resolved, sources)))
    again, _ = resolve(kind, [Layer("file", table)])
    as_lists = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(resolved).items()}
    assert asdict(again) == as_lists


def test_what_is_shown_says_where_each_value_comes_from():
    resolved, sources = resolve(TrainSettings, [Layer("command line", {"r": 8}), Layer("x.toml", {"batch": 2})])
    lines = describe(resolved, sources)
    assert "r = 8  # command line" in lines and "batch = 2  # x.toml" in lines and "alpha = 32.0  # default" in lines
    assert "# steps is not set" in lines


texts = st.text(st.characters(exclude_categories=["Cs"]))


@settings(max_examples=200, deadline=None)
@given(st.one_of(texts, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.lists(texts)))
def test_any_value_survives_being_written_as_toml(value):
    assert tomllib.loads(f"a = {toml_value(value)}") == {"a": value}
