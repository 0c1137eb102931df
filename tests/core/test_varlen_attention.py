"""One call for a pack is the loop over its segments. The kernel itself runs on a card only: here stands what it documents."""

from dataclasses import replace

import pytest
import torch
from architectures import build_model, config_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packed_attention import assert_same, packed_loss_and_gradients, sharing_examples
from torch.nn.attention import varlen
from transformers import AutoModelForCausalLM

from ftkit.core import packing_check, tree_attention, varlen_attention
from ftkit.core.batching import pack_to_batch
from ftkit.core.packing import Segment, make_pack
from ftkit.core.packing_check import Call, call_of, kernel_fault, packing_fault
from ftkit.core.tree_attention import Layout, make_layout, segment_attention
from ftkit.core.varlen_attention import fits_kernel, make_spans

FLOAT64 = {"dtype": torch.float64}


def kernel(q, k, v, starts_q, starts_k, most_q, most_k, *, scale, window_size, enable_gqa):
    """As torch documents varlen_attn: causal from the lower right corner, (W, 0) tokens beside itself."""
    left, right = window_size
    assert right == 0 and enable_gqa and starts_q.dtype == starts_k.dtype == torch.int32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts = []
    for at in range(len(starts_q) - 1):
        mine, theirs = (slice(int(s[at]), int(s[at + 1])) for s in (starts_q, starts_k))
        rows, columns = mine.stop - mine.start, theirs.stop - theirs.start
        assert rows <= most_q and columns <= most_k
        back = (torch.arange(rows)[:, None] + columns - rows) - torch.arange(columns)[None, :]
        seen = (back >= 0) if left < 0 else (back >= 0) & (back <= left)
        keys, values = (t[theirs].repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[mine], keys) * scale
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(parts)


@pytest.fixture
def with_kernel(monkeypatch):
    """Packs are attended to in one call here, in any format, and nothing is refused."""
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(varlen_attention, "REFUSED", [])
    monkeypatch.setattr(packing_check, "REFUSED", varlen_attention.REFUSED)
    monkeypatch.setattr(tree_attention, "is_used_on", lambda device: not varlen_attention.REFUSED)

    def fits(query, value, dropout, softcap):
        return not dropout and softcap is None

    monkeypatch.setattr(tree_attention, "fits_kernel", fits)
    monkeypatch.setattr(packing_check, "fits_kernel", fits)


@st.composite
def forests(draw):
    """Segments of a pack, each below an earlier one or none."""
    segments = []
    for number in range(draw(st.integers(1, 7))):
        parent = draw(st.integers(-1, number - 1))
        depth = 0 if parent < 0 else segments[parent].depth + segments[parent].length
        segments.append(Segment(0, draw(st.integers(1, 9)), depth, parent))
    return segments


@given(forests(), st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.sampled_from([None, 1, 2, 5, 1000]))
@settings(max_examples=60, deadline=None)
def test_one_call_is_the_loop_over_segments(segments, heads, window):
    layout = make_layout(segments)
    spans, tokens = make_spans(layout.lengths, layout.ancestors), sum(layout.lengths)
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = (
        torch.randn(1, count, tokens, 8, generator=generator, **FLOAT64).requires_grad_()
        for count in (heads[0], heads[1], heads[1], heads[0])
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", kernel)
        ours = varlen_attention.varlen_attention(q, k, v, spans, 0.3, window)
    theirs = segment_attention(q, k, v, layout, 0.3, 0.0, window, None)
    weights = upstream.detach().transpose(1, 2)
    for a, b in zip(
        [ours, *torch.autograd.grad(ours, (q, k, v), weights)],
        [theirs, *torch.autograd.grad(theirs, (q, k, v), weights)],
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_spans_by_hand():
    spans = make_spans((3, 2, 1, 2), ((), (0,), (0, 1), ()))
    assert spans.query_starts.tolist() == [0, 3, 5, 6, 8] and spans.key_starts.tolist() == [0, 3, 8, 14, 16]
    assert spans.places.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7]
    assert (spans.longest_query, spans.longest_keys) == (3, 6)
    assert make_spans((3, 2), ((), ())).places is None, "nothing shared, nothing gathered"


def test_gradients_of_a_shared_token_are_summed_in_float32():
    """In bfloat16, 256 + 1 is 256: a start that many rows share would learn from the first ones only."""
    rows = torch.ones(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    places = torch.zeros(600, dtype=torch.int64)
    varlen_attention.Gathered.apply(rows, places).sum().backward()
    assert float(rows.grad) == 600


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt-neox", "gemma2"])
def test_losses_and_gradients_of_a_model_are_those_of_the_loop(architecture, with_kernel, monkeypatch):
    """Gemma 2 asks for a soft cap, which the kernel has not: it stays with the loop."""
    model, examples = build_model(architecture, torch.float64), sharing_examples()
    calls = []
    monkeypatch.setattr(varlen, "varlen_attn", lambda *inputs, **options: calls.append(1) or kernel(*inputs, **options))
    if architecture == "gemma2":
        monkeypatch.setattr(tree_attention, "fits_kernel", fits_kernel)

    def on(self, device):
        return self if self.spans else replace(self, spans=make_spans(self.lengths, self.ancestors))

    with monkeypatch.context() as patch:
        patch.setattr("ftkit.core.batching.make_layout", lambda segments: on(make_layout(segments), "cpu"))
        ours = packed_loss_and_gradients(model, examples)
    assert bool(calls) == (architecture != "gemma2")
    assert_same(ours, packed_loss_and_gradients(model, examples), loss=1e-12, gradients=1e-10)


def test_what_the_kernel_does_not_take_is_the_loops():
    q = torch.empty(1, 4, 5, 16, dtype=torch.bfloat16)
    assert fits_kernel(q, q, 0.0, None)
    assert not fits_kernel(q, q, 0.1, None) and not fits_kernel(q, q, 0.0, 50.0)
    assert not fits_kernel(q.float(), q.float(), 0.0, None) and not fits_kernel(q, q[..., :8], 0.0, None)
    for width in (12, 264):
        wide = torch.empty(1, 4, 5, width, dtype=torch.bfloat16)
        assert not fits_kernel(wide, wide, 0.0, None)


def test_only_a_card_with_the_kernel_gets_spans():
    batch = pack_to_batch(make_pack(sharing_examples(), share=True))
    assert batch.to("cpu") is batch and batch.layout.spans is None and batch.layout.on("mps").spans is None


# ---------------------------------------------------------------- the check before training
def test_a_kernel_that_is_right_is_used(with_kernel):
    said = []
    assert packing_fault(build_model("mistral"), sharing_examples(), "cpu", said.append) is None
    assert said == [] == varlen_attention.REFUSED


def wrong(change):
    """The kernel, with one thing other than documented."""

    def changed(*inputs, **options):
        return change(kernel, inputs, options)

    return changed


def upper_left(right, inputs, options):
    """Causal from the other corner."""
    q, k, v, starts_q, starts_k, *most = inputs
    keys = [torch.arange(int(a), int(a) + int(n)) for a, n in zip(starts_k[:-1], starts_q.diff(), strict=True)]
    places = torch.cat(keys)
    return right(q, k[places], v[places], starts_q, starts_q, *most, **options)


def wide_window(right, inputs, options):
    left, edge = options["window_size"]
    return right(*inputs, **{**options, "window_size": (left + 1 if left >= 0 else left, edge)})


def no_gradient(right, inputs, options):
    q, k, v, *rest = inputs
    return right(q, k, v.detach() + 0 * v, *rest, **options)


def failing(right, inputs, options):
    raise NotImplementedError("no kernel image is available for execution on the device")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (upper_left, "other logits"),
        (wide_window, "other"),
        (no_gradient, "other numbers or gradients"),
        (failing, "no kernel image"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_kernel_that_is_wrong_is_refused_said_and_the_rows_stay_packed(change, why, dtype, with_kernel, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", wrong(change))
    said = []
    model = build_model("mistral", dtype)
    assert packing_fault(model, sharing_examples(), "cpu", said.append) is None
    assert len(said) == 1 and "segment by segment" in said[0] and why in said[0]
    assert len(varlen_attention.REFUSED) == 1
    assert packing_fault(model, sharing_examples(), "cpu", said.append) is None and len(said) == 1, "once is enough"


def test_a_model_that_ignores_packs_says_nothing_of_the_kernel(with_kernel, monkeypatch):
    config = config_of("mistral")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: forward(**{**inputs, "position_ids": None}))
    said = []
    assert "other logits" in packing_fault(model, sharing_examples(), "cpu", said.append)
    assert said == [] == varlen_attention.REFUSED


def test_the_check_leaves_the_random_state_alone(with_kernel):
    call = Call(4, 2, 8, torch.float32, None, None, in_one=True)
    before = torch.get_rng_state()
    assert kernel_fault([call], "cpu") is None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_call_is_told_apart_by_what_the_kernel_is_asked_for(with_kernel):
    q, k = torch.empty(1, 4, 5, 8), torch.empty(1, 2, 5, 8)
    layout = Layout((5,), ((),)).on("cpu")
    plain = call_of(q, k, k, {"layout": layout, "scaling": 0.5})
    assert plain == Call(4, 2, 8, torch.float32, 0.5, None, in_one=True)
    assert not call_of(q, k, k, {"layout": layout, "softcap": 5.0}).in_one
    assert not call_of(q, k, k, {"layout": Layout((5,), ((),))}).in_one and not call_of(q, k, k, {}).in_one
