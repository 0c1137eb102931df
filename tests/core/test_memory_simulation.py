"""The simulated step: bytes worked out by hand, laws, design counts, and published measurements."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import BitsAndBytesConfig, LlamaConfig

from ftkit.core.adapters import count_parameters
from ftkit.core.caching_allocator import MIB, OutOfMemoryError
from ftkit.core.cuda_operators import CudaKernels, cuda_choices
from ftkit.core.memory_estimate import MemoryEstimate, Part, Phase
from ftkit.core.memory_simulation import SimulatedDevice, simulate
from ftkit.core.meta_model import build_meta_model
from ftkit.core.optimizer_memory import optimizer_memory
from ftkit.core.optimizers import make_optimizer
from ftkit.io.quantization import quantization_config

MEASURED = Path(__file__).parents[2].parent / "shared" / "memory" / "measured.csv"
WORKSPACES = 2 * 8320 * 1024
OPEN_LLAMA_3B = LlamaConfig(
    hidden_size=3200, intermediate_size=8640, num_hidden_layers=26, num_attention_heads=32, vocab_size=32000
)
SMALL = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=1024)
NF4, INT8 = (quantization_config(method, torch.bfloat16) for method in ("qlora", "int8"))
NF4_ONCE = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def with_lora(model: nn.Module, targets: list[str], r: int = 8) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    with torch.device("meta"):
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=r, target_modules=targets))


def lora_step(model: nn.Module, tokens: int = 128, rows: int = 1) -> torch.Tensor:
    ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    return model(input_ids=ids, labels=ids, use_cache=False).loss


# ---------------------------------------------------------------- by hand
class OneLayer(nn.Module):
    """A weight of 4 MiB; forward gives 1 MiB for 256 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1024, 1024, bias=False, device="meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def one_layer_step(model: nn.Module) -> torch.Tensor:
    x = torch.zeros(256, 1024, device="meta")
    target = torch.zeros(256, 1024, device="meta")
    return (model(x) * target).sum()


def test_one_layer_takes_the_bytes_that_can_be_counted_by_hand():
    estimate = simulate(OneLayer, one_layer_step, "adamw")
    weight, rows, scalar = 4 * MIB, 1 * MIB, 512
    assert estimate.loaded_bytes == weight
    # in forward, at the product: inputs, target, the output and the product itself
    states = 2 * weight + scalar  # two means and the step counter
    assert estimate.phases[Phase.FORWARD] == weight + WORKSPACES + states + 4 * rows
    # in backward: inputs, gradient of the output, gradient of the weight, the loss and its gradient
    # (the target ended with the product's own backward)
    peak = weight + WORKSPACES + states + 2 * rows + weight + 2 * scalar
    assert estimate.allocated_bytes == peak
    assert (estimate.peak_phase, estimate.peak_module) == (Phase.BACKWARD, "layer")
    assert estimate.parts[Part.TRAINED] == weight
    assert estimate.parts[Part.OPTIMIZER] == states
    assert estimate.parts[Part.WORKSPACE] == WORKSPACES
    assert (estimate.trained_parameters, estimate.total_parameters) == (1024 * 1024, 1024 * 1024)


def test_sgd_keeps_one_mean_where_adamw_keeps_two_and_a_counter():
    adamw, sgd = (simulate(OneLayer, one_layer_step, kind) for kind in ("adamw", "sgd"))
    assert sgd.parts[Part.OPTIMIZER] == 4 * MIB
    assert adamw.allocated_bytes - sgd.allocated_bytes == 4 * MIB + 512


def test_accumulated_gradients_stay_during_the_next_forward_pass():
    once, twice = (simulate(OneLayer, one_layer_step, "sgd", micro_steps=count) for count in (1, 4))
    assert twice.phases[Phase.FORWARD] - once.phases[Phase.FORWARD] == 4 * MIB
    assert twice.allocated_bytes - once.allocated_bytes == 4 * MIB, "the second gradient is added to the first"


def test_what_the_caller_keeps_is_counted_until_the_optimizer_step():
    def keeping(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.zeros(256, 1024, device="meta")
        out = model(x)
        return (out * x).sum(), out

    def dropping(model: nn.Module) -> torch.Tensor:
        return keeping(model)[0]

    kept, dropped = (simulate(OneLayer, step, "sgd") for step in (keeping, dropping))
    assert kept.allocated_bytes - dropped.allocated_bytes == MIB


def test_a_four_bit_layer_takes_half_a_byte_a_weight_and_its_scales():
    config = SMALL
    plain = build_meta_model(config, torch.bfloat16)
    packed = build_meta_model(config, torch.bfloat16, quantization=NF4)
    weights = {name: p for name, p in packed.named_parameters() if type(p).__name__ == "Params4bit"}
    assert len(weights) == 2 * 7
    down = weights["model.layers.0.mlp.down_proj.weight"]
    values = 256 * 512
    assert down.numel() == values // 2
    assert (down.absmax.numel(), down.absmax.dtype) == (values // 64, torch.uint8)
    assert (down.nested_absmax.numel(), down.nested_absmax.dtype) == (values // 64 // 256, torch.float32)
    assert packed.lm_head.weight.dtype == torch.bfloat16
    assert count_parameters(packed)[1] == count_parameters(plain)[1]


def test_eight_bits_take_one_byte_a_weight_and_one_scale_a_row():
    model = build_meta_model(SMALL, torch.bfloat16, quantization=INT8)
    weight = model.model.layers[0].mlp.down_proj.weight
    assert (weight.dtype, tuple(weight.shape), weight.SCB.numel()) == (torch.int8, (256, 512), 256)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("method", ["qlora", "int8"])
def test_the_quantised_layers_are_those_that_the_loader_quantises(tmp_path, is_tied, method):
    from transformers import AutoModelForCausalLM

    config = LlamaConfig(**{**SMALL.to_dict(), "tie_word_embeddings": is_tied, "num_hidden_layers": 1})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    settings = quantization_config(method, torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=settings, device_map={"": "cpu"}, dtype=torch.float32
    )
    ours = build_meta_model(config, torch.float32, quantization=settings)

    def describe(model: nn.Module) -> dict[str, tuple]:
        return {name: (type(p).__name__, tuple(p.shape), p.dtype) for name, p in model.named_parameters()}

    assert describe(ours) == describe(loaded)


def make_real(kind, parameters, lr):
    """What train makes of these parameters."""
    model = nn.ParameterList(parameters)
    return make_optimizer(model, kind, lr, 0.0)


@pytest.mark.parametrize("kind", ["adamw", "adamw-foreach", "adamw-8bit", "sgd", "adafactor", "lion", "lion-8bit"])
def test_the_optimizer_keeps_as_many_bytes_as_the_real_one(kind):
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((64, 128), (5000,), (16,))]
    if kind in ("adafactor", "lion", "lion-8bit", "adamw-8bit"):
        Real = partial(make_real, kind)
    else:
        Real = partial(torch.optim.SGD, momentum=0.9) if kind == "sgd" else torch.optim.AdamW
    real = Real(parameters, lr=1e-3)
    for each in parameters:
        each.grad = torch.ones_like(each)
    real.step()
    tensors = {
        value.untyped_storage().data_ptr(): value.numel() * value.element_size()
        for state in real.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and not (kind == "adamw-foreach" and key == "step")  # kept on the CPU there
    }
    assert optimizer_memory(kind, parameters).state_bytes == sum(tensors.values())


# ---------------------------------------------------------------- laws
@pytest.fixture(scope="module")
def small_estimate() -> MemoryEstimate:
    return simulate(
        lambda: with_lora(build_meta_model(SMALL, torch.bfloat16, quantization=NF4), ATTENTION),
        lora_step,
        "adamw",
        load_dtype=torch.bfloat16,
    )


def test_the_parts_add_up_to_the_peak(small_estimate):
    assert sum(small_estimate.parts.values()) == small_estimate.allocated_bytes == max(small_estimate.phases.values())
    assert small_estimate.allocated_bytes <= small_estimate.reserved_bytes
    assert small_estimate.parts[Part.QUANTISATION] > 0


def test_the_same_run_gives_the_same_bytes(small_estimate):
    again = simulate(
        lambda: with_lora(build_meta_model(SMALL, torch.bfloat16, quantization=NF4), ATTENTION),
        lora_step,
        "adamw",
        load_dtype=torch.bfloat16,
    )
    assert again == small_estimate


def test_more_rows_and_longer_rows_never_need_less():
    def peak(rows: int, tokens: int) -> int:
        model = lambda: with_lora(build_meta_model(SMALL, torch.bfloat16), ATTENTION)  # noqa: E731
        return simulate(model, lambda m: lora_step(m, tokens, rows), "adamw").allocated_bytes

    assert peak(1, 128) < peak(2, 128) < peak(4, 256)


@pytest.mark.parametrize("quantization", [None, NF4, INT8], ids=["16-bit", "4-bit", "8-bit"])
def test_checkpointing_needs_fewer_activations(quantization):
    def build(is_checkpointed: bool) -> nn.Module:
        model = build_meta_model(SMALL, torch.bfloat16, quantization=quantization)
        model.enable_input_require_grads()
        if is_checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return with_lora(model, ALL_LINEAR)

    plain, checkpointed = (
        simulate(lambda is_on=is_on: build(is_on), lambda m: lora_step(m, 512, 2), "adamw") for is_on in (False, True)
    )
    assert checkpointed.parts[Part.ACTIVATIONS] < plain.parts[Part.ACTIVATIONS]
    assert checkpointed.allocated_bytes < plain.allocated_bytes
    assert checkpointed.trained_parameters == plain.trained_parameters


def test_a_padded_batch_needs_a_mask_and_so_more_memory():
    def step(model: nn.Module) -> torch.Tensor:
        ids = torch.zeros(2, 512, dtype=torch.long, device="meta")
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss

    full, padded = (
        simulate(
            lambda: with_lora(build_meta_model(SMALL, torch.bfloat16), ATTENTION), step, "adamw", is_padded=is_padded
        )
        for is_padded in (False, True)
    )
    assert padded.allocated_bytes > full.allocated_bytes


def test_a_run_that_does_not_fit_the_card_ends_as_it_would_there():
    with pytest.raises(OutOfMemoryError):
        simulate(OneLayer, one_layer_step, "adamw", device=SimulatedDevice(capacity_bytes=40 * MIB))


def test_functions_of_torch_are_as_before_after_a_simulation():
    names = ("scaled_dot_product_attention", "dropout", "softmax", "log_softmax")
    before = [getattr(functional, name) for name in names]
    with pytest.raises(RuntimeError, match="inside"), cuda_choices(CudaKernels()):
        assert functional.dropout is not before[1]
        raise RuntimeError("inside")
    simulate(OneLayer, one_layer_step, "sgd")
    assert [getattr(functional, name) for name in names] == before


# ---------------------------------------------------------------- counts that must come out (design, section 11)
@pytest.mark.parametrize(
    ("targets", "r", "count"),
    [
        (["q_proj", "v_proj"], 8, 2_662_400),
        (["q_proj", "v_proj"], 16, 5_324_800),
        (ALL_LINEAR, 8, 12_712_960),
        ([*ALL_LINEAR, "lm_head"], 8, 12_994_560),
    ],
)
@pytest.mark.parametrize("quantization", [None, NF4, INT8], ids=["16-bit", "4-bit", "8-bit"])
def test_open_llama_3b_trains_the_published_number_of_parameters(targets, r, count, quantization):
    model = with_lora(build_meta_model(OPEN_LLAMA_3B, torch.bfloat16, quantization=quantization), targets, r)
    assert count_parameters(model) == model.get_nb_trainable_parameters()
    assert count_parameters(model)[0] == count
