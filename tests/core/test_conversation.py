"""The engine of chat: forms of prompts, history, what is left out when the context is full."""

from dataclasses import replace

import pytest

from ftkit.core.conversation import Conversation, Speaker, answers_to, without_oldest_exchange
from ftkit.core.encoding import Encoder
from ftkit.core.generation import Sampling, generate_batch
from ftkit.errors import ExitCode, UserError
from ftkit.io.base_model import find_base, load_tokenizer, load_weights
from ftkit.io.template_files import load_template


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "be brief"}


@pytest.fixture(scope="module")
def model(tiny_model):
    import torch

    base = find_base(str(tiny_model))
    return load_weights(base, dtype=torch.float32, device="cpu"), load_tokenizer(base)


@pytest.fixture
def speaker(model):
    def make(template=None, context=None):
        encoder = Encoder(model[1], load_template(template) if template else None)
        return Speaker(model[0], encoder, encoder.stop_ids, encoder.template.stop if encoder.template else (), context)

    return make


def talk(conversation, *texts):
    """Ask and keep each text; returns the replies."""
    replies = []
    for text in texts:
        reply = conversation.ask(text)
        pieces = "".join(reply)
        assert pieces.rstrip() == reply.content.rstrip()
        conversation.keep(text, reply)
        replies.append(reply)
    return replies


def shown(speaker, prompt):
    return speaker.encoder.tokenizer.decode(prompt.ids)


def test_the_oldest_exchange_goes_and_the_system_message_stays():
    turns = [SYSTEM, user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    assert without_oldest_exchange(turns) == [SYSTEM, user("c"), assistant("d"), user("e")]
    assert without_oldest_exchange(turns[1:]) == turns[3:]
    assert without_oldest_exchange([SYSTEM, user("a")]) == []
    assert without_oldest_exchange([user("a")]) == []


def test_without_a_template_the_text_itself_is_the_prompt(speaker):
    plain = speaker()
    assert plain.only_continues and not plain.keeps_history
    assert plain.prompt([user("Once upon")], 8).ids == plain.encoder.prompt_ids("Once upon")
    assert plain.content(" a time\n") == " a time\n"


def test_a_single_turn_template_gives_the_ids_that_training_saw(speaker):
    alpaca = speaker("alpaca")
    row = {"prompt": alpaca.encoder.template.prompt_for("Name a colour."), "completion": "Blue."}
    ids = alpaca.prompt([user("Name a colour.")], 8).ids
    example = alpaca.encoder.example(row)
    assert ids == example.ids[: example.counted.index(True)]


def test_a_single_turn_template_does_not_leak_the_history(speaker):
    conversation = Conversation(speaker("alpaca"), Sampling(4))
    first, _, again = talk(conversation, "Name a colour.", "Name a tree.", "Name a colour.")
    assert again.prompt == first.prompt
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"] * 3


def test_a_chat_template_keeps_the_history(speaker):
    chat = speaker("chatml")
    conversation = Conversation(chat, Sampling(4), "be brief")
    first, second = talk(conversation, "Hello.", "And now?")
    answered = conversation.turns[1]["content"]
    assert second.prompt.ids == chat.encoder.chat_ids([SYSTEM, user("Hello."), assistant(answered), user("And now?")])
    assert "Hello." in shown(chat, second.prompt) and "be brief" in shown(chat, first.prompt)


def test_a_streamed_reply_is_the_answer_of_batched_generation(speaker):
    chat = speaker("chatml")
    reply = Conversation(chat, Sampling(12)).ask("Hello.")
    pieces = "".join(reply)
    [answer] = generate_batch(
        chat.model,
        chat.encoder.tokenizer,
        [reply.prompt.ids],
        stop_ids=chat.stop_ids,
        stop_strings=chat.stop_strings,
        max_new=12,
    )
    assert [reply.answer] == [answer] == answers_to([(chat, reply.prompt)], Sampling(12))
    assert pieces.strip() == answer.text.strip() == reply.content


def test_a_full_context_drops_the_oldest_turns_and_counts_them(speaker):
    roomy = speaker("chatml")
    turns = [user("the first"), assistant("its answer"), user("the second"), assistant("its answer"), user("the third")]
    all_ids = roomy.prompt(turns, 8).ids
    less = roomy.prompt(turns[2:], 8).ids

    tight = speaker("chatml", context=len(all_ids) + 7)  # one token too few for all turns and 8 of an answer
    assert tight.prompt(turns, 7).dropped == 0
    prompt = tight.prompt(turns, 8)
    assert (prompt.ids, prompt.dropped) == (less, 1)

    tighter = speaker("chatml", context=len(less))
    assert tighter.prompt(turns, 1).dropped == 2


def test_the_room_for_an_answer_is_at_most_a_quarter_of_the_context(speaker):
    turns = [user("one two three"), assistant("four"), user("five")]
    length = len(speaker("chatml").prompt(turns, 1).ids)
    context = -(-length * 4 // 3)  # the smallest whose three quarters hold the conversation
    assert speaker("chatml", context=context).prompt(turns, 10_000).dropped == 0
    assert speaker("chatml", context=context - 2).prompt(turns, 10_000).dropped == 1


def test_a_prompt_that_alone_fills_the_context_is_refused(speaker):
    short = speaker(context=4)
    with pytest.raises(UserError, match="the model's context is 4") as caught:
        short.prompt([user("one two three four five six seven eight")], 8)
    assert caught.value.exit_code == ExitCode.DATA


def test_a_conversation_for_a_single_turn_template_is_refused_not_shortened(speaker):
    with pytest.raises(UserError, match="a conversation of 3 messages for template alpaca"):
        speaker("alpaca").prompt([user("a"), assistant("b"), user("c")], 8)
    with pytest.raises(UserError, match="a system message for a model without a chat template"):
        Conversation(speaker(), Sampling(4), "be brief")


def test_undo_takes_back_one_exchange_and_reset_all(speaker):
    conversation = Conversation(speaker("chatml"), Sampling(3), "be brief")
    first, second = talk(conversation, "One?", "Two?")
    assert conversation.undo() == "Two?"
    assert conversation.ask("Two?").prompt == second.prompt
    conversation.reset()
    assert conversation.undo() is None
    assert conversation.ask("One?").prompt == first.prompt


def test_with_temperature_a_question_asked_again_is_drawn_anew_and_a_new_conversation_repeats(speaker):
    sampling = Sampling(24, temperature=1.5, seed=7)

    def three_times():
        conversation = Conversation(speaker("alpaca"), sampling)
        return [reply.answer.ids for reply in talk(conversation, "Name a colour.", "Name a colour.", "Name a colour.")]

    drawn = three_times()
    assert len({tuple(ids) for ids in drawn}) == 3
    assert drawn == three_times()


def test_an_answer_stopped_half_way_is_kept_as_far_as_it_went(speaker):
    conversation = Conversation(speaker("alpaca"), Sampling(40))
    reply = conversation.ask("Name a colour.")
    pieces = iter(reply)
    said = next(pieces) + next(pieces)
    conversation.keep("Name a colour.", reply)
    assert conversation.turns[1]["content"] == said.strip()
    assert 0 < len(reply.answer.ids) < 40


def test_the_system_message_of_training_is_what_each_speaker_sees_until_another_is_said(speaker):
    taught, other = (
        replace(speaker("chatml"), name=name, system=text) for name, text in (("a", "be brief"), ("b", None))
    )
    conversation = Conversation(taught, Sampling(4))
    assert "be brief" in shown(taught, conversation.ask("Hello.").prompt) and conversation.system == "be brief"
    conversation.speaker = other
    assert "system" not in shown(other, conversation.ask("Hello.").prompt) and conversation.opening == []
    conversation.set_system("be kind")
    for one in (taught, other):
        conversation.speaker = one
        assert "be kind" in shown(one, conversation.ask("Hello.").prompt)
    conversation.set_system("")
    assert conversation.system is None and "be" not in shown(taught, conversation.ask("Hello.").prompt)
    assert Conversation(taught, Sampling(4), "").opening == []
