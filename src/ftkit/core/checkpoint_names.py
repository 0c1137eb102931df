"""Names of tensors in a checkpoint -> names of parameters in the model, by transformers' own rules.

Checkpoints lack or own a prefix (`h.0...` for `transformer.h.0...`), carry old names, or hold in several tensors what
the model holds in one (experts).
"""

from collections.abc import Iterable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


def parameter_names(model: Any, checkpoint: Iterable[str]) -> dict[str, str]:
    """Checkpoint name -> name in model.state_dict(), for tensors that are loaded one to one, unchanged.

    model: on the meta device is enough. Left out are tensors that the model does not have, and those that loading
    joins, splits or turns.
    """
    known = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    found = {}
    for name in sorted(checkpoint, key=dot_natural_key):  # some rules wake others, so order counts as in loading
        renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if renamed not in known and name in known:
            renamed, converter = rename_source_key(name, [], [], model.base_model_prefix, known)
        if renamed in known and converter is None:
            found[name] = renamed
    return found
