"""What becomes of each tensor of the base in a merge, decided before any weight is read."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ftkit.core.checkpoint_names import parameter_names
from ftkit.core.merging import adapter_rank, adapter_scale
from ftkit.errors import ExitCode, UserError
from ftkit.io.adapter_weights import Adapter, Pair
from ftkit.io.shards import NewTensor, TensorPlace
from ftkit.io.tensors import FLOATS

OTHER_BASE = "give the base that the adapter was trained on"


@dataclass(frozen=True)
class Step:
    """One tensor of the base, and what is done to it, in this order.

    replaced_by: a whole tensor of the adapter. quantised: name of the layer that training saw quantised (its values
    become those). pair, scale: the update that is added. transposed: the weight lies as (in, out).
    dtype: of the result, as safetensors names it.
    """

    name: str
    place: TensorPlace
    dtype: str
    replaced_by: TensorPlace | None = None
    quantised: str | None = None
    pair: Pair | None = None
    scale: float = 0.0
    transposed: bool = False

    @property
    def changes(self) -> bool:
        """True if values, not only their format, may become others."""
        return self.replaced_by is not None or self.quantised is not None or self.pair is not None

    @property
    def result(self) -> NewTensor:
        """The tensor that is written."""
        return NewTensor(self.name, self.dtype, self.place.shape)


def plan_merge(
    model: Any,
    layout: Mapping[str, TensorPlace],
    adapter: Adapter,
    *,
    quantised: Collection[str] = (),
    dtype: str | None = None,
) -> list[Step]:
    """A step for every tensor of the base's files, by name.

    model: the base on the meta device. quantised: layers to take as training saw them. dtype: of the result as
    safetensors names it; None keeps each tensor's. Whatever does not land on exactly one tensor is exit 4.
    """
    parameters = parameter_names(model, layout)
    owners: dict[str, list[str]] = {}
    for name, parameter in parameters.items():
        owners.setdefault(parameter, []).append(name)
    changes: dict[str, dict[str, Any]] = {}
    for parameter, place in adapter.saved.items():
        name = owner_of(parameter, owners, model)
        check_shape(parameter, layout[name].shape, place.shape)
        changes.setdefault(name, {})["replaced_by"] = place
    for layer in quantised:
        name = owner_of(f"{layer}.weight", owners, model)
        changes.setdefault(name, {}).update(quantised=layer, transposed=is_transposed(layer, find_layer(layer, model)))
    for layer, pair in adapter.pairs.items():
        update = plan_update(layer, pair, adapter.config, model)
        name = owner_of(f"{layer}.weight", owners, model)
        shape = (pair.b.shape[0], pair.a.shape[1])
        check_shape(layer, layout[name].shape, shape[::-1] if update["transposed"] else shape)
        changes.setdefault(name, {}).update(update)
    return [
        Step(
            name,
            place,
            dtype if dtype and name in parameters and place.dtype in FLOATS else place.dtype,
            **changes.get(name, {}),
        )
        for name, place in sorted(layout.items())
    ]


def plan_update(layer: str, pair: Pair, config: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The update of one adapted layer; which way its weight lies is asked of the base's layer."""
    module = find_layer(layer, model)
    rank = adapter_rank(config, layer)
    if pair.a.shape[0] != rank:
        raise UserError(
            f"the adapter's layer '{layer}' has rank {pair.a.shape[0]}, its config says {rank}", ExitCode.MODEL
        )
    return {"pair": pair, "scale": adapter_scale(config, layer), "transposed": is_transposed(layer, module)}


def find_layer(layer: str, model: Any) -> nn.Module:
    """A layer of the base by name."""
    try:
        module: nn.Module = model.get_submodule(layer)
    except AttributeError:
        raise UserError(
            f"the base has no layer '{layer}', which the adapter changes", ExitCode.MODEL, hint=OTHER_BASE
        ) from None
    return module


def is_transposed(layer: str, module: nn.Module) -> bool:
    """True where the weight lies as (in, out). The class decides: adapter_config's fan_in_fan_out is often wrong."""
    if isinstance(module, Conv1D | nn.Embedding):
        return True
    if isinstance(module, nn.Linear):
        return False
    raise UserError(f"ftkit does not merge into '{layer}', a {type(module).__name__}", ExitCode.MODEL)


def owner_of(parameter: str, owners: Mapping[str, list[str]], model: Any) -> str:
    """The one tensor of the base's files that a parameter of the model is loaded from."""
    tied = tied_with(parameter, model)
    if tied:
        raise UserError(
            f"the adapter changes '{parameter}', which is one tensor with '{tied}': merged, it would change both",
            ExitCode.MODEL,
            hint="use the adapter unmerged, or train without it: --targets all-linear",
        )  # fmt: skip
    found = owners.get(parameter, [])
    if not found and parameter not in model.state_dict():
        raise UserError(f"the base has no '{parameter}', which the adapter changes", ExitCode.MODEL, hint=OTHER_BASE)
    if len(found) != 1:
        what = (
            f"is in the base's files twice: {', '.join(found)}"
            if found
            else "is not one tensor of the base's files, but made while loading"
        )
        raise UserError(f"'{parameter}', which the adapter changes, {what}", ExitCode.MODEL)
    return found[0]


def tied_with(parameter: str, model: Any) -> str | None:
    """The other name of a parameter that the model has under two names."""
    pairs = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return pairs.get(parameter) or next((target for target, source in pairs.items() if source == parameter), None)


def check_shape(name: str, expected: tuple[int, ...], given: tuple[int, ...]) -> None:
    """Exit 4 with both shapes where they differ."""
    if expected != given:
        raise UserError(
            f"'{name}' is {list(expected)} in the base, {list(given)} in the adapter", ExitCode.MODEL, hint=OTHER_BASE
        )


def total_bytes(steps: list[Step]) -> int:
    """Size of the merged weights."""
    return sum(step.result.nbytes for step in steps)


def main_dtype(steps: list[Step]) -> str:
    """The format of most bytes of the result: what config.json names."""
    sizes: dict[str, int] = {}
    for step in steps:
        if step.dtype in FLOATS:
            sizes[step.dtype] = sizes.get(step.dtype, 0) + step.result.nbytes
    return max(sizes, key=lambda name: (sizes[name], name))


def coarsest_dtype(steps: list[Step]) -> str:
    """The least exact format that a changed value was rounded to: it decides the limits of the proof."""
    order = ["F64", "F32", "F16", "BF16"]
    rounded = [step.dtype for step in steps if step.changes or step.dtype != step.place.dtype]
    return max(rounded, key=order.index) if rounded else "F32"
