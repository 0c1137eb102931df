"""Blocks that are alike are recorded once: the answer is that of the whole model, or the whole model is recorded."""

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from ftkit.core import training_memory as subject
from ftkit.core.allocation_events import ALLOCATE, BLOCK, FREE, RECORDED, stretched
from ftkit.core.gpus import GPUS
from ftkit.core.memory_estimate import Part
from ftkit.core.planned_run import plan_run
from ftkit.core.train_settings import TrainSettings
from ftkit.io.devices import DTYPES
from ftkit.io.quantization import quantization_config

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
LAYERS = RECORDED + 3
LLAMA = LlamaConfig(**SIZES, num_hidden_layers=LAYERS)
CASES = [
    (LLAMA, "h100", {}),
    (LLAMA, "t4", {"qlora": True, "gradient_checkpointing": "on"}),
    (LLAMA, "h100", {"full": True, "gradient_checkpointing": "on", "optimizer": "adafactor"}),
    (LLAMA, "h100", {"qlora": True, "gradient_checkpointing": "on", "offload_activations": True}),
    (LLAMA, "t4", {"targets": "all-linear,lm_head", "optimizer": "paged-adamw", "batch": 1}),
    (MistralConfig(**SIZES, num_hidden_layers=LAYERS, sliding_window=None), "l4", {"method": "ln"}),
    (Qwen2Config(**SIZES, num_hidden_layers=LAYERS), "l4", {"method": "ia3", "pack": "off"}),
    (Qwen3Config(**SIZES, num_hidden_layers=LAYERS, head_dim=16, tie_word_embeddings=True), "l4",
     {"dora": True, "dropout": 0.1, "batch": 1}),
]  # fmt: skip


def simulate(config, gpu, changes):
    settings = TrainSettings(**{"max_length": 64, "batch": 8, "micro_batch": "2"} | changes)
    run = plan_run(settings, None, GPUS[gpu], 2**17)
    quantization = quantization_config(run.method, DTYPES[run.dtype], [])
    return subject.training_memory(settings, run, config, quantization, device=subject.simulated_device(GPUS[gpu]))


@pytest.fixture
def recorded(monkeypatch):
    """How many blocks the models had whose events were taken."""
    found, record_run = [], subject.record_run

    def spy(settings, run, config, *others):
        result = record_run(settings, run, config, *others)
        if result[0] is not None:
            found.append(config.num_hidden_layers)
        return result

    monkeypatch.setattr(subject, "record_run", spy)
    return found


@pytest.mark.parametrize(("config", "gpu", "changes"), CASES)
def test_few_blocks_say_what_all_of_them_would(monkeypatch, recorded, config, gpu, changes):
    short = simulate(config, gpu, changes)
    monkeypatch.setattr(subject, "alike_blocks", lambda *_: None)
    assert simulate(config, gpu, changes) == short
    assert recorded == [RECORDED, LAYERS]


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (LLAMA, {"train_layers": "last:4"}),
        (LLAMA, {"targets": "layers.3.self_attn.q_proj"}),
        (LLAMA, {"rank_pattern": "layers.3.self_attn.q_proj=4"}),
        (LLAMA, {"gradient_checkpointing": "on", "checkpoint_every": 2}),
        (LLAMA, {"load_in_8bit": True}),
        (LLAMA, {"method": "prefix"}),
        (Qwen2Config(**SIZES, num_hidden_layers=LAYERS, use_sliding_window=True, max_window_layers=4), {}),
        (LlamaConfig(**SIZES, num_hidden_layers=RECORDED + 2), {}),
    ],
)
def test_blocks_that_are_not_alike_or_few_are_all_recorded(recorded, config, changes):
    simulate(config, "l4", changes)
    assert recorded == [config.num_hidden_layers]


def test_a_model_whose_blocks_turn_out_unlike_is_recorded_whole(monkeypatch, recorded):
    """Only the events tell: the rule that looks at options is switched off."""
    monkeypatch.setattr(subject, "alike_blocks", lambda config, _: config.num_hidden_layers)
    simulate(LLAMA, "l4", {"gradient_checkpointing": "on", "checkpoint_every": 2})
    simulate(LLAMA, "l4", {"rank_pattern": "layers.3.self_attn.q_proj=4"})
    assert recorded == [LAYERS, LAYERS]


def passes(size_of_third=512, keeps=False):
    """One pass over RECORDED blocks; each allocates, and frees what the one before it gave."""
    for block in range(RECORDED):
        yield (BLOCK, block)
        yield (
            ALLOCATE,
            block + 1,
            size_of_third if block == 3 else 512,
            Part.ACTIVATIONS,
            f"model.layers.{block}.mlp",
            "",
        )
        if block and not keeps:
            yield (FREE, block)
    yield (BLOCK, None)
    if not keeps:
        yield (FREE, RECORDED)


def test_an_inner_block_is_repeated_under_its_own_name():
    events = stretched(list(passes()), 9)
    assert events is not None
    made = [event for event in events if event[0] == ALLOCATE]
    assert [event[4] for event in made] == [f"model.layers.{number}.mlp" for number in range(9)]
    assert [event[1] for event in events if event[0] == FREE] == [event[1] for event in made]


def test_what_is_unlike_or_left_over_is_not_repeated():
    assert stretched(list(passes(size_of_third=1024)), 9) is None
    assert stretched(list(passes(keeps=True)), 9) is None
    assert stretched([event for event in passes() if event != (BLOCK, 4)], 9) is None
