"""What becomes of each tensor of the base in a merge, decided before any weight is read."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ftkit.core.checkpoint_names import Piece, joined_names, parameter_names
from ftkit.core.layer_merging import PeftLayers, Update, merged_by_peft, merged_piece
from ftkit.core.merging import adapter_rank, adapter_scale
from ftkit.errors import ExitCode, UserError
from ftkit.io.adapter_weights import Adapter, Pair, Rows
from ftkit.io.shards import NewTensor, TensorPlace
from ftkit.io.tensors import FLOATS

OTHER_BASE = "give the base that the adapter was trained on"


@dataclass(frozen=True)
class Step:
    """One tensor of the base, and what is done to it, in this order.

    replaced_by: a whole tensor of the adapter. quantised: name of the layer that training saw quantised (its values
    become those). pair, scale: the update that is added. transposed: the weight lies as (in, out). bias: what is
    added to a bias, times `scale`. update: what PEFT makes of the values. rows: of an embedding, replaced by trained ones.
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
    bias: TensorPlace | None = None
    update: Update | None = None
    rows: Rows | None = None

    @property
    def changes(self) -> bool:
        """True if values, not only their format, may become others."""
        return any((self.replaced_by, self.quantised, self.pair, self.bias, self.update, self.rows))

    @property
    def is_sum(self) -> bool:
        """True if each of its rows is the base's and that of a product: nothing looks at the tensor as a whole."""
        others = self.replaced_by, self.quantised, self.transposed, self.bias, self.update, self.rows
        return self.pair is not None and self.pair.magnitude is None and not any(others)

    @property
    def result(self) -> NewTensor:
        """The tensor that is written; rows of new tokens lie behind the base's."""
        rows, *width = (self.replaced_by or self.place).shape or (0,)
        if self.rows is not None:
            rows = max(rows, *(number + 1 for number in self.rows.numbers))
        return NewTensor(self.name, self.dtype, (rows, *width) if self.place.shape else ())


def plan_merge(
    model: Any,
    layout: Mapping[str, TensorPlace],
    adapter: Adapter,
    *,
    by_peft: PeftLayers,
    quantised: Collection[str] = (),
    dtype: str | None = None,
    ties: Mapping[str, str],
    untie: bool = False,
) -> list[Step]:
    """A step for every tensor of the result, by name: those of the base's files, and what `untie` makes of a tied one.

    model: the base without its weights, with the adapter's vocabulary (`trained_vocabulary`). by_peft: what PEFT merges
    itself. quantised: layers to take as training saw them. dtype: of the result as safetensors names it; None keeps
    each tensor's. ties: parameters that are one tensor with another (`tied_parameters`). untie: where the adapter
    breaks a tie, each side gets a tensor of its own; otherwise that is refused. Trained rows of tied embeddings keep
    the tie, as PEFT trains them. Whatever does not land on exactly one tensor is exit 4.
    """
    parameters = parameter_names(model, layout)
    if untie:
        layout, parameters = untied(changed_ties(adapter, by_peft, ties), layout, parameters)
    kept = {} if untie else {**{source: target for target, source in ties.items()}, **ties}
    kept = {name: other for name, other in kept.items() if name.removesuffix(".weight") not in adapter.rows}
    owners: dict[str, list[str]] = {}
    for name, parameter in parameters.items():
        owners.setdefault(parameter, []).append(name)

    def owner(parameter: str) -> str:
        return owner_of(parameter, owners, model, kept)

    changes = find_changes(model, layout, adapter, quantised, owner)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, parameter in parameters.items():
        if not changes.get(name, {}).keys() & {"replaced_by", "rows"}:
            check_size(parameter, layout[name].shape, shapes[parameter])
    pieces = joined_names(model, layout) if by_peft else {}
    for name, update in updates_by_peft(by_peft, pieces, owner):
        changes.setdefault(name, {})["update"] = update
    return [
        Step(
            name,
            place,
            dtype if dtype and name in parameters and place.dtype in FLOATS else place.dtype,
            **changes.get(name, {}),
        )
        for name, place in sorted(layout.items())
    ]


def updates_by_peft(
    by_peft: PeftLayers, pieces: Mapping[str, Piece], owner: Callable[[str], str]
) -> Iterator[tuple[str, Update]]:
    """(tensor, its update) of all that PEFT's layers change; pieces: tensors that loading joins."""
    joined = {piece.parameter for piece in pieces.values()}
    for parameter, layers in by_peft.items():
        if parameter not in joined:
            yield owner(parameter), partial(merged_by_peft, layers, parameter.rpartition(".")[2])
    for name, piece in pieces.items():
        if piece.parameter in by_peft:
            yield name, partial(merged_piece, by_peft[piece.parameter], piece)


def find_changes(
    model: Any,
    layout: Mapping[str, TensorPlace],
    adapter: Adapter,
    quantised: Collection[str],
    owner: Callable[[str], str],
) -> dict[str, dict[str, Any]]:
    """Tensor name -> what is done to it, as fields of its step; shapes are checked. owner: of a parameter, its tensor."""
    changes: dict[str, dict[str, Any]] = {}
    shapes = {name: place.shape for name, place in layout.items()}
    for parameter, place in adapter.saved.items():
        name = owner(parameter)
        check_shape(parameter, tuple(model.state_dict()[parameter].shape), place.shape)
        changes.setdefault(name, {})["replaced_by"] = place
        shapes[name] = place.shape
    for layer in quantised:
        transposed = is_transposed(layer, find_layer(layer, model))
        changes.setdefault(owner(f"{layer}.weight"), {}).update(quantised=layer, transposed=transposed)
    for layer, pair in adapter.pairs.items():
        update = plan_update(layer, pair, adapter.config, model)
        name, shape = owner(f"{layer}.weight"), (pair.b.shape[0], pair.a.shape[1])
        check_shape(layer, shapes[name], shape[::-1] if update["transposed"] else shape)
        changes.setdefault(name, {}).update(update)
        if pair.bias is not None:
            name = owner(bias_of(layer, model))
            check_shape(f"{layer}.bias", shapes[name], pair.bias.shape)
            changes.setdefault(name, {}).update(bias=pair.bias, scale=update["scale"])
    for layer, rows in adapter.rows.items():
        name = owner(f"{layer}.weight")
        check_rows(layer, rows, shapes[name], find_layer(layer, model).get_parameter("weight").shape[0])
        changes.setdefault(name, {})["rows"] = rows
    return changes


def plan_update(layer: str, pair: Pair, config: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The update of one adapted layer; which way its weight lies is asked of the base's layer."""
    module = find_layer(layer, model)
    rank = adapter_rank(config, layer)
    if pair.a.shape[0] != rank:
        raise UserError(
            f"the adapter's layer '{layer}' has rank {pair.a.shape[0]}, its config says {rank}", ExitCode.MODEL
        )
    if pair.magnitude is not None:
        check_shape(f"{layer}.lora_magnitude_vector", (pair.b.shape[0],), pair.magnitude.shape)
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


def owner_of(parameter: str, owners: Mapping[str, list[str]], model: Any, ties: Mapping[str, str]) -> str:
    """The one tensor of the base's files that a parameter of the model is loaded from.

    ties: parameters that may not change, because they are one tensor with another.
    """
    tied = ties.get(parameter)
    if tied:
        raise UserError(
            f"the adapter changes '{parameter}', which is one tensor with '{tied}': merged, it would change both",
            ExitCode.MODEL,
            hint="--untie makes two tensors of it, as training had them; or use the adapter unmerged",
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


def tied_parameters(model: Any) -> dict[str, str]:
    """Each parameter of the model that is one tensor with another (the head) -> that one (the embeddings)."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def changed_ties(adapter: Adapter, by_peft: PeftLayers, ties: Mapping[str, str]) -> dict[str, str]:
    """Those ties that an adapter breaks, because it changes one side, or each side in its own way."""
    changed = {*adapter.saved, *(f"{layer}.weight" for layer in adapter.pairs), *by_peft}
    return {name: source for name, source in ties.items() if name in changed or source in changed}


def untied(
    ties: Mapping[str, str], layout: Mapping[str, TensorPlace], parameters: Mapping[str, str]
) -> tuple[dict[str, TensorPlace], dict[str, str]]:
    """Layout and parameter names with a tensor of its own for both sides of each tie."""
    files = {parameter: name for name, parameter in parameters.items()}
    layout, parameters = dict(layout), dict(parameters)
    for pair in ties.items():
        for new, old in (pair, pair[::-1]):
            if new not in files and old in files:
                layout[new], parameters[new] = layout[files[old]], new
    return layout, parameters


def bias_of(layer: str, model: Any) -> str:
    """The name of a layer's bias; a layer without one cannot take an update of it."""
    if f"{layer}.bias" not in model.state_dict():
        what = f"the adapter has a bias for '{layer}', which has none in the base: it can only be used unmerged"
        raise UserError(what, ExitCode.MODEL, hint="train without lora_bias")
    return f"{layer}.bias"


def trained_vocabulary(adapter: Adapter, model: Any) -> int | None:
    """Rows of the embeddings or the head in the adapter, where training made them more or fewer than the base's."""
    resizable = [layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in adapter.saved and any(parameter is weight for weight in resizable):
            rows, *width = adapter.saved[name].shape
            if rows != parameter.shape[0] and tuple(width) == tuple(parameter.shape[1:]):
                return rows
    needed = max((number + 1 for rows in adapter.rows.values() for number in rows.numbers), default=0)
    return needed if needed > model.get_input_embeddings().weight.shape[0] else None


def check_size(parameter: str, given: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Exit 4 for a tensor of the base that another vocabulary would resize, and that the adapter does not replace."""
    if given != expected:
        what = f"the adapter's vocabulary makes '{parameter}' {list(expected)}, but it holds none: the base's is"
        hint = "save it along in training: modules_to_save, or save_embedding_layers of PEFT's save_pretrained"
        raise UserError(f"{what} {list(given)}", ExitCode.MODEL, hint=hint)


def check_rows(layer: str, rows: Rows, shape: tuple[int, ...], vocabulary: int) -> None:
    """Exit 4 where trained rows do not fit into their embedding, or leave out one between the base's and the last."""
    check_shape(f"{layer}.weight, one row", shape[1:], rows.place.shape[1:])
    beyond = [number for number in rows.numbers if number < 0]
    beyond += sorted(set(range(shape[0], vocabulary)) - set(rows.numbers))
    if beyond:
        what = f"the adapter has no row {beyond[0]} of '{layer}', which has {shape[0]} in the base"
        raise UserError(what, ExitCode.MODEL, hint=OTHER_BASE)


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
