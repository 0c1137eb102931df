"""What an operator gives on the meta device, remembered: the same shapes come again in every layer and every step.

Many of PyTorch's meta kernels are written in Python and take a tenth of a millisecond a call: without this, most of
a simulation's time.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

MOST_KNOWN = 50_000
"""Kinds of calls to remember, far more than a model has; then all are forgotten."""
Described = tuple[Any, ...]

_known: dict[Any, list[Any] | None] = {}
_makes_new: dict[Any, bool] = {}


def run_on_meta(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """func(*args, **kwargs); tensors of known shapes, strides and dtypes are made without asking the meta kernel.

    Only for operators that give new tensors: one that returns a view or writes into its inputs is called as it is.
    """
    is_new = _makes_new.get(func)
    if is_new is None:
        is_new = _makes_new[func] = makes_new_tensors(func)
    if not is_new:
        return func(*args, **kwargs)
    try:
        key = (func, describe_all(args), describe_all(kwargs.items()) if kwargs else ())
        outputs = _known.get(key, ())
    except TypeError:  # something without a hash
        return func(*args, **kwargs)
    if outputs:
        made = [new_tensor(each) if type(each) is Place else each for each in outputs]
        return tuple(made) if len(made) > 1 else made[0]
    out = func(*args, **kwargs)
    if outputs is not None:
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        _known[key] = places_of(out, args)
    return out


def new_tensor(place: "Place") -> Tensor:
    """An empty tensor on meta of this form."""
    shape, stride, dtype = place
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def makes_new_tensors(func: Any) -> bool:
    """True if the operator's schema says that no result shares memory with an input."""
    schema = func._schema
    return not any(each.alias_info is not None for each in (*schema.arguments, *schema.returns))


def describe_all(values: Iterable[Any]) -> Described:
    """A hashable description of arguments: of tensors what decides the result's form, of others their value."""
    return tuple([describe(value) for value in values])


def describe(value: Any) -> Any:
    """As `describe_all`, of one argument. 1, 1.0 and True are different arguments."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.device.type)
    if isinstance(value, (list, tuple)):
        return describe_all(value)
    return (type(value), value)


class Place(tuple[Any, Any, Any]):
    """(shape, stride, dtype) of a result that fills a storage of its own."""


def places_of(out: Any, args: Any) -> list[Any] | None:
    """The results as `Place`s, other values as they are; None where one is not on meta or shares a storage.

    Some do so although their schema does not say it (`aten._unsafe_view`).
    """
    if not isinstance(out, (Tensor, tuple)):
        return None
    inputs = [each for value in args for each in (value if isinstance(value, (list, tuple)) else (value,))]
    outputs = out if isinstance(out, tuple) else (out,)
    found: list[Any] = []
    storages = {each.untyped_storage()._cdata for each in inputs if isinstance(each, Tensor)}
    before = len(storages)
    for each in outputs:
        if not isinstance(each, Tensor):
            found.append(each)
            continue
        storages.add(each.untyped_storage()._cdata)
        alone = torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device="meta")
        if each.device.type != "meta" or each.untyped_storage().nbytes() != alone.untyped_storage().nbytes():
            return None
        found.append(Place((tuple(each.shape), each.stride(), each.dtype)))
    is_alone = len(storages) - before == sum(type(each) is Place for each in found)
    return found if is_alone else None
