"""ShareGPT turns under the names of chat templates."""

import pytest

from ftkit.core.conversations import to_messages
from ftkit.errors import UserError


def test_speakers_become_roles_and_texts_stay():
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"role": "user", "content": "c"}]
    assert to_messages(turns, " Be kind. ", "f:1") == [
        {"role": "system", "content": " Be kind. "},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ("hello", "'conversations' is text, should be a list"),
        (["hello"], "f:1: turn 1 is text, should be an object"),
        ([{"from": "human", "value": "a"}, {"from": "alien", "value": "b"}], "turn 2 has the unknown speaker 'alien'"),
        ([{"from": ["x"]}], "turn 1 has the unknown speaker"),
        ([{"from": "human", "value": "a"}, {"from": "function_call", "value": "{}"}], "turn 2 calls a tool"),
    ],
)
def test_what_is_no_turn_is_named(turns, words):
    with pytest.raises(UserError) as caught:
        to_messages(turns, None, "f:1")
    assert words in caught.value.message
