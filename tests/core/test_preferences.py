"""Preference data in the shapes that are around, and dialogues written as one text."""

import pytest

from ftkit.core.columns import NoAnswer
from ftkit.core.preferences import holds_preferences, preference_row, to_dialogue
from ftkit.core.transcripts import HASH_MARKS, HUMAN_ASSISTANT, find_marks, parse_marks, split_turns
from ftkit.errors import UserError


def turn(role, content):
    return {"role": role, "content": content}


Q, GOOD, BAD = turn("user", "q"), turn("assistant", "good"), turn("assistant", "bad")
PAIR = {"prompt": [Q], "chosen": [GOOD], "rejected": [BAD]}


@pytest.mark.parametrize(
    "record",
    [
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"messages": [Q], "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": [Q, GOOD], "rejected": [Q, BAD]},
        {"prompt": [Q], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "q", "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [Q, GOOD], "rejected": [Q, BAD]},
        {"system": "", "question": "q", "chosen": "good", "rejected": "bad"},
    ],
)
def test_pairs_in_turns_of_every_shape_give_the_same_row(record):
    assert preference_row(record, None, "f:1") == PAIR


def test_pairs_of_texts_stay_texts_and_alpacas_input_goes_below_the_prompt():
    pair = {"chosen": "good", "rejected": "bad"}
    assert preference_row({"prompt": "q", **pair}, None, "f:1") == {"prompt": "q", **pair}
    assert preference_row({"instruction": "q", "input": "x", **pair}, None, "f:1")["prompt"] == "q\n\nx"
    assert to_dialogue({"prompt": "q", **pair, "template": "t"}) == {**PAIR, "template": "t"}


def test_whole_dialogues_are_cut_where_they_part():
    chosen = "\n\nHuman: q\n\nAssistant: a\n\nHuman: more\n\nAssistant: good"
    rejected = chosen.removesuffix("good") + "bad\n\nHuman: no\n\nAssistant: sorry"
    row = preference_row({"chosen": chosen, "rejected": rejected}, HUMAN_ASSISTANT, "f:1")
    assert row["prompt"] == [Q, turn("assistant", "a"), turn("user", "more")]
    assert row["chosen"] == [GOOD] and [t["content"] for t in row["rejected"]] == ["bad", "no", "sorry"]


def test_one_answer_with_a_label_keeps_its_label():
    assert preference_row({"messages": [Q, BAD], "label": False}, None, "f:1") == {
        "prompt": [Q],
        "completion": [BAD],
        "label": False,
    }
    row = {"prompt": "q", "completion": "good", "label": True}
    assert preference_row({**row, "id": 3}, None, "f:1") == row


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same"),
        ({"prompt": "q", "chosen": " ", "rejected": "a"}, "'chosen' is empty"),
        ({"messages": [Q], "chosen": "a", "rejected": ""}, "'rejected' is empty"),
    ],
)
def test_a_pair_that_teaches_nothing_is_left_out(record, words):
    with pytest.raises(NoAnswer, match=words):
        preference_row(record, None, "f:1")


def test_a_pair_without_a_prompt_and_a_label_of_another_kind_are_errors():
    with pytest.raises(UserError, match="have no prompt"):
        preference_row({"chosen": "a", "rejected": "b"}, None, "f:1")
    with pytest.raises(UserError, match="should be true or false"):
        preference_row({"messages": [Q, GOOD], "label": "yes"}, None, "f:1")


def test_preferences_are_known_by_their_columns():
    assert holds_preferences(["chosen", "rejected"], [])
    assert holds_preferences(["messages", "label"], [{"label": True}])
    assert not holds_preferences(["text", "label"], [{"label": True}])
    assert not holds_preferences(["messages", "label"], [{"label": "spam"}])


def test_marks_are_found_only_where_every_text_begins_with_a_user():
    assert find_marks(["### Human: a ### Assistant:"]) is HASH_MARKS
    assert find_marks(["\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant:"]) is HUMAN_ASSISTANT
    assert find_marks(["\n\nHuman: a\n\nAssistant: b", "plain"]) is None and find_marks([]) is None
    assert find_marks(["Human: alone"]) is None


def test_text_before_the_first_mark_is_the_systems_and_an_empty_last_turn_stays():
    assert split_turns("Be kind. ### Human: a ### Assistant:", HASH_MARKS, "f:1") == [
        turn("system", "Be kind."),
        turn("user", "a"),
        turn("assistant", ""),
    ]
    inside = split_turns("User: say Bot: aloud\nBot: Bot: \n", parse_marks("User:,Bot:"), "f:1")
    assert inside == [turn("user", "say Bot: aloud"), turn("assistant", "Bot:")]
