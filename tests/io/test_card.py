"""ftkit.json: what it holds comes back, and what is damaged is refused before anything relies on it."""

import json
from dataclasses import asdict, replace

import pytest

from ftkit.errors import ExitCode, UserError
from ftkit.io.card import FILE, Card, read_card, write_card
from ftkit.io.template_files import load_template

CARD = Card(
    base="builtin:tiny",
    base_location="/models/tiny",
    base_revision=None,
    base_config_sha256="0" * 64,
    method="qlora",
    objective="sft",
    dtype="bf16",
    max_length=512,
    pattern="Write {x} — ünïcode",
    stop_tokens=[0, 2],
    quantized_sha256={"q_proj": "1" * 64},
)


def with_template(card, name="alpaca"):
    template = load_template(name)
    return replace(card, template_text=template.text, template_fingerprint=template.fingerprint)


def refused(folder):
    with pytest.raises(UserError) as error:
        read_card(folder)
    assert error.value.exit_code == ExitCode.MODEL and error.value.hint
    return error.value.message


@pytest.mark.parametrize("card", [CARD, with_template(CARD), replace(CARD, base_weights_sha256="2" * 64)])
def test_a_card_reads_back_as_it_was_written(tmp_path, card):
    write_card(tmp_path, card)
    assert read_card(tmp_path) == card


def test_a_folder_of_another_tool_has_no_card(tmp_path):
    assert read_card(tmp_path) is None


def test_the_template_comes_back_from_its_text():
    template = with_template(CARD).template
    assert template.fingerprint == load_template("alpaca").fingerprint
    assert CARD.template is None


def test_a_template_that_is_not_the_recorded_one_is_refused():
    with pytest.raises(UserError, match="as recorded") as error:
        _ = replace(with_template(CARD), template_fingerprint="alpaca@000000000000").template
    assert error.value.exit_code == ExitCode.MODEL


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"\xff", b"[" * 100_000])
def test_a_card_that_is_no_json_object_is_damaged(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    assert "damaged" in refused(tmp_path)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"method": 5}, "method"),
        ({"max_length": "512"}, "max_length"),
        ({"max_length": True}, "max_length"),
        ({"stop_tokens": ["0"]}, "stop_tokens"),
        ({"stop_tokens": None}, "stop_tokens"),
        ({"quantized_sha256": {"q": 1}}, "quantized_sha256"),
        ({"base_revision": 1}, "base_revision"),
        ({"evil": 1}, "evil"),
    ],
)
def test_a_field_that_is_unknown_or_of_a_wrong_type_is_named(tmp_path, change, key):
    (tmp_path / FILE).write_text(json.dumps({"schema": "ftkit.card/1", **asdict(CARD), **change}))
    assert f"'{key}'" in refused(tmp_path)


def test_a_field_that_is_missing_is_named(tmp_path):
    values = {"schema": "ftkit.card/1", **asdict(CARD)}
    del values["dtype"]
    (tmp_path / FILE).write_text(json.dumps(values))
    assert "'dtype'" in refused(tmp_path)


@pytest.mark.parametrize("schema", [None, "ftkit.card/2"])
def test_a_card_of_another_version_is_refused(tmp_path, schema):
    (tmp_path / FILE).write_text(json.dumps({"schema": schema, **asdict(CARD)}))
    assert "not of this version" in refused(tmp_path)
