"""What a training row must hold."""

import pytest

from ftkit.errors import ExitCode, UserError
from ftkit.io.records import check_row, kind_of


def turns(*roles):
    return [{"role": role, "content": f"{role} speaks"} for role in roles]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "", "completion": "b"}, "prompt_completion"),
        ({"messages": turns("system", "user", "assistant", "user", "assistant")}, "messages"),
        ({"messages": turns("user", "assistant", "tool", "assistant")}, "messages"),
        ({"text": "a", "template": "text@0"}, "text"),
    ],
)
def test_good_rows_are_known_by_their_keys(row, kind):
    assert kind_of(row) == kind == check_row(row, "f:1")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"a": 1}, "not a training row (it has a)"),
        ({}, "no keys"),
        ({"prompt": 1, "completion": "b"}, "'prompt' is a number"),
        ({"prompt": "a", "completion": None}, "'completion' is null"),
        ({"prompt": "a", "completion": " "}, "no answer, nothing to learn"),
        ({"text": ""}, "nothing to learn"),
        ({"messages": []}, "at least one turn"),
        ({"messages": "hello"}, "should be a list"),
        ({"messages": ["hello"]}, "turn 1 has no role"),
        ({"messages": turns("user", "robot")}, "turn 2 has the unknown role 'robot'"),
        ({"messages": turns("user", "user", "assistant")}, "turn 2: two user turns in a row"),
        ({"messages": turns("user", "assistant", "system")}, "turn 3: the system message comes first"),
        ({"messages": turns("user", "assistant", "user")}, "ends with a user turn"),
        ({"messages": turns("system", "user")}, "no assistant turn"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "text only"),
        ({"messages": [{"role": "user", "content": 5}]}, "turn 1: content is a number"),
    ],
)
def test_a_row_that_teaches_nothing_is_named_with_its_reason(row, words):
    with pytest.raises(UserError) as caught:
        check_row(row, "f:9")
    assert caught.value.message.startswith("f:9: ") and words in caught.value.message
    assert caught.value.exit_code == ExitCode.DATA
