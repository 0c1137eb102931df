import random
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)  # fmt: skip

from ftkit.core.encoding import decode_answer
from ftkit.core.generation import (
    BROKEN,
    Asked,
    Sampling,
    Writing,
    beginning_of_stop,
    cut_before_stop,
    generate_batch,
    honours_padding,
    length_batches,
    start_of,
    stream_answer,
)  # fmt: skip
from ftkit.errors import ExitCode, UserError

torch.set_num_threads(1)
VOCABULARY = 300
CONTEXT = 48
ROTARY = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=CONTEXT
)
SHAPES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {**ROTARY, "num_key_value_heads": 2}),
    "gpt-neox": (GPTNeoXForCausalLM, GPTNeoXConfig, ROTARY),
    "gpt-neo with a window of 8": (
        GPTNeoForCausalLM,
        GPTNeoConfig,
        dict(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8)
        | {"max_position_embeddings": CONTEXT},
    ),
    "gpt-2": (GPT2LMHeadModel, GPT2Config, dict(n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT)),
    "mistral with a window of 8": (
        MistralForCausalLM,
        MistralConfig,
        {**ROTARY, "num_key_value_heads": 2, "sliding_window": 8},
    ),
}
STOPS = list(range(0, VOCABULARY, 23))


@cache
def random_model(shape):
    """Random weights, large enough that the likeliest token changes with the context; token 0 begins and ends texts."""
    model, config, options = SHAPES[shape]
    torch.manual_seed(0)
    return model(config(vocab_size=VOCABULARY, initializer_range=0.3, bos_token_id=0, eos_token_id=0, **options)).eval()


def random_prompts(count=10, lengths=(1, 2, 5, 13, 30, CONTEXT - 1)):
    draw = random.Random(1)
    return [[draw.randrange(VOCABULARY) for _ in range(draw.choice(lengths))] for _ in range(count)]


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_answers_of_a_batch_are_those_of_each_prompt_alone(shape, temperature, tokenizer):
    model, prompts = random_model(shape), random_prompts()
    options = dict(stop_ids=STOPS, max_new=30, temperature=temperature, context=CONTEXT)
    together = generate_batch(model, tokenizer, prompts, **options)
    alone = [generate_batch(model, tokenizer, [prompt], **options)[0] for prompt in prompts]
    assert together == alone
    assert len({len(answer.ids) for answer in together}) > 2  # rows left the batch at different times


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_answers_are_those_of_transformers(shape, tokenizer):
    model, prompts = random_model(shape), random_prompts()
    answers = generate_batch(model, tokenizer, prompts, stop_ids=STOPS, max_new=20, context=CONTEXT)
    for prompt, answer in zip(prompts, answers, strict=True):
        room = min(20, CONTEXT - len(prompt))
        theirs = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=room,
            eos_token_id=STOPS, pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert answer.finish == ("stop" if theirs[-1] in STOPS else "length")
        assert answer.ids == (theirs[:-1] if theirs[-1] in STOPS else theirs)


def test_no_answer_goes_beyond_the_context(tokenizer):
    prompts = [*random_prompts(4, lengths=(3, 40)), [7] * CONTEXT]
    answers = generate_batch(random_model("gpt-2"), tokenizer, prompts, stop_ids=[], max_new=1000, context=CONTEXT)
    assert [len(p) + len(a.ids) for p, a in zip(prompts, answers, strict=True)] == [CONTEXT] * 5
    assert {answer.finish for answer in answers} == {"length"}


def test_streamed_pieces_joined_are_the_answer_of_the_batch(tokenizer):
    model = random_model("llama")
    for prompt in random_prompts(6, lengths=(2, 9)):
        for temperature in (0.0, 1.5):
            options = dict(stop_ids=[0], max_new=25, temperature=temperature, context=CONTEXT)
            asked = Asked(tokenizer, prompt, [0], (), Sampling(25, temperature), CONTEXT)
            pieces = list(stream := stream_answer(model, asked))
            [answer] = generate_batch(model, tokenizer, [prompt], **options)
            assert "".join(pieces) == stream.answer.text == answer.text == decode_answer(tokenizer, prompt, answer.ids)
            assert stream.answer == answer


def test_a_model_with_an_adapter_answers_as_transformers_lets_it(tokenizer):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    base = SHAPES["llama"][0](random_model("llama").config)
    tuned = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    prompt = random_prompts(1, lengths=(9,))[0]
    options = dict(
        attention_mask=torch.ones(1, 9), do_sample=False, max_new_tokens=12, min_new_tokens=12, pad_token_id=0
    )
    [with_adapter] = generate_batch(tuned, tokenizer, [prompt], stop_ids=[], max_new=12)
    assert with_adapter.ids == tuned.generate(input_ids=torch.tensor([prompt]), **options)[0, 9:].tolist()
    with tuned.disable_adapter():
        [without] = generate_batch(tuned, tokenizer, [prompt], stop_ids=[], max_new=12)
    assert without.ids != with_adapter.ids


def test_sampling_depends_on_the_seed_and_a_low_temperature_is_greedy(tokenizer):
    model, prompts = random_model("llama"), random_prompts(3, lengths=(5,))

    def ids(**options):
        answers = generate_batch(model, tokenizer, prompts, stop_ids=[], max_new=15, **options)
        return [answer.ids for answer in answers]

    assert ids(temperature=1.0, seed=1) == ids(temperature=1.0, seed=1) != ids(temperature=1.0, seed=2)
    assert ids(temperature=1e-4, seed=3) == ids()


def test_an_empty_prompt_begins_with_the_token_that_begins_texts(tokenizer):
    model = random_model("gpt-2")
    empty, spelled = generate_batch(model, tokenizer, [[], [tokenizer.eos_token_id]], stop_ids=[], max_new=5)
    assert empty == spelled


def test_a_model_that_computes_nan_is_refused(tokenizer):
    model = SHAPES["llama"][0](random_model("llama").config).eval()
    model.lm_head.weight.data[:] = float("nan")
    with pytest.raises(UserError, match="NaN") as error:
        generate_batch(model, tokenizer, [[1, 2]], stop_ids=[], max_new=5)
    assert error.value.exit_code == ExitCode.MODEL


class MaskIgnoring(LlamaForCausalLM):
    """An architecture that takes attention_mask and does nothing with it."""

    def forward(self, *args, attention_mask=None, position_ids=None, **options):
        return super().forward(*args, **options)


def test_an_architecture_that_ignores_masks_is_noticed_and_gets_batches_without_padding():
    torch.manual_seed(0)
    prompts = random_prompts(8, lengths=(3, 9))
    assert not honours_padding(MaskIgnoring(random_model("llama").config).eval(), prompts)
    assert all(honours_padding(random_model(shape), prompts) for shape in SHAPES)
    batches = length_batches(prompts, 3, equal_lengths=True)
    assert sorted(place for batch in batches for place in batch) == list(range(8))
    assert all(len({len(prompts[place]) for place in batch}) == 1 and len(batch) <= 3 for batch in batches)


def test_batches_by_length_hold_every_prompt_once_longest_first():
    prompts = [[0] * length for length in (3, 9, 1, 9, 4)]
    assert length_batches(prompts, 2) == [[1, 3], [4, 0], [2]]


def test_text_is_cut_before_the_first_stop_string():
    assert cut_before_stop("one ### End two", ["two", "### End"]) == "one "
    assert cut_before_stop("one", ["### End"]) == "one"


def test_the_end_of_a_text_may_be_the_beginning_of_a_stop_string():
    assert beginning_of_stop("one ##", ["### End"]) == 2
    assert beginning_of_stop("one ## ", ["### End"]) == 0
    assert beginning_of_stop("one", []) == 0


def test_a_stop_string_ends_the_answer_and_no_part_of_it_is_streamed(tokenizer):
    text = "Täglich 5 ## 🙂\n\n### End and more"
    writing, pieces = Writing(tokenizer, [1], [0], ["### End"], room=100), []
    for token in tokenizer(text).input_ids:
        goes_on = writing.take(token)
        pieces.append(writing.next_piece())
        if not goes_on:
            break
    assert "".join(pieces) == writing.answer.text == "Täglich 5 ## 🙂\n\n"
    assert writing.answer.finish == "stop"
    assert not any("###" in piece or BROKEN in piece for piece in pieces)


def check_streaming(tokenizer, prompt, ids):
    """Pieces joined are the whole answer's text, and never hold half a character unless the ids do."""
    writing, pieces = Writing(tokenizer, prompt, [], [], room=len(ids)), []
    for token in ids:
        writing.take(token)
        pieces.append(writing.next_piece())
    whole = decode_answer(tokenizer, prompt, ids)
    assert "".join(pieces) == writing.answer.text == whole


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("ab Zé中🙂\n\u200d👩👧#"), min_size=1, max_size=24))
def test_any_text_streams_to_itself(text, tiny_model):
    tokenizer = byte_level(str(tiny_model))
    check_streaming(tokenizer, tokenizer("Answer:").input_ids, tokenizer(text).input_ids)


@cache
def byte_level(folder):
    return AutoTokenizer.from_pretrained(folder)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(3, 511), min_size=1, max_size=20))
def test_any_tokens_of_a_byte_level_tokenizer_stream_to_their_text(ids, tiny_model):
    tokenizer = byte_level(str(tiny_model))
    check_streaming(tokenizer, tokenizer("Answer:").input_ids, ids)


@pytest.mark.parametrize("text", ["Once upon a time, 中国 and 🙂🙂 met é.", " two  spaces", "’’’", "a\n\n b"])
def test_sentencepiece_answers_keep_their_spaces_and_their_many_byte_characters(text, shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260k")
    prompt = tokenizer("### Response:").input_ids
    check_streaming(tokenizer, prompt, tokenizer(text, add_special_tokens=False).input_ids)


def prompts_with_one_start(length=20, count=6):
    """Prompts that begin with the same tokens and go on with 1 to 12 others."""
    draw = random.Random(5)
    start = [draw.randrange(VOCABULARY) for _ in range(length)]
    return [start + [draw.randrange(VOCABULARY) for _ in range(2 * n + 1)] for n in range(count)]


@pytest.mark.parametrize("shape", ["llama", "gpt-neox", "gpt-2"])
def test_a_start_that_all_prompts_share_is_computed_once_and_changes_no_answer(shape, tokenizer):
    model, prompts = random_model(shape), prompts_with_one_start()
    start = start_of(model, prompts)
    assert start.length == 20 and honours_padding(model, prompts, start)
    options = dict(stop_ids=STOPS, max_new=30, context=CONTEXT)
    together = generate_batch(model, tokenizer, prompts, start=start, **options)
    again = generate_batch(model, tokenizer, prompts[::-1], start=start, **options)[::-1]
    alone = [generate_batch(model, tokenizer, [prompt], **options)[0] for prompt in prompts]
    assert together == again == alone
    assert len({len(answer.ids) for answer in together}) > 2  # rows left the batch, and with them columns of pads


def test_the_shared_start_is_fed_once_and_not_with_every_batch(tokenizer):
    model, prompts, fed = random_model("llama"), prompts_with_one_start(), []
    hook = model.register_forward_pre_hook(
        lambda _, args, options: fed.append(options["input_ids"].numel()), with_kwargs=True
    )
    try:
        start = start_of(model, prompts)
        for prompt in prompts:
            generate_batch(model, tokenizer, [prompt], stop_ids=[], max_new=1, start=start)
    finally:
        hook.remove()
    assert fed == [20, *(len(prompt) - 20 for prompt in prompts)]


def test_no_start_is_shared_where_it_gains_nothing_or_would_be_wrong():
    prompts = prompts_with_one_start()
    assert start_of(random_model("llama"), prompts[:1]) is None
    assert start_of(random_model("llama"), [prompt[10:] for prompt in prompts]) is None  # ten tokens are too few
    for shape in ("gpt-neo with a window of 8", "mistral with a window of 8"):
        assert start_of(random_model(shape), prompts) is None
    same = [prompts[0]] * 2
    assert start_of(random_model("llama"), same).length == len(prompts[0]) - 1  # the last token is left to feed


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (5, 1.0), (8, 0.5), (1, 0.9), (0, 1e-9), (1000, 0.3)])
def test_tokens_are_drawn_from_those_that_transformers_keeps(top_k, top_p):
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    from ftkit.core.generation import narrowed

    logits = 3 * torch.randn(100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, logits[None]) if top_k else logits[None])[0]
    ours = narrowed(logits.softmax(0), top_k, top_p)
    assert torch.allclose(ours / ours.sum(), theirs.softmax(0))
    assert (ours > 0).sum() < 100
