"""Names of tensors in a checkpoint -> names of parameters in the model, by transformers' own rules.

Checkpoints lack or own a prefix (`h.0...` for `transformer.h.0...`), carry old names, or hold in several tensors what
the model holds in one (experts).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


@dataclass(frozen=True)
class Piece:
    """Where loading puts a tensor (rows, columns) that it joins with others: into `parameter` (experts, rows of all
    parts, columns), at this expert, as this one of `parts` equal parts of its rows."""

    parameter: str
    expert: int
    part: int
    parts: int


def parameter_names(model: Any, checkpoint: Iterable[str]) -> dict[str, str]:
    """Checkpoint name -> name in model.state_dict(), for tensors that are loaded one to one, unchanged.

    model: on the meta device is enough. Left out are tensors that the model does not have, and those that loading
    joins, splits or turns.
    """
    return {name: renamed for name, renamed, source in renamed_by_loading(model, checkpoint) if source is None}


def joined_names(model: Any, checkpoint: Iterable[str]) -> dict[str, Piece]:
    """Checkpoint name -> its place in a parameter, for matrices of experts that loading stacks (and puts below one
    another, as gate and up) and does nothing else with."""
    stacking: dict[str, tuple[int, int]] = {}
    for rule in get_model_conversion_mapping(model):
        if isinstance(rule, WeightConverter) and is_stacking(rule):
            stacking |= {pattern: (at, len(rule.source_patterns)) for at, pattern in enumerate(rule.source_patterns)}
    found: dict[str, Piece] = {}
    experts: dict[tuple[str, str], int] = {}
    for name, parameter, source in renamed_by_loading(model, checkpoint):
        if source is not None and source in stacking:
            expert = experts.get((parameter, source), 0)
            experts[parameter, source] = expert + 1
            found[name] = Piece(parameter, expert, *stacking[source])
    return found


def is_stacking(rule: WeightConverter) -> bool:
    """True for a rule that stacks the experts' matrices; several of an expert are joined by rows before."""
    kinds = [(type(step), getattr(step, "dim", None)) for step in rule.operations]
    return kinds == [(MergeModulelist, 0)] or (kinds == [(MergeModulelist, 0), (Concatenate, 1)])


def renamed_by_loading(model: Any, checkpoint: Iterable[str]) -> Iterator[tuple[str, str, str | None]]:
    """(checkpoint name, name in the model, pattern of the rule that converts it or None), of what the model has."""
    known = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    for name in sorted(checkpoint, key=dot_natural_key):  # some rules wake others, so order counts as in loading
        renamed, source = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if renamed not in known and name in known:
            renamed, source = rename_source_key(name, [], [], model.base_model_prefix, known)
        if renamed in known:
            yield name, renamed, source
