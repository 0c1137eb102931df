"""ShareGPT turns under the names of chat templates."""

import pytest

from ftkit.core.sharegpt import common_turns, parse_tools, to_messages
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
        ([{"from": "function_call", "value": "{}"}], "turn 1: the function call names no function"),
        ([{"from": "function_call", "value": "call it"}], "turn 1: the function call is not JSON"),
    ],
)
def test_what_is_no_turn_is_named(turns, words):
    with pytest.raises(UserError) as caught:
        to_messages(turns, None, "f:1")
    assert words in caught.value.message


def test_a_function_call_becomes_an_assistant_turn_with_tool_calls():
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
    (message,) = to_messages([call], None, "f:1")
    assert message["role"] == "assistant" and message["content"] == ""
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]


def test_openais_calls_get_arguments_as_an_object_and_keep_their_ids():
    given = {"name": "f", "arguments": '{"x": 1}'}
    turn = {"role": "assistant", "content": None, "tool_calls": [{"id": "a1", "type": "function", "function": given}]}
    (message,) = to_messages([turn], None, "f:1")
    function = {"name": "f", "arguments": {"x": 1}}
    assert message == {**turn, "content": "", "tool_calls": [{"id": "a1", "type": "function", "function": function}]}


def test_tools_become_openai_functions_whether_bare_wrapped_or_text():
    function = {"name": "f", "parameters": {}}
    wrapped = [{"type": "function", "function": function}]
    for given in ([function], wrapped, '[{"name": "f", "parameters": {}}]'):
        assert parse_tools(given, "f:1") == wrapped
    assert parse_tools("[]", "f:1") == parse_tools(None, "f:1") == []
    with pytest.raises(UserError, match="'tools' should be a list"):
        parse_tools("{}", "f:1")


def test_turns_in_common_are_counted_from_the_beginning():
    assert common_turns([1, 2, 3], [1, 2, 4]) == 2 and common_turns([], [1]) == 0
