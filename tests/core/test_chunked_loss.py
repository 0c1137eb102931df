"""The loss in chunks is the loss at once, with its gradients, whatever the architecture does around its output head."""

import pytest
import torch
from architectures import build_model, every_architecture
from torch.utils._python_dispatch import TorchDispatchMode

from ftkit.core import chunked_loss as chunked_loss_module
from ftkit.core import loss as loss_module
from ftkit.core.adapters import make_trainable, trainable_parameters
from ftkit.core.batching import make_batch, packed_batches
from ftkit.core.chunked_loss import SMALLEST_CHUNK, GradientOnTheWay, Targets, chunk_size
from ftkit.core.encoding import Example
from ftkit.core.loss import summed_loss
from ftkit.core.packed_attention import packed_attention
from ftkit.core.train_settings import TrainSettings

SETTINGS = {
    "lora": TrainSettings(r=4, dtype="fp32"),
    "full": TrainSettings(full=True),
    "head": TrainSettings(r=4, targets="all-linear,lm_head"),
    "checkpointed": TrainSettings(r=4, gradient_checkpointing="on"),
}


def examples():
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in (17, 9, 12, 31)]
    return [Example(ids, [False] * 4 + [True] * (len(ids) - 4)) for ids in rows]


def loss_and_gradients(model, batch, size, monkeypatch):
    monkeypatch.setattr(loss_module, "chunk_size", lambda _: size)
    model.zero_grad()
    loss = summed_loss(model, batch)
    (loss / 7).backward()
    return float(loss.detach()), [p.grad for p in trainable_parameters(model)]


def trained_model(architecture, settings, dtype=torch.float64):
    model = make_trainable(build_model(architecture, dtype), settings)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train() if settings.gradient_checkpointing == "on" else model.eval()


@pytest.mark.parametrize("size", [1, 8, 20])
@every_architecture
def test_chunks_are_the_whole(architecture, size, monkeypatch):
    model, batch = trained_model(architecture, SETTINGS["lora"]), make_batch(examples())
    loss, gradients = loss_and_gradients(model, batch, 10_000, monkeypatch)
    in_chunks, gradients_in_chunks = loss_and_gradients(model, batch, size, monkeypatch)
    assert in_chunks == pytest.approx(loss, rel=1e-10)
    for a, b in zip(gradients_in_chunks, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", list(SETTINGS))
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gemma2", "cohere"])
def test_chunks_are_the_whole_for_every_method(architecture, method, monkeypatch):
    if method == "head" and architecture != "llama":
        pytest.skip("a tied output head cannot be a target")
    model, rows = trained_model(architecture, SETTINGS[method]), examples()
    with packed_attention(model):
        (batch,) = packed_batches(rows, 1000, share=True)
        loss, gradients = loss_and_gradients(model, batch, 10_000, monkeypatch)
        in_chunks, gradients_in_chunks = loss_and_gradients(model, batch, 8, monkeypatch)
    assert in_chunks == pytest.approx(loss, rel=1e-10) and len(gradients) > 4
    for a, b in zip(gradients_in_chunks, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class WidestLogits(TorchDispatchMode):
    """The most rows of any tensor whose last dimension is the vocabulary, in the passes that it watches."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        result = operator(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor) and result.ndim >= 2 and result.shape[-1] == 64:
            self.rows = max(self.rows, result.numel() // 64)
        return result


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_logits_of_all_positions_never_exist_at_once(training, monkeypatch):
    model, batch = trained_model("llama", SETTINGS["lora"]), make_batch(examples())
    assert batch.counted.numel() == 53
    widest = []
    for size in (10_000, 8):
        monkeypatch.setattr(loss_module, "chunk_size", lambda _, size=size: size)
        with torch.set_grad_enabled(training), WidestLogits() as watch:
            loss = summed_loss(model, batch)
            if training:
                loss.backward()
        widest.append(watch.rows)
    assert widest[0] == 53 and widest[1] == 32  # that is the head's weight, transposed


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("cached", [1, 300, 10_000])
def test_nats_in_cache_are_torchs_cross_entropy(dtype, tolerance, cached, monkeypatch):
    monkeypatch.setattr(chunked_loss_module, "CACHED_LOGITS", cached)
    generator = torch.Generator().manual_seed(2)
    logits = (20 * torch.randn(11, 100, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, 100, (11,), generator=generator)
    exact = logits.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(exact, labels, reduction="sum").mul(0.3).backward()
    Targets(labels).nats(logits).mul(0.3).backward()
    nats = torch.nn.functional.cross_entropy(exact, labels, reduction="sum")
    assert Targets(labels).nats(logits).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(Targets(labels).nats(logits).double(), nats, rtol=1e-6 if dtype != torch.float64 else 1e-12)
    assert logits.grad.dtype == dtype
    assert torch.allclose(logits.grad.double(), exact.grad, rtol=tolerance, atol=tolerance * 0.01)


def test_a_logit_that_is_no_number_makes_the_loss_none():
    logits = torch.tensor([[0.0, float("nan"), 1.0], [0.0, 1.0, 2.0]])
    assert Targets(torch.tensor([0, 1])).nats(logits).isnan()


def test_the_body_is_as_before(monkeypatch):
    model, batch = trained_model("llama", SETTINGS["lora"]), make_batch(examples())
    before = model(input_ids=batch.input_ids).logits
    loss_and_gradients(model, batch, 8, monkeypatch)
    assert torch.equal(model(input_ids=batch.input_ids).logits, before)
    assert not any("forward" in vars(module) for module in model.modules() if not hasattr(module, "lora_A"))


def test_a_body_that_the_model_does_not_call_is_no_obstacle(monkeypatch):
    model, batch = build_model("llama"), make_batch(examples())
    whole = float(summed_loss(model, batch))
    monkeypatch.setattr(model, "get_decoder", lambda: torch.nn.Identity())
    monkeypatch.setattr(loss_module, "chunk_size", lambda _: 8)
    assert float(summed_loss(model, batch)) == pytest.approx(whole, rel=1e-6)


def test_chunks_hold_some_hundred_positions():
    assert (chunk_size(32_000), chunk_size(151_936), chunk_size(512)) == (1048, SMALLEST_CHUNK, 65_536)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_answer_that_the_model_finds_all_but_impossible_has_a_finite_loss_and_gradient(dtype):
    logits = torch.tensor([[300.0, -100.0, 0.0], [0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    labels = torch.tensor([1, 2])
    loss = Targets(labels).nats(logits)
    loss.backward()
    other = logits.detach().clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(
        other.to(torch.promote_types(dtype, torch.float32)), labels, reduction="sum"
    )
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6) and float(loss) > 400
    torch.testing.assert_close(logits.grad, other.grad)


@pytest.mark.parametrize("cached", [True, False], ids=["in cache", "as on a card"])
def test_a_scale_beyond_float16_reaches_gradients_that_are_within_it(cached):
    generator = torch.Generator().manual_seed(3)
    hidden, head = (torch.randn(count, 16, generator=generator) / 100 for count in (4, 50))
    targets = Targets(torch.randint(0, len(head), (4,), generator=generator))

    def nats_of(rows, chosen):
        logits = rows @ head.to(rows.dtype).T
        return chosen.nats(logits) if cached else torch.nn.functional.cross_entropy(logits.float(), chosen.labels)

    def gradient(dtype):
        leaf = hidden.to(dtype).requires_grad_()
        (found,) = torch.autograd.grad(GradientOnTheWay.apply(leaf, targets, nats_of, 2) * 2.0**17, leaf)
        assert found.dtype == dtype
        return found.double()

    torch.testing.assert_close(gradient(torch.float16), gradient(torch.float64), rtol=0.01, atol=5)
