"""Open what was trained, or any model: a run, an adapter folder, a merged or base model. For eval, chat and merge."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftkit import console
from ftkit.errors import ExitCode, UserError
from ftkit.io.atomic import check_manifest
from ftkit.io.base_model import (
    Base,
    check_base,
    config_sha256,
    context_length,
    find_base,
    load_tokenizer,
    load_weights,
    weights_sha256,
    widths_of,
)  # fmt: skip
from ftkit.io.card import Card, read_card
from ftkit.io.class_head import ClassHead, class_names_of, classifies, pad_token_id, with_classes
from ftkit.io.devices import DTYPES, pick_dtype
from ftkit.io.new_tokens import add_new_tokens
from ftkit.io.quantization import keep_plain_layout, quantization_config
from ftkit.io.run_folder import RUNS, RunFolder, open_run
from ftkit.io.shards import read_header
from ftkit.io.template import Template
from ftkit.libraries import import_bitsandbytes

COMMON_KEYS = (
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "layers_to_transform", "modules_to_save", "peft_type", "peft_version", "r", "revision",
    "target_modules", "task_type",
)  # fmt: skip
LYCORIS_KEYS = ("alpha", "alpha_pattern", "init_weights", "module_dropout", "rank_dropout", "rank_pattern")
ADAPTER_KEYS = {
    "LORA": (
        "alora_invocation_tokens", "alpha_pattern", "arrow_config", "corda_config", "ensure_weight_tying", "eva_config",
        "init_lora_weights", "layer_replication", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout",
        "qalora_group_size", "rank_pattern", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora",
        "use_qalora", "use_rslora",
    ),
    "LOHA": (*LYCORIS_KEYS, "use_effective_conv2d"),
    "LOKR": (*LYCORIS_KEYS, "decompose_both", "decompose_factor", "rank_dropout_scale", "use_effective_conv2d"),
    "OFT": (
        "block_share", "coft", "eps", "init_weights", "module_dropout", "num_cayley_neumann_terms", "oft_block_size",
        "use_cayley_neumann",
    ),
    "IA3": ("feedforward_modules", "init_ia3_weights"),
    "VERA": ("d_initial", "init_weights", "projection_prng_key", "save_projection", "vera_dropout"),
}  # fmt: skip
"""Kinds of adapters that are opened, and the settings that each has besides COMMON_KEYS."""


CHANGED = "FTKIT_CHANGED_TENSORS"
"""The peft_type of a folder with some of the base's own tensors, trained; PEFT itself refuses to open it."""
VIRTUAL_KEYS = ("num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens", "token_dim")
ADAPTER_KEYS |= {
    "LN_TUNING": (),
    "PROMPT_TUNING": (*VIRTUAL_KEYS, "prompt_tuning_init"),
    "PREFIX_TUNING": (*VIRTUAL_KEYS, "encoder_hidden_size"),
    CHANGED: (),
}
WITHOUT_RANK = ("IA3", "OFT", "LN_TUNING", "PROMPT_TUNING", "PREFIX_TUNING", CHANGED)


@dataclass(frozen=True)
class Trained:
    """Where weights are and what is known of them. `adapter` is None for a whole model; `card` if not made by ftkit."""

    name: str
    base: Base
    adapter: Path | None
    card: Card | None
    run: RunFolder | None
    classes: tuple[str, ...] = ()
    """The labels that it tells apart; empty for what writes text."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer: on its device, in evaluation mode, with its tokenizer, template and context length."""

    model: Any
    tokenizer: Any
    template: Template | None
    card: Card | None
    device: str
    context: int | None
    classes: tuple[str, ...] = ()


def open_trained(name: str) -> Trained:
    """A run, an adapter folder, a model folder or a Hugging Face id, told apart by what is in it; checked only."""
    path = Path(name).expanduser()
    if (path / "run.json").is_file() or (path.parent == RUNS and not path.is_dir()):
        return open_trained_run(open_run(name))
    if (path / "adapter_config.json").is_file():
        return open_adapter(path, name)
    base = find_base(name)
    card = read_card(base.folder) if base.folder else None
    if base.folder:
        check_manifest(base.folder)
    return Trained(name, base, None, card, None, classes_of_model(check_base(base, any_head=True)))


def open_trained_run(run: RunFolder) -> Trained:
    """What a complete run made."""
    if run.model.is_dir():
        check_manifest(run.model)
        base = Base(str(run.model), str(run.model.resolve()))
        return Trained(
            str(run.path), base, None, read_card(run.model), run, classes_of_model(check_base(base, any_head=True))
        )
    return replace(open_adapter(run.adapter, str(run.path)), run=run)


def classes_of_model(config: Any) -> tuple[str, ...]:
    """The labels in the config of a whole model; none where it writes text."""
    return class_names_of(config) if classifies(config) else ()


def open_adapter(folder: Path, name: str) -> Trained:
    """An adapter in PEFT's layout: its config allowed, its weights whole, its base there and as it was in training."""
    check_manifest(folder)
    config = read_adapter_config(folder)
    card = read_card(folder)
    base = find_base_of_adapter(folder, config, card)
    classes = tuple(card.labels) if card is not None else ()
    if config.get("task_type") == "SEQ_CLS" and not classes:
        hint = "ftkit opens those it trained; with PEFT alone: AutoModelForSequenceClassification and PeftModel"
        raise UserError(f"{folder}: an adapter for classes, and nothing here names them", ExitCode.MODEL, hint=hint)
    check_base(base, for_classes=bool(classes))
    if card is not None:
        require_same_base(base, card, name)
    return Trained(name, base, folder, card, None, classes)


def find_base_of_adapter(folder: Path, config: dict[str, Any], card: Card | None) -> Base:
    """The base that an adapter names: by the card where there is one, which knows more than PEFT's config."""
    location, revision = config.get("base_model_name_or_path"), config.get("revision")
    if card is not None:
        location = card.base if card.base.startswith("builtin:") else card.base_location
        revision = card.base_revision
    if not isinstance(location, str) or not location:
        hint = "set base_model_name_or_path to the folder or id of its base"
        raise UserError(f"{folder}/adapter_config.json: names no base model", ExitCode.MODEL, hint=hint)
    if Path(location).is_absolute() and not Path(location).is_dir():
        hint = "put the base back there, or train again with --model where it is now"
        raise UserError(f"{folder}: its base {location} is not there any more", ExitCode.MODEL, hint=hint)
    base = find_base(location, revision if isinstance(revision, str) else None)
    return base if card is None else replace(base, name=card.base)


def require_same_base(base: Base, card: Card, name: str) -> None:
    """Exit 4 for a base whose config or weights are not those of the training."""
    same_weights = card.base_weights_sha256 in (None, weights_sha256(base))
    for what, is_same in (
        ("config.json is", config_sha256(base) == card.base_config_sha256),
        ("weights are", same_weights),
    ):
        if not is_same:
            raise UserError(
                f"{base.name}: its {what} not what {name} was trained on",
                ExitCode.MODEL,
                hint="give the base its old files back, or train again",
            )


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json; keys that PEFT does not have, or that import code, are refused before PEFT sees them."""
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(
            f"{path}: missing or not JSON", ExitCode.MODEL, hint="train again, or copy the whole adapter"
        ) from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(kind, str) or kind not in ADAPTER_KEYS:
        hint = f"ftkit opens adapters of the kinds {', '.join(ADAPTER_KEYS)}"
        raise UserError(f"{path}: peft_type is {kind!r}", ExitCode.MODEL, hint=hint)
    refuse_foreign_keys(config, path)
    if kind not in WITHOUT_RANK and (not isinstance(config.get("r"), int) or config["r"] < 1):
        raise UserError(
            f"{path}: r is {config.get('r')!r}, should be 1 or more",
            ExitCode.MODEL,
            hint="r is the rank of the adapter",
        )
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        what = (
            "has only a pickled adapter_model.bin, which can run code"
            if pickled
            else "has no adapter_model.safetensors"
        )
        raise UserError(
            f"{folder}: {what}", ExitCode.MODEL, hint="PEFT's save_pretrained writes adapter_model.safetensors"
        )
    read_header(weights)
    return config


def refuse_foreign_keys(config: dict[str, Any], path: Path) -> None:
    """Exit 4 for keys that PEFT does not have, or that import a module of the adapter's choice."""
    own = (*COMMON_KEYS, *ADAPTER_KEYS[config["peft_type"]])
    for key, value in config.items():
        if key == "megatron_core" and value == "megatron.core":  # PEFT's default, which it writes into every adapter
            continue
        imports = value.get("parent_library") if key == "auto_mapping" and isinstance(value, dict) else None
        is_foreign = key not in own and value not in (None, False, "", [], {})
        if is_foreign or not str(imports or "transformers").startswith("transformers"):
            fault = "it is no setting of an adapter, or it makes PEFT import code"
            raise UserError(
                f"{path}: key '{key}' is refused: {fault}",
                ExitCode.MODEL,
                hint="take the key out if you trust the rest",
            )


def load_trained(trained: Trained, device: str, *, dtype: str = "auto", adapter_name: str = "default") -> Loaded:
    """Load for inference: base (quantised as in training), adapter on top, tokenizer, template.

    `auto` takes the format that training used; for a foreign model the one that its device is fast at.
    """
    card = trained.card
    classes, new_head = trained.classes, bool(trained.classes and trained.adapter)
    config = check_base(trained.base, for_classes=new_head, any_head=True)
    name = card.dtype if card is not None and dtype == "auto" else dtype
    width, _ = widths_of(config)
    number_format = DTYPES[name] if name in DTYPES else pick_dtype("auto", device, trains_weights=False, width=width)
    quantization = None
    if card and trained.adapter:
        quantization = quantization_config(card.method, number_format, card.kept_16bit)
    tokenizer = load_own_tokenizer(trained, config)
    config = with_classes(config, classes, pad_token_id(tokenizer)) if new_head else config
    model = load_weights(
        trained.base,
        dtype=number_format,
        device=device,
        quantization=quantization,
        config=config if classes else None,
        new_head=new_head,
    )
    if new_head:
        ClassHead(model).widen()
    if trained.adapter is not None and card is not None and card.added_tokens:
        own = load_tokenizer(trained.base, answers=not classes)
        add_new_tokens(own, card.added_tokens, str(trained.adapter)).give_rows(model)
    if trained.adapter is not None:
        model = put_adapter(model, trained.adapter, adapter_name)
    keep_plain_layout(model)
    template = card.template if card else None
    context = context_length(config)
    if context is not None and trained.adapter is not None:
        context -= read_adapter_config(trained.adapter).get("num_virtual_tokens") or 0
    return Loaded(model.eval(), tokenizer, template, card, device, context, classes)


def load_own_tokenizer(trained: Trained, config: Any) -> Any:
    """The tokenizer that was saved beside an adapter, else its base's; config: the base's."""
    adapter = trained.adapter
    folder = adapter if adapter and (adapter / "tokenizer_config.json").is_file() else trained.base
    grown = trained.card.vocabulary if adapter and trained.card else None
    return load_tokenizer(folder, grown or config.get_text_config().vocab_size, answers=not trained.classes)


def put_adapter(model: Any, folder: Path, name: str = "default") -> Any:
    """The adapter of a folder on a loaded base, beside others that are on it; one that does not fit is exit 4."""
    import warnings

    import_bitsandbytes()
    from peft import PeftModel

    if read_adapter_config(folder)["peft_type"] == CHANGED:
        return put_changed(model, folder)
    try:
        with console.quiet_libraries(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), name, is_trainable=False, torch_device=str(model.device))
                tuned = model
            else:
                tuned = PeftModel.from_pretrained(model, str(folder), name, is_trainable=False)
    except (
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # PEFT takes the config at its word
        reason = str(error).strip().splitlines()
        detail = next((line.strip() for line in reason if "size mismatch" in line), reason[0] if reason else "?")
        raise UserError(
            f"{folder}: does not fit the base: {detail[:250]}",
            ExitCode.MODEL,
            hint="give the base that it was trained on",
        ) from None
    require_all_landed(tuned, folder, name)
    return tuned


def put_changed(model: Any, folder: Path) -> Any:
    """Trained tensors in the place of the base's, which are kept so that `without_adapter` can put them back."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    model.untuned = {name: p.detach().clone() for name, p in model.named_parameters() if name in tensors}
    put_tensors(model, tensors, folder)
    return model


def put_tensors(model: Any, tensors: dict[str, Any], folder: Path) -> None:
    """Tensors into a model's parameters of the same names and shapes; exit 4 for one that fits none."""
    import torch

    known = dict(model.named_parameters())
    for name, value in tensors.items():
        if name not in known or known[name].shape != value.shape:
            what = "no tensor of the base is called" if name not in known else "of another shape than the base's:"
            raise UserError(f"{folder}: {what} '{name}'", ExitCode.MODEL, hint="give the base that it was trained on")
        with torch.no_grad():
            known[name].copy_(value)


SAVED_TWICE = ".modules_to_save."
"""In names of what PEFT saves a second time where the vocabulary was resized."""


def require_all_landed(tuned: Any, folder: Path, name: str = "default") -> None:
    """Every weight of the adapter file belongs to a layer of the base, and every adapted layer got its weights."""
    from peft import get_peft_model_state_dict

    with console.quiet_libraries():
        held = set(get_peft_model_state_dict(tuned, adapter_name=name, save_embedding_layers=False))
    file = set(read_header(folder / "adapter_model.safetensors"))
    unknown, missing = sorted(file - held), sorted(held - file)
    if (
        unknown
    ):  # copies of the base's own weights, and of what a tied layer shares, which PEFT writes too, are no fault
        own = {key.removesuffix(f".{name}") for key in tuned.state_dict()}
        copies = {name for name in file if SAVED_TWICE in name and name.replace(SAVED_TWICE, ".") in file}
        unknown = sorted(set(unknown) - own - copies)
    for fault, names in (("no layer of the base takes", unknown), ("the file lacks", missing)):
        if names:
            raise UserError(
                f"{folder}: {fault} '{names[0]}' ({len(names)} in all)",
                ExitCode.MODEL,
                hint="give the base that it was trained on",
            )


@contextmanager
def without_adapter(model: Any) -> Iterator[Any]:
    """The untuned base in the same loaded model, for as long as the block lasts."""
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield model
    elif untuned := getattr(model, "untuned", None):
        tuned = {name: p.detach().clone() for name, p in model.named_parameters() if name in untuned}
        put_tensors(model, untuned, Path())
        try:
            yield model
        finally:
            put_tensors(model, tuned, Path())
    else:
        yield model
