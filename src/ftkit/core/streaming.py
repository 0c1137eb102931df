"""A model that runs without being in memory: each layer takes its weights from where they lie, and drops them again.

Parameters are placeholders: as large as the real ones to look at, one number in memory. That number is NaN, so whatever
uses a placeholder by mistake shows in the logits. Legend: B T batch and tokens, in out widths of a layer.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from ftkit.io.tensors import FileWeight

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Weight(Protocol):
    """A tensor that lies elsewhere."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As the parameter's."""

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(number of the first row, rows as float32) until all rows were given."""

    def pick(self, rows: Tensor) -> Tensor:
        """The rows of these numbers (n,), float32."""


def build_placeholder_model(config: Any, dtype: torch.dtype) -> Any:
    """The causal language model of a config in `dtype`, its parameters placeholders, its buffers real; frozen."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    own = type(config).from_dict(config.to_dict())
    if hasattr(own, "rescale_every"):  # RWKV halves its weights in place, for float16's sake, and an adapter's not
        own.rescale_every = 0
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(own, dtype=dtype)
    model.tie_weights()
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = made.setdefault(id(parameter), placeholder(parameter.shape, parameter.dtype))
    return model.eval()


def placeholder(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """A parameter of this shape and of one number, NaN."""
    return nn.Parameter(torch.full((), torch.nan, dtype=dtype).expand(shape), requires_grad=False)


def is_placeholder(parameter: Tensor) -> bool:
    """True for a parameter whose values lie elsewhere."""
    return parameter.numel() > 1 and not any(parameter.stride())


def stream_weights(
    model: Any,
    weights: Mapping[str, Weight],
    *,
    resident: Collection[str] = (),
    forwards: Mapping[str, Callable[[nn.Module, Tensor], Tensor]] | None = None,
) -> None:
    """Let every layer of a placeholder model take its parameters from `weights` (by parameter name) when it runs.

    Vectors, single values, convolutions (small, and often used without being called) and `resident` parameters are taken
    for good. Linear layers and embeddings never have more
    than a block of their weight in memory, others the whole of it while they run. forwards: layers that run otherwise.
    """
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            is_small = parameter.ndim < 2 or isinstance(module, CONVOLUTIONS)
            if is_placeholder(parameter) and (is_small or name in resident):
                fill(parameter, weights[name])
        own = module.named_parameters(path, recurse=False)
        left = {name.rpartition(".")[2]: weights[name] for name, parameter in own if is_placeholder(parameter)}
        if forwards is not None and path in forwards:
            module.forward = partial(forwards[path], module)
        elif left.keys() == {"weight"} and type(module) in FORWARDS:
            module.forward = partial(FORWARDS[type(module)], module, left["weight"])
        elif left:
            hold_while_running(module, module, left)


def fill(parameter: nn.Parameter, weight: Weight) -> None:
    """Give a parameter its values for good (tied ones too: they are one object)."""
    parameter.data = whole(weight).to(parameter.dtype)


def whole(weight: Weight) -> Tensor:
    """All values of a weight, float32."""
    values = torch.empty(weight.shape)
    if not weight.shape:
        return next(weight.blocks())[1].reshape(())
    for start, block in weight.blocks():
        values[start : start + len(block)] = block
    return values


def hold_while_running(outer: nn.Module, module: nn.Module, weights: Mapping[str, Weight]) -> None:
    """Give `module` the whole of these parameters for as long as each pass through `outer` lasts."""
    kept = {name: module.get_parameter(name) for name in weights}

    def take(*_: Any) -> None:
        for name, weight in weights.items():
            dtype = kept[name].dtype
            module._parameters[name] = nn.Parameter(whole(weight).to(dtype), requires_grad=False)

    def drop(*_: Any) -> None:
        module._parameters.update(kept)

    outer.register_forward_pre_hook(take)
    outer.register_forward_hook(drop, always_call=True)


def linear(module: nn.Linear, weight: Weight, x: Tensor) -> Tensor:
    """x (B, T, in) -> (B, T, out), block by block of outputs; those of a file in threads that each read and multiply."""
    rows = x.flatten(0, -2)
    result = x.new_empty(len(rows), weight.shape[0])
    threads = torch.get_num_threads()
    if isinstance(weight, FileWeight) and threads > 1:
        parts = weight.split(threads)
        for done in [workers(threads).submit(multiply, rows, part, result[:, first:]) for first, part in parts]:
            done.result()
    else:
        multiply(rows, weight, result)
    result = result.view(*x.shape[:-1], -1)
    return result if module.bias is None else result.add_(module.bias)


@lru_cache
def workers(threads: int) -> ThreadPoolExecutor:
    """Threads that each compute with one."""
    pool = ThreadPoolExecutor(threads, "multiply", partial(torch.set_num_threads, 1))
    for started in [pool.submit(time.sleep, 0.01) for _ in range(threads)]:
        started.result()
    torch.set_num_threads(threads)  # those set it for later threads, too
    return pool


@torch.no_grad()
def multiply(rows: Tensor, weight: Weight, result: Tensor) -> None:
    """Put rows (N, in) times a weight (out, in) into the first `out` columns of `result`."""
    for start, block in weight.blocks():
        torch.mm(rows, block.to(rows.dtype).T, out=result[:, start : start + len(block)])


def conv1d(module: Any, weight: Weight, x: Tensor) -> Tensor:
    """The same for GPT-2's layer, whose weight is (in, out): block by block of inputs."""
    result = x.new_zeros(*x.shape[:-1], weight.shape[1])
    for start, block in weight.blocks():
        result += x[..., start : start + len(block)] @ block.to(x.dtype)
    return result if module.bias is None else result.add_(module.bias)


def embedding(module: nn.Embedding, weight: Weight, ids: Tensor) -> Tensor:
    """ids (B, T) -> (B, T, width); only the rows that are needed are read."""
    rows, places = torch.unique(ids, return_inverse=True)
    return weight.pick(rows).to(module.weight.dtype)[places]


FORWARDS: dict[type[nn.Module], Any] = {nn.Linear: linear, Conv1D: conv1d, nn.Embedding: embedding}


def adapt_streamed(tuned: Any, weights: Mapping[str, Weight], streamed: Mapping[str, nn.Module]) -> None:
    """Make PEFT's layers around a streamed model's work: those that look into the base's weight hold it while they run,
    and copies that PEFT made of a layer run as layers of their own.

    streamed: the base's modules by name, as they were before PEFT came.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    names = {module: path for path, module in streamed.items()}
    for module in tuned.modules():
        if module not in names and isinstance(vars(module).get("forward"), partial):
            del module.forward
        base = getattr(module, "base_layer", None)
        looks = isinstance(module, TrainableTokensLayer) or getattr(module, "lora_variant", None)
        if looks and base in names and is_placeholder(base.weight):
            hold_while_running(module, base, {"weight": weights[f"{names[base]}.weight"]})
