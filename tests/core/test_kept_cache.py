"""What is kept of earlier prompts changes no answer, and saves the passes that it should."""

import random
from functools import partial

import pytest
import torch
from architectures import build_model, every_architecture
from transformers import AutoTokenizer

from ftkit.core.adapter_choice import BASE
from ftkit.core.conversation import Conversation, Speaker
from ftkit.core.encoding import Encoder
from ftkit.core.generation import Asked, Sampling, generate_batch, stream_answer
from ftkit.core.kept_cache import KeptCaches, common_length
from ftkit.errors import ExitCode, UserError
from ftkit.io.template_files import load_template

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def llama(tiny_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


def answer(model, tokenizer, kept, prompt, adapter=None, max_new=8):
    stream = stream_answer(model, Asked(tokenizer, prompt, [], (), Sampling(max_new), 64, adapter), kept)
    list(stream)
    return stream.answer.ids


def test_two_texts_share_what_they_both_begin_with():
    assert common_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_length([1, 2], [1, 2, 3]) == common_length([1, 2, 3], [1, 2]) == 2
    assert common_length([1], [2]) == common_length([], [2]) == 0


@every_architecture
def test_answers_with_what_is_kept_are_those_without(architecture, tokenizer):
    """A follow-up turn, one taken back, one asked again, one that begins otherwise; windows of 6 are passed."""
    model, draw, kept, saved = build_model(architecture), random.Random(3), KeptCaches(), 0
    some = partial(draw.choices, range(3, 64))
    start = some(k=9)
    first = answer(model, tokenizer, kept, start)
    follow = start + first + some(k=5)
    for prompt in (follow, follow, start + first[:3] + some(k=4), some(k=7), start):
        [alone] = generate_batch(model, tokenizer, [prompt], stop_ids=[], max_new=8, context=64)
        assert answer(model, tokenizer, kept, prompt) == alone.ids
        saved += len(prompt) - kept.computed
    assert saved > 0


def test_only_new_tokens_are_computed(llama, tokenizer):
    kept, start = KeptCaches(), list(range(10, 40))
    first = answer(llama, tokenizer, kept, start)
    assert kept.computed == 30
    answer(llama, tokenizer, kept, [*start, *first, 7, 8])
    assert kept.computed == 3  # the last token of the answer was never fed
    answer(llama, tokenizer, kept, [*start, 9])  # the turn is taken back
    assert kept.computed == 1
    answer(llama, tokenizer, kept, start)
    assert kept.computed == 1  # of a prompt that was read already the last token is fed again


def test_each_adapter_has_a_cache_of_its_own(llama, tokenizer, tiny_model):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    tuned = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False), "one").eval()
    kept, prompt = KeptCaches(), list(range(10, 40))
    plain, changed = answer(tuned, tokenizer, kept, prompt, BASE), answer(tuned, tokenizer, kept, prompt, "one")
    assert plain == answer(llama, tokenizer, KeptCaches(), prompt) != changed
    assert kept.computed == 30
    assert answer(tuned, tokenizer, kept, [*prompt, *plain, 5], BASE) == answer(
        llama, tokenizer, KeptCaches(), [*prompt, *plain, 5]
    )
    assert kept.computed == 2


def test_nothing_is_kept_of_an_answer_that_failed_and_the_next_one_is_right(llama, tokenizer):
    kept, prompt = KeptCaches(), list(range(10, 40))
    expected = answer(llama, tokenizer, kept, prompt)
    calls = []

    def fail_in_the_second_layer(*_):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = llama.model.layers[1].register_forward_pre_hook(fail_in_the_second_layer)
    with pytest.raises(torch.OutOfMemoryError):
        answer(llama, tokenizer, kept, [*prompt, 5])
    hook.remove()
    assert answer(llama, tokenizer, kept, prompt) == expected and kept.computed == 30


def test_out_of_memory_gives_the_answer_up_and_the_conversation_goes_on(llama, tokenizer):
    encoder = Encoder(tokenizer, load_template("chatml"))
    conversation = Conversation(Speaker(llama, encoder, encoder.stop_ids), Sampling(6))
    expected = "".join(conversation.ask("Hello."))

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = llama.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(UserError, match="out of memory: this answer was given up") as caught:
        list(conversation.ask("Hello."))
    assert caught.value.exit_code == ExitCode.MEMORY
    with pytest.raises(UserError, match="out of memory"):
        conversation.compare("Hello.", [conversation.speaker])
    hook.remove()
    assert conversation.turns == [] and "".join(conversation.ask("Hello.")) == expected


def test_a_reply_to_whom_nobody_listens_any_more_leaves_a_sound_cache(llama, tokenizer):
    kept, prompt = KeptCaches(), list(range(10, 40))
    expected = answer(llama, tokenizer, KeptCaches(), prompt)
    pieces = iter(stream_answer(llama, Asked(tokenizer, prompt, [], (), Sampling(8), 64), kept))
    next(pieces)
    pieces.close()
    assert answer(llama, tokenizer, kept, prompt) == expected and kept.computed == 1
