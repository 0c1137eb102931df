"""A step asks the device for nothing before it is over: each question would make a GPU wait for Python.

Shown on the meta device, which has no values to give: it takes the branches of a GPU.
"""

import pytest
import torch
from architectures import config_of
from test_packed_attention import sharing_examples
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

from ftkit.core.adapters import make_trainable, trainable_parameters
from ftkit.core.batching import make_batch, pack_to_batch
from ftkit.core.loss import summed_loss
from ftkit.core.meta_model import build_meta_model
from ftkit.core.packed_attention import packed_attention
from ftkit.core.packing import make_pack
from ftkit.core.train_settings import TrainSettings
from ftkit.core.training import accumulate
from ftkit.core.training_memory import on_meta
from ftkit.core.varlen_attention import make_spans

ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "bincount")


class Questions(TorchDispatchMode):
    """Operators whose result, or the size of it, depends on values; and copies back to the computer's memory."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        on_device = any(isinstance(each, torch.Tensor) and each.is_meta for each in args)
        indexed = name == "index" and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        comes_back = name in ("_to_copy", "to") and str(kwargs.get("device", "meta")) == "cpu"
        if on_device and (name in ASKS or indexed or comes_back):
            self.asked.append(name)
            return torch.ones((), dtype=torch.bool) if name == "equal" else func(*args, **kwargs)
        return func(*args, **kwargs)


def questions_of_a_step(architecture, batch, **options):
    model = build_meta_model(config_of(architecture), torch.bfloat16)
    with torch.device("meta"):
        model = make_trainable(model, TrainSettings(r=4, **options)).train()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with packed_attention(model), Questions() as questions:
        accumulate(model, [batch, batch], summed_loss, scaler)
        clip_grad_norm_(trainable_parameters(model), 1.0)
    return questions.asked


def pack(*, in_one):
    batch = pack_to_batch(make_pack(sharing_examples(), share=True))
    if in_one:
        object.__setattr__(batch.layout, "spans", make_spans(batch.layout.lengths, batch.layout.ancestors))
    return on_meta(batch)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma2", "gpt2"])
def test_a_packed_step_asks_nothing(architecture):
    assert questions_of_a_step(architecture, pack(in_one=True)) == []


@pytest.mark.parametrize("options", [{"gradient_checkpointing": "on"}, {"dropout": 0.1}, {}], ids=str)
def test_nor_do_the_loop_padded_rows_checkpointing_and_dropout(options):
    assert questions_of_a_step("llama", pack(in_one=False), **options) == []
    assert questions_of_a_step("llama", on_meta(make_batch(sharing_examples())), **options) == []


def test_a_question_is_seen():
    places = torch.zeros(3, device="meta")
    with Questions() as questions:
        for ask in (
            lambda: places.nonzero(),
            lambda: places[places > 0],
            lambda: float(places.sum()),
            lambda: places.cpu(),
        ):
            with pytest.raises((RuntimeError, NotImplementedError)):
                ask()
    assert len(questions.asked) == 4
