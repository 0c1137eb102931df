"""The formula against the simulation over a grid, its counts against the design's, and what it refuses."""

import subprocess
import sys

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from ftkit.core.closed_form import EXPECTED_ERROR, closed_form
from ftkit.core.estimate_settings import EstimateSettings
from ftkit.core.gpus import GPUS
from ftkit.core.memory_estimate import Part
from ftkit.core.model_sizes import read_sizes
from ftkit.core.planned_run import plan_run
from ftkit.core.training_memory import simulated_device, training_memory
from ftkit.errors import ExitCode, UserError
from ftkit.io.devices import DTYPES
from ftkit.io.quantization import quantization_config

LLAMA_2 = LlamaConfig(num_hidden_layers=4)
LLAMA_3 = LlamaConfig(
    hidden_size=3072, intermediate_size=8192, num_hidden_layers=4, num_attention_heads=24, num_key_value_heads=8,
    head_dim=128, vocab_size=128256, tie_word_embeddings=True,
)  # fmt: skip
QWEN_2 = Qwen2Config(
    hidden_size=1536, intermediate_size=8960, num_hidden_layers=4, num_attention_heads=12, num_key_value_heads=2,
    vocab_size=151936, tie_word_embeddings=True,
)  # fmt: skip
QWEN_3 = Qwen3Config(
    hidden_size=2560, intermediate_size=9728, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=151936,
)  # fmt: skip
SMOL = LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=9, num_key_value_heads=3,
    vocab_size=49152, tie_word_embeddings=True,
)  # fmt: skip
MISTRAL = MistralConfig(num_hidden_layers=3, sliding_window=None)
GRID = [
    (LLAMA_2, None, {}),
    (LLAMA_2, None, {"gradient_checkpointing": "on", "qlora": True, "max_length": 4096}),
    (LLAMA_2, "t4", {"gradient_checkpointing": "on", "qlora": True}),
    (LLAMA_2, None, {"targets": "all-linear,lm_head", "r": 64}),
    (LLAMA_2, None, {"full": True, "max_length": 256, "batch": 4}),
    (LLAMA_3, None, {"targets": "q_proj,v_proj", "gradient_checkpointing": "on", "pack": "off", "micro_batch": "3"}),
    (LLAMA_3, "t4", {"dropout": 0.05}),
    (LLAMA_3, "h100", {"load_in_8bit": True, "gradient_checkpointing": "on"}),
    (LLAMA_3, None, {"full": True, "dtype": "bf16", "batch": 1, "gradient_checkpointing": "on"}),
    (LLAMA_3, None, {"full": True, "optimizer": "sgd", "batch": 1, "max_length": 512}),
    (QWEN_2, None, {"qlora": True}),
    (QWEN_2, None, {"full": True, "optimizer": "paged-adamw-8bit", "gradient_checkpointing": "on"}),
    (QWEN_3, None, {"dtype": "fp32", "gradient_checkpointing": "on"}),
    (QWEN_3, "l40s", {"full": True, "optimizer": "adamw-8bit", "dtype": "bf16"}),
    (SMOL, None, {"load_in_8bit": True}),
    (SMOL, None, {"full": True}),
    (MISTRAL, None, {"qlora": True, "micro_batch": "1", "targets": "attention"}),
]


def formula(config, gpu, options):
    settings = EstimateSettings(**{"max_length": 1024, **options})
    card = GPUS[gpu] if gpu else None
    run = plan_run(settings, 8192, card, 2**17)
    return settings, run, closed_form(settings, run, read_sizes(config.to_dict(), "model"), card)


@pytest.mark.parametrize(("config", "gpu", "options"), GRID)
def test_the_formula_is_within_its_expected_error_of_the_simulation(config, gpu, options):
    settings, run, quick = formula(config, gpu, options)
    quantization = quantization_config(run.method, DTYPES[run.dtype])
    device = simulated_device(GPUS[gpu] if gpu else None)
    exact = training_memory(settings, run, config, quantization, device=device)
    assert quick.allocated_bytes == pytest.approx(exact.allocated_bytes, rel=EXPECTED_ERROR)
    assert quick.expected_error == EXPECTED_ERROR and exact.expected_error is None
    assert (quick.trained_parameters, quick.total_parameters) == (exact.trained_parameters, exact.total_parameters)
    assert sum(quick.parts.values()) == quick.allocated_bytes
    for part in (Part.FROZEN, Part.TRAINED, Part.OPTIMIZER):
        assert quick.parts.get(part, 0) == pytest.approx(exact.parts.get(part, 0), rel=0.03, abs=2**21), (
            "but for what the allocator rounds"
        )


@pytest.mark.parametrize(
    ("targets", "r", "count"),
    [
        ("q_proj,v_proj", 8, 2_662_400),
        ("q_proj,v_proj", 16, 5_324_800),
        ("all-linear", 8, 12_712_960),
        ("all-linear,lm_head", 8, 12_994_560),
    ],
)
def test_open_llama_3b_trains_the_published_number_of_parameters(targets, r, count):
    raw = {"model_type": "llama", "hidden_size": 3200, "intermediate_size": 8640, "num_hidden_layers": 26,
           "num_attention_heads": 32, "vocab_size": 32000}  # fmt: skip
    settings = EstimateSettings(targets=targets, r=r)
    sizes = read_sizes(raw, "open_llama")
    assert closed_form(settings, plan_run(settings, 2048, None, 2**17), sizes, None).trained_parameters == count


def test_more_of_anything_never_takes_less():
    def peak(**options):
        return formula(LLAMA_2, None, options)[2].allocated_bytes

    assert peak(micro_batch="1") < peak(micro_batch="2") < peak(micro_batch="4")
    assert peak(r=8) < peak(r=64)
    assert peak(qlora=True) < peak(load_in_8bit=True) < peak()
    assert peak(gradient_checkpointing="on") < peak()


@pytest.mark.parametrize(
    ("raw", "options", "code", "words"),
    [
        ({"model_type": "gpt2"}, {}, ExitCode.ENVIRONMENT, "not gpt2"),
        ({"model_type": "llama"}, {}, ExitCode.MODEL, "hidden_size"),
        ({**LLAMA_2.to_dict()}, {"targets": "q_prj"}, ExitCode.MODEL, "q_proj"),
        ({**SMOL.to_dict()}, {"targets": "lm_head"}, ExitCode.MODEL, "input embedding"),
        ({**MISTRAL.to_dict(), "sliding_window": 512}, {}, ExitCode.ENVIRONMENT, "512"),
    ],
)
def test_what_the_formula_does_not_describe_is_refused(raw, options, code, words):
    settings = EstimateSettings(max_length=1024, **options)
    with pytest.raises(UserError) as caught:
        closed_form(settings, plan_run(settings, None, None, 2**17), read_sizes(raw, "model"), None)
    assert caught.value.exit_code == code
    assert words in caught.value.message + str(caught.value.hint)


def test_the_formula_loads_no_library():
    code = "import sys, ftkit.core.closed_form; print(*{'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
