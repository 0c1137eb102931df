"""How an artefact wants its answers made, in our words and in transformers'."""

import pytest
from transformers import GenerationConfig

from ftkit.core.answer_settings import as_theirs, in_words, is_in_range, left_out_of, settings_of

QWEN = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, eos_token_id=[1, 2])


def test_a_generation_config_says_how_tokens_are_drawn_only_where_it_draws_them():
    assert settings_of(QWEN) == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert settings_of(GenerationConfig(max_new_tokens=64)) == {"max_new": 64}
    assert settings_of(GenerationConfig(do_sample=True, top_p=0.9)) == {"temperature": 1.0, "top_p": 0.9}
    assert settings_of(GenerationConfig()) == settings_of(None) == {}


def test_what_would_change_answers_and_is_not_done_is_named():
    assert left_out_of(QWEN) == left_out_of(None) == []
    assert left_out_of(GenerationConfig(repetition_penalty=1.05, num_beams=1)) == ["repetition_penalty"]


@pytest.mark.parametrize(
    "recorded",
    [{}, {"max_new": 32}, {"temperature": 0.8, "top_p": 0.9, "top_k": 5, "max_new": 32}, {"temperature": 1e-3}],
)
def test_what_was_recorded_comes_back_from_their_names(recorded):
    assert settings_of(GenerationConfig(**as_theirs(recorded))) == recorded


def test_the_likeliest_token_is_do_sample_false_which_transformers_can_save(tmp_path):
    assert as_theirs({"temperature": 0, "top_p": 0.9}) == {"do_sample": False}
    GenerationConfig(**as_theirs({"temperature": 0, "top_p": 0.9})).save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "is_taken"),
    [
        ("max_new", 1, True), ("max_new", 0, False), ("max_new", 1.5, False), ("temperature", 0, True),
        ("temperature", -1, False), ("temperature", float("nan"), False), ("temperature", float("inf"), False),
        ("temperature", "0.5", False), ("top_p", 1, True), ("top_p", 0.0, False), ("top_k", 0, True), ("top_k", True, False),
        ("seed", 2**63 - 1, True), ("seed", 2**63, False),
    ],
)  # fmt: skip
def test_a_number_is_taken_or_not(name, value, is_taken):
    assert is_in_range(name, value) is is_taken


def test_settings_are_called_as_people_type_them():
    assert in_words({"max_new": 64, "temperature": 0.25}) == "max-new 64, temperature 0.25"
