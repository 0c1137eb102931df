"""Liger's kernels (arXiv:2410.10989) in the place of RMS norms and gated MLPs, on a CUDA card where liger-kernel is installed.

One kernel reads and writes each activation once, where transformers' own code takes several passes and keeps float32
copies. The layers of one loaded model are changed, no class of transformers, so another model in the process is itself.
Parameters, names and files stay as they are. Which form a layer has (a weight of w or 1 + w, SiLU or GELU) is found by
trying, with gradients, not by a list of architectures; what matches none keeps its own forward pass.

Not taken: its losses (ours computes logits at counted positions only, in chunks), and its rotary positions, which are
written into queries and keys in place and are a function of transformers' module, not of a layer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import nsmallest
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftkit.core.batching import make_batch
from ftkit.core.encoding import Example
from ftkit.core.packing_check import TOLERANCE, first_line, logits_of, relative_difference, tolerance_of
from ftkit.errors import is_out_of_memory

Form = Callable[[Any, Tensor], Tensor]
"""From a layer and its input (..., width) to its output."""
LONGEST = 64
"""Tokens of a row that the changed model is tried on."""


@dataclass(frozen=True)
class LigerUse:
    """How many layers run Liger's kernels; fault: why none does though they are installed."""

    norms: int = 0
    mlps: int = 0
    fault: str | None = None

    def __str__(self) -> str:
        """For the plan."""
        return (
            f"Liger kernels: {self.norms:,} norms, {self.mlps:,} gated MLPs"
            if self.fault is None
            else "no Liger kernels"
        )


def is_installed() -> bool:
    """True if liger-kernel and the compiler of its kernels are here."""
    return find_spec("liger_kernel") is not None and find_spec("triton") is not None


@torch.no_grad()
def use_liger(model: Any, examples: Sequence[Example], device: str) -> LigerUse:
    """Change a loaded model's layers where Liger's kernels give what they give; all back if its logits differ, with why."""
    was_training = model.training
    model.eval()
    changed: dict[nn.Module, str] = {}
    shortest = nsmallest(2, examples, key=lambda example: len(example.ids))
    rows = [Example(row.ids[:LONGEST], [True] * len(row.ids[:LONGEST])) for row in shortest]
    try:
        batch = make_batch(rows).to(device)
        before = logits_of(model, batch)
        for module, kind, forward in layers_to_change(model):
            module.forward = forward
            changed[module] = kind
        difference = relative_difference(logits_of(model, batch), before)
        fault = None
        if not difference <= tolerance_of(model, before.dtype):
            fault = f"the model's logits differ with them (by {difference:.1e})"
    except Exception as error:  # a library of compiled kernels, on a card where nobody tried it
        if is_out_of_memory(error):
            raise
        fault = f"they fail here ({first_line(error)})"
    finally:
        model.train(was_training)
    if fault is None:
        kinds = list(changed.values())
        return LigerUse(kinds.count("norm"), kinds.count("mlp"))
    for module in changed:
        del module.forward
    return LigerUse(fault=fault)


def layers_to_change(model: Any) -> Iterator[tuple[Any, str, Callable[[Tensor], Tensor]]]:
    """(layer, norm or mlp, its new forward pass) for all whose kind was tried and matched one of Liger's forms."""
    found: dict[Any, Form | None] = {}
    for module in list(model.modules()):
        if "forward" in vars(module):  # changed already, by us or by another library
            continue
        if is_norm(module):
            kind, width, forms = "norm", module.weight.shape[0], norm_forms()
        elif is_gated(module):
            kind, width, forms = "mlp", module.gate_proj.in_features, mlp_forms(module.act_fn)
        else:
            continue
        key = (type(module), type(getattr(module, "act_fn", None)), next(module.parameters()).dtype)
        if key not in found:
            found[key] = matching_form(module, forms, width, model.dtype)
        form = found[key]
        if form is not None:
            yield module, kind, partial(form, module)


def is_norm(module: Any) -> bool:
    """An RMS norm with one weight a feature."""
    names = [name for name, _ in module.named_parameters()]
    return type(module).__name__.endswith("RMSNorm") and names == ["weight"] and module.weight.ndim == 1


def is_gated(module: Any) -> bool:
    """down(act(gate(x)) * up(x)), by the names that transformers gives its layers."""
    names = {name for name, _ in module.named_children()}
    return {"gate_proj", "up_proj", "down_proj", "act_fn"} == names and hasattr(module.gate_proj, "in_features")


def norm_forms() -> list[Form]:
    """Llama's form, Gemma's with 1 + weight in float32, and the latter with the weight alone."""
    from liger_kernel.ops import LigerRMSNormFunction

    def form(offset: float, casting: str) -> Form:
        def forward(norm: Any, x: Tensor) -> Tensor:
            epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
            # not in place: the gradient that comes in may be another layer's, too
            out: Tensor = LigerRMSNormFunction.apply(x, norm.weight, epsilon, offset, casting, False)
            return out

        return forward

    return [form(0.0, "llama"), form(1.0, "gemma"), form(0.0, "gemma")]


def mlp_forms(activation: Callable[[Tensor], Tensor]) -> list[Form]:
    """SwiGLU or GeGLU (arXiv:2002.05202), whichever has this activation: in 32 bits, where tanh's GELU is not erf's."""
    from liger_kernel.ops import LigerGELUMulFunction, LigerSiLUMulFunction

    def form(function: Any) -> Form:
        return lambda mlp, x: mlp.down_proj(function.apply(mlp.gate_proj(x), mlp.up_proj(x)))

    x = torch.linspace(-4, 4, 33)
    known = [(F.silu(x), LigerSiLUMulFunction), (F.gelu(x, approximate="tanh"), LigerGELUMulFunction)]
    return [form(function) for values, function in known if torch.allclose(activation(x), values, rtol=0, atol=1e-6)]


def matching_form(module: Any, forms: Sequence[Form], width: int, dtype: torch.dtype) -> Form | None:
    """The form that gives the layer's output and the gradient of its input best; None if none is near enough."""
    device = next(module.parameters()).device
    differences = [form_difference(module, form, width, dtype, device) for form in forms]
    best = min(range(len(forms)), key=differences.__getitem__, default=None)
    return forms[best] if best is not None and differences[best] <= TOLERANCE[dtype] else None


@torch.enable_grad()
def form_difference(module: Any, form: Form, width: int, dtype: torch.dtype, device: torch.device) -> float:
    """The larger relative difference, of outputs and of gradients of a random input; infinite where formats differ."""
    generator = torch.Generator().manual_seed(0)  # not the run's own, which must be where it was
    x = torch.randn((2, 16, width), generator=generator).to(device, dtype).requires_grad_()
    results = []
    for run in (module, partial(form, module)):
        out = run(x)
        weights = torch.linspace(-1, 1, out.numel(), device=device, dtype=out.dtype).view_as(out)
        results.append((out.detach(), *torch.autograd.grad(out, x, weights)))
    if results[0][0].dtype != results[1][0].dtype:
        return float("inf")
    pairs = [(ours.double(), theirs.double()) for theirs, ours in zip(*results, strict=True)]
    return max(float((ours - theirs).norm() / theirs.norm().clamp(min=1e-300)) for ours, theirs in pairs)
