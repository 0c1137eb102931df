"""Text becomes ids in one place: the same for training and inference, and exactly the answers are trained."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from ftkit.core.encoding import Encoder, decode_answer
from ftkit.core.examples import checked_example, untrained_turns
from ftkit.errors import ExitCode, UserError
from ftkit.io.template_files import load_template

SPECIAL_TEXTS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>", "\ue001"]


def chat_template(turn, opening=""):
    """Jinja for a message m, and for what opens an answer."""
    return "{% for m in messages %}" + turn + "{% endfor %}{% if add_generation_prompt %}" + opening + "{% endif %}"


NO_STOP = chat_template("{{ m.role }}: {{ m.content }}\n", "assistant: ")
SHOWS_LAST_THOUGHT = (  # as Qwen3: only the last answer shows its (empty) thinking
    "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
)
TEMPLATES = {
    "chatml": None,  # the shipped file
    "zephyr": chat_template("<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n", "<|assistant|>\n"),
    "llama2": chat_template(
        "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    ),
    "gemma": chat_template(
        "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<|im_end|>\n",
        "<|im_start|>model\n",
    ),
    "plain": chat_template(
        "{{ 'Q: ' if m.role == 'user' else 'A:' }}{{ m.content }}{{ eos_token if m.role == 'assistant' else '\n' }}",
        "A:",
    ),
    "thinking": chat_template(SHOWS_LAST_THOUGHT, "<|im_start|>assistant\n"),
}
# what each puts in front of an answer and behind it
FRAMES = {
    "chatml": ("", "<|im_end|>"),
    "zephyr": ("", "<|endoftext|>"),
    "llama2": (" ", "<|endoftext|>"),
    "gemma": ("", "<|im_end|>"),
    "plain": ("", "<|endoftext|>"),
    "thinking": ("<think>\n\n</think>\n\n", "<|im_end|>"),
}

# U+2581 is how SentencePiece writes a space, so it cannot come back as itself
texts = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=12),
        st.sampled_from(SPECIAL_TEXTS),
    ),
    max_size=4,
).map("".join)
answers = texts.filter(bool)
conversations = st.lists(st.tuples(texts, answers), min_size=1, max_size=3).map(
    lambda turns: [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
)
few = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def byte_level(tiny_model):
    """Byte-level BPE with <|endoftext|>, <|im_start|> and <|im_end|>; no BOS."""
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def sentencepiece(request):
    """SentencePiece-like, with <s> in front, a space in front of every text, and bytes for what has no piece."""
    folder = request.config.rootpath.parent / "shared" / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip("no ../shared beside this checkout")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def chat_tokenizer(tiny_model, request):
    """The byte-level tokenizer with a chat template of its own."""

    def make(template):
        made = AutoTokenizer.from_pretrained(tiny_model)
        made.chat_template = template
        return made

    return make


@pytest.fixture(scope="module", params=list(TEMPLATES))
def chat_encoder(request, chat_tokenizer):
    if request.param == "chatml":
        return Encoder(chat_tokenizer(None), load_template("chatml"))
    return Encoder(chat_tokenizer(TEMPLATES[request.param]))


def trained_spans(tokenizer, example):
    """The texts of each stretch of trained tokens."""
    spans, open_ = [], False
    for token, is_trained in zip(example.ids, example.counted, strict=True):
        if is_trained:
            spans = spans if open_ else [*spans, []]
            spans[-1].append(token)
        open_ = is_trained
    return [tokenizer.decode(span) for span in spans]


# ---------------------------------------------------------------- prompt and completion
@given(prompt=texts, completion=answers)
@few
def test_training_sees_the_ids_of_inference_then_the_answer_and_its_stop(tokenizer, prompt, completion):
    encoder = Encoder(tokenizer)
    row = {"prompt": prompt, "completion": completion}
    example = encoder.example(row)
    fed = encoder.input_ids(row)
    assert fed == encoder.prompt_ids(prompt)
    assert example.ids[: len(fed)] == fed
    assert example.counted == [False] * len(fed) + [True] * (len(example.ids) - len(fed))
    assert example.ids[-1] == tokenizer.eos_token_id


@given(prompt=texts, completion=answers)
@few
def test_the_text_of_an_answer_comes_back_from_its_ids(tokenizer, prompt, completion):
    encoder = Encoder(tokenizer)
    example = encoder.example({"prompt": prompt, "completion": completion})
    fed = encoder.prompt_ids(prompt)
    assert decode_answer(tokenizer, fed, example.ids[len(fed) :]) == completion


@pytest.mark.parametrize("completion", ["word", " word", "  two", "\nline", "🙂 ok", "é", " ", "\n\n", "tail "])
@pytest.mark.parametrize("prompt", ["Say it:", "Say it:\n", "party 🎉", "🎉\n", ""])
def test_an_answer_comes_back_whatever_is_at_the_seam(tokenizer, prompt, completion):
    encoder = Encoder(tokenizer)
    example = encoder.example({"prompt": prompt, "completion": completion})
    fed = encoder.prompt_ids(prompt)
    assert decode_answer(tokenizer, fed, example.ids[len(fed) :]) == completion


@given(prompt=texts, completion=answers)
@few
def test_text_that_looks_like_a_special_token_stays_text(tokenizer, prompt, completion):
    encoder = Encoder(tokenizer)
    example = encoder.example({"prompt": prompt, "completion": completion})
    inside = example.ids[len(encoder.start_ids) : -1]
    assert not set(inside) & set(tokenizer.all_special_ids)


def test_sentencepiece_gets_one_bos_and_no_space_in_front_of_the_answer(sentencepiece):
    encoder = Encoder(sentencepiece)
    example = encoder.example({"prompt": "Once upon", "completion": "a time"})
    fed = encoder.prompt_ids("Once upon")
    pieces = sentencepiece.convert_ids_to_tokens(example.ids)
    assert encoder.start_ids == [sentencepiece.bos_token_id] and example.ids.count(sentencepiece.bos_token_id) == 1
    assert pieces[1].startswith("▁")  # the prompt begins as the model was trained to begin
    assert not pieces[len(fed)].startswith("▁")
    spaced = encoder.example({"prompt": "Once upon", "completion": " a time"})
    assert sentencepiece.convert_ids_to_tokens(spaced.ids)[len(fed)].startswith("▁")


def test_a_tokenizer_that_begins_texts_with_nothing_adds_nothing(byte_level):
    assert Encoder(byte_level).start_ids == []


def test_plain_text_is_trained_from_its_beginning_to_its_stop(tokenizer):
    encoder = Encoder(tokenizer)
    example = encoder.example({"text": "Once upon a time"})
    assert example.ids == [
        *encoder.start_ids,
        *tokenizer("Once upon a time", add_special_tokens=False).input_ids,
        tokenizer.eos_token_id,
    ]
    assert all(example.counted)


# ---------------------------------------------------------------- conversations
@given(messages=conversations)
@few
def test_the_mask_covers_exactly_the_answers_and_their_stops(chat_encoder, messages):
    tokenizer = chat_encoder.tokenizer
    example = chat_encoder.example({"messages": messages})
    whole = chat_encoder.render(messages, generate=False)
    assert tokenizer.decode(example.ids) == whole
    name = next((name for name, text in TEMPLATES.items() if text == tokenizer.chat_template), "chatml")
    before, stop = FRAMES[name]
    expected = [before + message["content"] + stop for message in messages if message["role"] == "assistant"]
    assert trained_spans(tokenizer, example) == (expected[-1:] if name == "thinking" else expected)


@given(messages=conversations)
@few
def test_a_conversation_is_trained_after_the_ids_that_inference_feeds(chat_encoder, messages):
    row = {"messages": messages}
    example, fed = chat_encoder.example(row), chat_encoder.input_ids(row)
    assert example.ids[: len(fed)] == fed
    assert example.counted[len(fed)] and not any(example.counted[len(fed) - 1 : len(fed)])
    answer = example.ids[len(fed) :]
    trained = [token for token, counted in zip(answer, example.counted[len(fed) :], strict=True) if counted]
    assert trained[-1] in chat_encoder.stop_ids


@given(messages=conversations)
@few
def test_contents_cannot_forge_turns(chat_encoder, messages):
    """The only special tokens are the template's own: as many as with contents of plain words."""
    specials = set(chat_encoder.tokenizer.all_special_ids)
    words = [{**message, "content": "word"} for message in messages]
    found = [token for token in chat_encoder.example({"messages": messages}).ids if token in specials]
    assert found == [token for token in chat_encoder.example({"messages": words}).ids if token in specials]


def test_a_chat_ends_its_answers_with_the_tokens_of_its_template(chat_encoder):
    tokenizer = chat_encoder.tokenizer
    expected = {tokenizer.eos_token_id}
    if "<|im_end|>" in chat_encoder.render([{"role": "user", "content": "a"}], generate=False):
        expected.add(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert set(chat_encoder.stop_ids) == expected


def test_tinystories_chat_trains_every_bot_turn(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "tinystories-chat-3m")
    encoder = Encoder(tokenizer)
    messages = [
        {"role": "user", "content": "Hi! How are you?"},
        {"role": "assistant", "content": "Fine."},
        {"role": "user", "content": "Tell me a story."},
        {"role": "assistant", "content": "Once upon a time."},
    ]
    example = encoder.example({"messages": messages})
    assert trained_spans(tokenizer, example) == [" Fine.<|endoftext|>", " Once upon a time.<|endoftext|>"]
    assert tokenizer.decode(example.ids) == (
        "User: Hi! How are you?\nBot: Fine.<|endoftext|>\nUser: Tell me a story.\nBot: Once upon a time.<|endoftext|>"
    )
    masks = tokenizer.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True
    )  # transformers' own opinion
    assert masks["input_ids"] == example.ids and [bool(m) for m in masks["assistant_masks"]] == example.counted


def test_sentencepiece_chats_have_one_bos_and_train_both_turns(sentencepiece):
    encoder = Encoder(sentencepiece, load_template("chatml"))
    own = Encoder(sentencepiece)
    turn = "{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' else '\n' }}"
    sentencepiece.chat_template = "{{ bos_token }}" + chat_template(turn, "assistant:")
    messages = [
        {"role": role, "content": text}
        for role, text in (("user", "Hi"), ("assistant", "Yes"), ("user", "</s>"), ("assistant", "No"))
    ]
    try:
        example = own.example({"messages": messages})
    finally:
        sentencepiece.chat_template = None
    assert example.ids.count(sentencepiece.bos_token_id) == 1 and example.ids.count(sentencepiece.eos_token_id) == 2
    assert [span.strip() for span in trained_spans(sentencepiece, example)] == ["Yes</s>", "No</s>"]
    with pytest.raises(UserError, match="without a stop token"):  # this tokenizer has no <|im_end|>
        encoder.example({"messages": messages})


def test_a_template_that_changes_earlier_turns_trains_the_last_and_counts_the_others(chat_tokenizer):
    encoder = Encoder(chat_tokenizer(TEMPLATES["thinking"]))
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"), ("assistant", "f")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    example = encoder.example(row)
    assert trained_spans(encoder.tokenizer, example) == ["<think>\n\n</think>\n\nf<|im_end|>"]
    assert untrained_turns(row, example) == 2
    chatml = Encoder(encoder.tokenizer, load_template("chatml"))
    assert untrained_turns(row, chatml.example(row)) == 0


def test_a_template_without_a_stop_token_is_refused_with_the_place(chat_tokenizer):
    encoder = Encoder(chat_tokenizer(NO_STOP))
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(UserError, match=r"rows\.jsonl:3: .*stop token") as caught:
        checked_example(encoder, row, "rows.jsonl:3")
    assert caught.value.exit_code == ExitCode.DATA and "eos_token" in caught.value.hint
    follow_up = [*row["messages"], {"role": "user", "content": "c"}]  # an untuned base may still be asked so
    assert encoder.tokenizer.decode(encoder.chat_ids(follow_up)) == "user: a\nassistant: b\nuser: c\nassistant: "


def test_a_chat_without_any_template_says_how_to_choose_one(byte_level):
    with pytest.raises(UserError, match="no chat template") as caught:
        Encoder(byte_level).example(
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        )
    assert caught.value.exit_code == ExitCode.MODEL and "--template chatml" in caught.value.hint


def test_a_template_with_a_bos_of_its_own_is_refused_where_it_would_be_the_second(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, bos_token="<|im_start|>")
    tokenizer.chat_template = (
        "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(UserError, match="two BOS") as caught:
        checked_example(Encoder(tokenizer), row, "rows.jsonl:1")
    assert caught.value.exit_code == ExitCode.MODEL


def test_special_tokens_without_a_role_close_turns_and_stay_text_in_contents(tiny_model):
    """Phi-3 closes its turns with <|end|>, which its tokenizer marks special but gives no role."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    turn = "<|im_start|>{{ m.role }}\n{{ m.content }}<|end|>\n"
    tokenizer.chat_template = chat_template(turn, "<|im_start|>assistant\n")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end not in tokenizer.all_special_ids
    encoder = Encoder(tokenizer)
    row = {"messages": [{"role": "user", "content": "what is <|end|>?"}, {"role": "assistant", "content": "a token"}]}
    example = checked_example(encoder, row, "rows.jsonl:1")
    assert end in encoder.stop_ids and example.ids.count(end) == 2
    assert trained_spans(tokenizer, example) == ["a token<|end|>"]


def test_a_stop_string_of_the_template_that_is_one_token_is_a_stop(byte_level):
    encoder = Encoder(byte_level, load_template("chatml"))
    assert encoder.stop_ids == sorted({byte_level.eos_token_id, byte_level.convert_tokens_to_ids("<|im_end|>")})
    assert Encoder(byte_level, load_template("alpaca-end")).stop_ids == [
        byte_level.eos_token_id
    ]  # "### End" is several
