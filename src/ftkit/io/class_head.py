"""A head for classes in place of one for words: how a config asks for it, and which modules of a model it is."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ftkit.errors import ExitCode, UserError

if TYPE_CHECKING:  # this is read for estimates without torch too
    from torch import Tensor, nn

CLASSES = "single_label_classification"
"""transformers' word for it, as `problem_type` of a config."""
SUFFIX = "ForSequenceClassification"


def classifies(config: Any) -> bool:
    """True for the config of a model that tells one of several classes."""
    if getattr(config, "problem_type", None) == CLASSES:
        return True
    return bool(config.architectures) and str(config.architectures[0]).endswith(SUFFIX) and config.num_labels > 1


def class_names_of(config: Any) -> tuple[str, ...]:
    """The labels of such a config, in the order of its logits."""
    return tuple(str(config.id2label[number]) for number in sorted(config.id2label))


def with_classes(config: Any, names: Sequence[str], pad_id: int) -> Any:
    """A copy of a body's config that asks for a head with these classes. pad_id: how such models find the last token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as HEADS

    own = type(config).from_dict(config.to_dict())
    own.id2label, own.label2id = dict(enumerate(names)), {name: number for number, name in enumerate(names)}
    own.problem_type, own.architectures = CLASSES, [HEADS[config.model_type]]
    own.pad_token_id = own.get_text_config().pad_token_id = pad_id
    return own


def require_head_for_classes(config: Any, name: str) -> None:
    """Exit 4 for an architecture that transformers has no such head for, and for a model that has one for other classes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as HEADS

    if classifies(config):
        hint = "give the model that it was trained from"
        raise UserError(f"{name}: has a head for classes already, of other rows", ExitCode.MODEL, hint=hint)
    if config.model_type not in HEADS:
        raise UserError(
            f"{name}: transformers has no head for classes on {config.model_type}",
            ExitCode.MODEL,
            hint="train the labels as answers: ftkit prep FILE --template alpaca --map output=LABEL",
        )


def pad_token_id(tokenizer: Any) -> int:
    """The token that rows are padded with; a tokenizer without one gets its end-of-text token for it."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        hint = 'set "pad_token" in tokenizer_config.json'
        raise UserError("the tokenizer has no token to pad rows with", ExitCode.MODEL, hint=hint)
    return int(tokenizer.pad_token_id)


class ClassHead:
    """Everything behind the body of a model with classes: what is new, so trained in full and saved whole.

    names: of those modules. An encoder's pooler is among them: many checkpoints lack it, and none trained it for this.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        prefix = model.base_model_prefix
        found = {name: module for name, module in model.named_children() if name != prefix}
        found[f"{prefix}.pooler"] = getattr(getattr(model, prefix), "pooler", None)
        self.names = sorted(name for name, module in found.items() if module is not None and has_parameters(module))

    def holds(self, name: str) -> bool:
        """True for a module or parameter of the head, by its full name."""
        return any(name == head or name.startswith(head + ".") for head in self.names)

    def widen(self) -> None:
        """Let the head compute in float32 whatever the body does, as all that an adapter trains."""
        for name in self.names:
            module = self.model.get_submodule(name)
            module.float()
            module.register_forward_pre_hook(to_float32)


def has_parameters(module: "nn.Module") -> bool:
    """False for dropout and the like."""
    return next(module.parameters(), None) is not None


def to_float32(_: "nn.Module", inputs: "tuple[Tensor, ...]") -> "tuple[Tensor, ...]":
    """The hook of a widened module: what comes in becomes float32."""
    return tuple(each.float() for each in inputs)
