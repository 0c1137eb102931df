"""Rows in a pack have the loss and the gradients that they have alone, whatever the architecture."""

import random
from types import SimpleNamespace

import pytest
import torch
from architectures import ARCHITECTURES, CONTEXT, GROUPED, UNTIED, build_model, config_of
from transformers import AutoModelForCausalLM, GPTNeoConfig, Phi3Config

import ftkit.core.compiled_shapes as compiled_shapes
import ftkit.core.packing_check as packing_check
import ftkit.core.tree_attention as tree_module
from ftkit.core.adapters import make_trainable, trainable_parameters
from ftkit.core.batching import make_batch, micro_batches, packed_batches
from ftkit.core.encoding import Example
from ftkit.core.loss import mean_loss, summed_loss
from ftkit.core.objectives import noisy_embeddings
from ftkit.core.packed_attention import NAME, packed_attention
from ftkit.core.packing import SHORTEST_SHARED, shared_length
from ftkit.core.packing_check import packing_fault, rows_to_check
from ftkit.core.train_settings import TrainSettings
from ftkit.core.tree_attention import tree_attention

OWN_ATTENTION = ("gpt-neo", "falcon")
MORE = {
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", {**GROUPED, **UNTIED}),
    "olmo2": ("Olmo2Config", {**GROUPED, **UNTIED}),
}
PACKED = [name for name in [*ARCHITECTURES, *MORE] if name not in OWN_ATTENTION]


@pytest.fixture(autouse=True)
def more_architectures(monkeypatch):
    for name, known in MORE.items():
        monkeypatch.setitem(ARCHITECTURES, name, known)


def sharing_examples(vocabulary=64, longest=60):
    """Rows behind nested starts, rows of their own, equal rows, a row that begins another, rows trained from token 1."""
    draw = random.Random(7)

    def some(count):
        return [draw.randrange(3, vocabulary) for _ in range(count)]

    start = some(20)
    longer = start + some(18)
    rows = [(stem, some(draw.randrange(3, 20))) for stem in (start, start, longer, longer, longer, [5], [6])]
    examples = [Example(stem + rest, [False] * len(stem) + [True] * len(rest)) for stem, rest in rows]
    examples += [examples[2], Example(longer[:30], [False] * 20 + [True] * 10), Example(longer, [True] * len(longer))]
    assert max(len(e.ids) for e in examples) <= longest
    return examples


def loss_and_gradients(model, batches):
    """Summed over batches: (nats, all gradients of what is trained, as one vector)."""
    model.zero_grad()
    nats = 0.0
    for batch in batches:
        loss = summed_loss(model, batch)
        loss.backward()
        nats += float(loss.detach())
    return nats, torch.cat([p.grad.flatten() for p in trainable_parameters(model)])


def packed_loss_and_gradients(model, examples, budget=120, *, share=True):
    with packed_attention(model):
        return loss_and_gradients(model, packed_batches(examples, budget, share=share))


def assert_same(ours, theirs, loss=1e-12, gradients=1e-6):
    assert ours[0] == pytest.approx(theirs[0], rel=loss)
    assert float((ours[1] - theirs[1]).norm() / theirs[1].norm()) < gradients


@pytest.mark.parametrize("architecture", PACKED)
def test_packed_rows_with_and_without_sharing_are_padded_rows_and_rows_alone(architecture):
    """float64. Gradients to 1e-6 and not better: tables of positions are float32 in transformers."""
    model, examples = build_model(architecture, torch.float64), sharing_examples()
    alone = loss_and_gradients(model, micro_batches(examples, 1))
    # Gemma 2's own attention softmaxes in float32, ours in what is narrower of that and the model's
    exact = 1e-7 if architecture == "gemma2" else 1e-12
    for budget in (60, 120, 10_000):
        for share in (True, False):
            assert_same(packed_loss_and_gradients(model, examples, budget, share=share), alone, loss=exact)
    assert_same(loss_and_gradients(model, micro_batches(examples, 4)), alone, loss=1e-7)


@pytest.mark.parametrize("architecture", PACKED)
def test_packs_that_are_filled_up_to_lengths_that_come_again_count_the_same(architecture, monkeypatch):
    """As for bfloat16 on a CPU, where oneDNN compiles a kernel for each length, here in float64; its attention with it."""
    model, examples = build_model(architecture, torch.float64), sharing_examples()
    alone = loss_and_gradients(model, micro_batches(examples, 1))
    for module in (compiled_shapes, tree_module):
        monkeypatch.setattr(module, "is_compiled", lambda _: True)
    lengths = set()
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: lengths.add(given[0].shape[1]))
    for share in (True, False):
        filled = packed_loss_and_gradients(model, examples, share=share)
        assert_same(filled, alone, loss=1e-7 if architecture == "gemma2" else 1e-12)
    hook.remove()
    assert {length % compiled_shapes.PACK_MULTIPLE for length in lengths} == {0}


def test_noise_on_embeddings_is_that_of_the_rows_in_a_pack_that_is_filled_up(monkeypatch):
    model = build_model("llama", torch.float64)
    batch = packed_batches(sharing_examples(), 10_000, share=False)[0]
    monkeypatch.setattr(compiled_shapes, "is_compiled", lambda _: True)
    with packed_attention(model), noisy_embeddings(model, batch, 5.0):
        assert torch.isfinite(summed_loss(model, batch))


def test_sharing_feeds_fewer_tokens():
    examples = sharing_examples()
    shared, apart = (packed_batches(examples, 10_000, share=share)[0] for share in (True, False))
    assert shared.input_ids.numel() < 0.5 * apart.input_ids.numel() and shared.tokens == apart.tokens
    assert shared.counted.numel() == apart.counted.numel() == sum(sum(e.counted[1:]) for e in examples)


@pytest.mark.parametrize("window", [1, 5, 19, 20, 21, 39, 1000])
def test_windows_reach_over_shared_starts(window):
    config = config_of("mistral")
    config.sliding_window = window
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    examples = sharing_examples()
    assert_same(packed_loss_and_gradients(model, examples), loss_and_gradients(model, micro_batches(examples, 1)))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_recomputed_activations_know_the_pack(architecture):
    model, examples = build_model(architecture, torch.float64), sharing_examples()
    model = make_trainable(model, TrainSettings(r=4, gradient_checkpointing="on"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    for module in model.modules():  # no dropout, but training mode: activations are recomputed in no other
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attn_dropout") and isinstance(module.attn_dropout, float):
            module.attn_dropout = 0.0
    alone = loss_and_gradients(model.eval(), micro_batches(examples, 1))
    calls = []

    def counting(*inputs, **options):
        calls.append(options["layout"])
        return tree_attention(*inputs, **options)

    model.train()
    batches = packed_batches(examples, 10_000, share=True)
    with packed_attention(model, counting):
        packed = loss_and_gradients(model, batches)
    assert calls == [batches[0].layout] * 4  # two layers, each in the forward and again in the backward pass
    assert_same(packed, alone, loss=1e-6, gradients=1e-5)  # the adapter is float32


def test_dropout_in_attention_is_the_architectures_own():
    """In a pack it is drawn in another order, so only its presence can be tested."""
    model, examples = build_model("gpt2").train(), sharing_examples()
    with packed_attention(model), torch.no_grad():
        batch = packed_batches(examples, 10_000, share=True)[0]
        first, second = (float(summed_loss(model, batch)) for _ in range(2))
        torch.manual_seed(3)
        seeded = float(summed_loss(model, batch))
        torch.manual_seed(3)
        assert float(summed_loss(model, batch)) == seeded and first != second


# ---------------------------------------------------------------- on and off
def test_the_configs_are_as_before_also_after_an_error():
    model = build_model("llama")
    before = model.config.to_dict(), model.config._attn_implementation
    with pytest.raises(RuntimeError), packed_attention(model):
        assert model.config._attn_implementation == NAME and NAME not in model.config.to_json_string()
        raise RuntimeError
    assert (model.config.to_dict(), model.config._attn_implementation) == before


def test_padded_batches_keep_working_inside():
    model, examples = build_model("mistral"), sharing_examples()
    batches = micro_batches(examples, 4)
    outside = mean_loss(model, batches, "cpu")
    with packed_attention(model):
        inside = mean_loss(model, batches, "cpu")
        packed = mean_loss(model, packed_batches(examples, 100, share=True), "cpu")
    assert inside == pytest.approx(outside, rel=1e-6) and packed == pytest.approx(outside, rel=1e-6)


def test_a_pack_outside_is_a_fault_of_ours_and_not_a_wrong_loss():
    with pytest.raises(AssertionError, match="see each other"):
        summed_loss(build_model("llama"), packed_batches(sharing_examples(), 100, share=True)[0])


# ---------------------------------------------------------------- the check before training
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("architecture", PACKED)
def test_architectures_that_honour_packs_pass_the_check(architecture, dtype):
    model = build_model(architecture, dtype).train()
    assert packing_fault(model, sharing_examples(), "cpu") is None
    assert model.training and model.config._attn_implementation != NAME


def test_architectures_with_their_own_attention_do_not():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 512}
    config = GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]], window_size=6)
    model = AutoModelForCausalLM.from_config(config)
    assert packing_fault(model, sharing_examples(), "cpu") == "it brings its own attention"
    assert packing_fault(build_model("falcon"), sharing_examples(), "cpu") is not None


@pytest.mark.parametrize("ignored", ["positions", "layout", "window"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 0.02), (torch.bfloat16, 0.2)], ids=["fp32", "bf16"])
def test_an_architecture_that_ignores_something_is_found_out(ignored, dtype, size, monkeypatch):
    """Weights of 0.02 are those of a model before training: what other rows say moves its logits little."""
    config = config_of("mistral")
    config.initializer_range, config.sliding_window = size, 12
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)

    def careless(module, *inputs, layout=None, sliding_window=None, **options):
        if ignored == "layout":
            layout = None
        return tree_attention(
            module, *inputs, layout=layout, sliding_window=None if ignored == "window" else sliding_window, **options
        )

    if ignored == "positions":
        forward = model.forward
        monkeypatch.setattr(model, "forward", lambda **inputs: forward(**{**inputs, "position_ids": None}))
    else:
        monkeypatch.setattr(packing_check, "tree_attention", careless)
    assert "other logits" in packing_fault(model, sharing_examples(), "cpu")


def test_the_checked_rows_share_a_start_and_go_beyond_the_window():
    examples = sharing_examples()
    rows = rows_to_check(examples, 30)
    assert len(rows) == 5 and len(rows[4].ids) == min(len(e.ids) for e in examples if len(e.ids) > 31)
    assert shared_length(rows[2], rows[3]) >= SHORTEST_SHARED and all(all(row.counted) for row in rows)
    assert max(len(row.ids) for row in rows) <= max(len(e.ids) for e in examples)
    assert len(rows_to_check(examples[:1], None)) == 4


def test_long_rope_counts_positions_not_the_length_of_the_pack():
    """Phi-3 changes its table beyond the length that it was first trained with."""
    half = 4
    config = Phi3Config(
        **{**GROUPED, **UNTIED, **CONTEXT, "max_position_embeddings": 128},
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope", "short_factor": [1.0] * half, "long_factor": [4.0] * half, "rope_theta": 10000.0,
            "original_max_position_embeddings": 64,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    examples = sharing_examples()
    assert_same(
        packed_loss_and_gradients(model, examples, 10_000), loss_and_gradients(model, micro_batches(examples, 1))
    )


def test_a_batch_of_padded_rows_says_nothing_of_packs():
    assert make_batch(sharing_examples()).packing == {}


@pytest.mark.parametrize(
    ("device", "mask", "size", "has_kernel", "copies"),
    [
        ("cpu", None, 4, False, False),
        ("cuda", None, 2, True, False),
        ("cuda", "mask", 2, True, True),
        ("cuda", None, 4, True, True),
        ("cuda", None, 2, False, True),
    ],
)
def test_shared_key_heads_are_copied_where_a_card_would_else_hold_all_pairs(
    device, mask, size, has_kernel, copies, monkeypatch
):
    monkeypatch.setattr(tree_module, "has_kernel", lambda: has_kernel)
    query = SimpleNamespace(device=SimpleNamespace(type=device), element_size=lambda: size, shape=(1, 4, 8, 64))
    assert tree_module.needs_copies(query, mask) is copies


def test_attention_with_copied_key_heads_is_the_same(monkeypatch):
    model, examples = build_model("qwen2", torch.float64), sharing_examples()
    alone = packed_loss_and_gradients(model, examples)
    monkeypatch.setattr(tree_module, "needs_copies", lambda *_: True)
    assert_same(packed_loss_and_gradients(model, examples), alone)
