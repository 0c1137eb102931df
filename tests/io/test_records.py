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
        ({"text": "a", "weight": 0.25}, "text"),
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
        ({"text": "a", "label": None}, "'label' is null"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "rows of preference cannot be trained yet"),
        ({"prompt": "a", "completion": "b", "label": True}, "rows of preference cannot be trained yet"),
        (
            {"messages": [*turns("user"), {**turns("assistant")[0], "tool_calls": [1]}]},
            "turn 2 calls a tool without a name",
        ),
        ({"prompt": "a", "completion": "b", "weight": 0}, "'weight' is 0, should be a number above 0"),
        ({"prompt": "a", "completion": "b", "weight": -1.5}, "'weight' is -1.5"),
        ({"prompt": "a", "completion": "b", "weight": "2"}, "'weight' is text"),
        ({"text": "a", "weight": True}, "'weight' is true or false"),
        ({"messages": []}, "at least one turn"),
        ({"messages": "hello"}, "should be a list"),
        ({"messages": ["hello"]}, "turn 1 has no role"),
        ({"messages": turns("user", "robot")}, "turn 2 has the unknown role 'robot'"),
        ({"messages": [turns("user")[0], turns("assistant")[0] | {"weight": 0}]}, "turn 2: 'weight' of a single turn"),
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


PREPARED = ("preference", "classification")


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "a", "label": 3}, "classification"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"prompt": "a", "completion": "b", "label": False}, "preference"),
        (
            {
                "prompt": turns("user"),
                "chosen": turns("assistant"),
                "rejected": [{"role": "assistant", "content": "x"}],
            },
            "preference",
        ),
    ],
)
def test_rows_that_only_prep_takes_are_known_too(row, kind):
    assert check_row(row, "f:1", kinds=PREPARED) == kind


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a", "label": " "}, "'label' is empty"),
        ({"text": "a", "label": 0.5}, "'label' is a number, should be text or a whole number"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "'rejected' is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"prompt": "a", "chosen": turns("assistant"), "rejected": "b"}, "'chosen' is a list, should be text"),
        ({"prompt": [], "completion": turns("assistant"), "label": True}, "'prompt' has no turn"),
        ({"prompt": turns("user"), "completion": turns("user"), "label": True}, "two user turns in a row"),
    ],
)
def test_a_preference_or_label_that_teaches_nothing_is_named(row, words):
    with pytest.raises(UserError) as caught:
        check_row(row, "f:9", kinds=PREPARED)
    assert caught.value.message.startswith("f:9: ") and words in caught.value.message
