"""Several adapters on one loaded base: which of them the next passes go through, and which may share a pass."""

from collections.abc import Collection
from typing import Any

BASE = "__base__"
"""PEFT's name for a row that goes through no adapter."""
CHANGES_MORE = (
    "use_dora",
    "target_parameters",
    "modules_to_save",
    "trainable_token_indices",
    "alora_invocation_tokens",
)
"""Settings of adapters that are more than A and B of linear layers: PEFT does not run these in a mixed pass, or not so
that each row gets what it gets alone."""


def use_adapter(model: Any, name: str | None) -> None:
    """Let the next passes go through this adapter; BASE: through none of them; None: through those that are on.

    It moves no weights, so it costs milliseconds, and nothing where the adapter is on already.
    """
    if name is None or not hasattr(model, "peft_config"):
        return
    if name == BASE:
        if not are_off(model):
            model.base_model.disable_adapter_layers()
        return
    use_any_adapter(model)
    if model.active_adapter != name:
        model.set_adapter(name, inference_mode=True)


def use_any_adapter(model: Any) -> None:
    """Undo BASE: PEFT passes over all adapters otherwise, those that a row names too."""
    if are_off(model):
        model.base_model.enable_adapter_layers()


def are_off(model: Any) -> bool:
    """True if the layers pass their adapters over: they are switched together, so the first one tells."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return next((module.disable_adapters for module in model.modules() if isinstance(module, BaseTunerLayer)), False)


def unmixable(model: Any, names: Collection[str]) -> list[str]:
    """Those of these adapters that a pass with rows of other adapters would not run as alone."""
    in_head = getattr(model.get_output_embeddings(), "lora_A", {})  # it gets the last tokens only, as one row
    tuned = sorted(set(names) - {BASE})
    return [name for name in tuned if name in in_head or is_more_than_lora(model.peft_config[name])]


def is_more_than_lora(config: Any) -> bool:
    """True unless an adapter is A and B of linear layers, and nothing else."""
    return config.peft_type != "LORA" or any(getattr(config, setting, None) for setting in CHANGES_MORE)
