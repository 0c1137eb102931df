"""Which layers get an adapter: `--targets` keywords and names -> module names, as PEFT matches them."""

from collections.abc import Iterable

from torch import nn

from ftkit.errors import ExitCode, UserError, did_you_mean
from ftkit.io.class_head import CLASSES, ClassHead

KEYWORDS = ("auto", "all-linear", "attention", "mlp")
ATTENTION_WORDS = ("attn", "attention")


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer by its full name, the output head included."""
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def is_linear(module: nn.Module) -> bool:
    """What PEFT takes for linear: torch's layer, those that inherit from it (bitsandbytes, Falcon), GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def output_head_name(model: nn.Module) -> str | None:
    """The full name of the layer that gives the logits."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return next((name for name, module in model.named_modules() if module is head), None)


def class_head(model: nn.Module) -> ClassHead | None:
    """The head for classes; None for a model that writes."""
    config = getattr(model, "config", None)
    return ClassHead(model) if getattr(config, "problem_type", None) == CLASSES else None


def resolve_targets(model: nn.Module, spec: str) -> list[str]:
    """`all-linear,lm_head` -> sorted suffixes of module names (`q_proj`, `attn.c_proj`) for LoraConfig.target_modules.

    all-linear is every linear layer but the output head, as in PEFT and the QLoRA paper (arXiv:2305.14314, section 4).
    attention and mlp divide those by the name of the block they are in.
    """
    layers, head, classes = linear_layers(model), output_head_name(model), class_head(model)
    known = [name for name in layers if classes is None or not classes.holds(name)]  # that head is trained in full
    inner = [name for name in known if name != head]
    chosen: set[str] = set()
    for word in filter(None, (part.strip() for part in spec.split(","))):
        chosen |= choose(word, inner, known)
    if not chosen:
        raise no_match(spec, known)
    if head in chosen and is_tied(model):
        raise UserError(
            f"--targets: {head} shares its weight with the input embedding; an adapter on it could not be merged",
            ExitCode.MODEL,
            hint="leave it out: --targets all-linear",
        )
    return shortest_suffixes(chosen, set(layers))


def choose(word: str, inner: list[str], layers: list[str]) -> set[str]:
    """The layers that one keyword or name means; a name that matches nothing is exit 4 with the names there are."""
    if word in ("auto", "all-linear"):
        return set(inner)
    if word in ("attention", "mlp"):
        found = {name for name in inner if is_in_attention(name) == (word == "attention")}
    else:
        found = {name for name in layers if name == word or name.endswith("." + word)}
    if not found:
        raise no_match(word, layers)
    return found


def resolve_factors(model: nn.Module, spec: str) -> tuple[list[str], list[str]]:
    """`--targets` of IA3: (suffixes of the layers that get factors, those of them whose inputs are multiplied).

    auto is what PEFT knows for the architecture, else keys, values and the layer that leads out of the MLP, by the names
    that most models have. Inputs are multiplied where a layer is outside attention, outputs elsewhere.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as KNOWN

    if spec == "auto":
        known = KNOWN.get(getattr(model.config, "model_type", ""), ["k_proj", "v_proj", "down_proj"])
        present = [name for name in known if any(ends_with(layer, name) for layer in linear_layers(model))]
        if not present:
            raise UserError(
                "--method ia3: PEFT does not know which layers of this architecture it is for",
                ExitCode.MODEL,
                hint=f"name them: --targets; this model has {last_names(linear_layers(model))}",
            )
        spec = ",".join(present)
    targets, layers = resolve_targets(model, spec), set(linear_layers(model))
    chosen = {name for name in layers if any(ends_with(name, target) for target in targets)}
    outside = {name for name in chosen if not is_in_attention(name)}
    inputs = shortest_suffixes(outside, layers)
    return sorted(shortest_suffixes(chosen - outside, layers) + inputs), inputs


def resolve_norms(model: nn.Module, spec: str) -> list[str]:
    """`--targets` of norm tuning: suffixes of the model's norms, all of them (auto) or those named."""
    every = dict(model.named_modules())
    norms = {name for name, module in every.items() if is_norm(module)}
    chosen: set[str] = set()
    for word in filter(None, (part.strip() for part in spec.split(","))):
        found = norms if word == "auto" else {name for name in norms if ends_with(name, word)}
        if not found:
            raise UserError(
                f"--targets: no norm is called '{word}'",
                ExitCode.MODEL,
                hint=f"{did_you_mean(word, sorted(norms))}this model has {last_names(norms)}; or auto for all",
            )
        chosen |= found
    return shortest_suffixes(chosen, set(every))


def is_norm(module: nn.Module) -> bool:
    """LayerNorm, RMSNorm and their kin, by class: one weight of one dimension, Norm in the name."""
    own = list(module.parameters(recurse=False))
    return "Norm" in type(module).__name__ and bool(own) and all(p.ndim == 1 for p in own)


def resolve_ranks(model: nn.Module, targets: list[str], spec: str | None) -> dict[str, int]:
    """`q_proj=8,mlp.down_proj=32` -> name ending -> rank, for LoraConfig.rank_pattern; exit 2 or 4 for what is no target."""
    ranks: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in (spec or "").split(","))):
        name, _, rank = (piece.strip() for piece in part.partition("="))
        if not (name and rank.isdecimal() and int(rank) >= 1):
            raise UserError(
                f"--rank-pattern: '{part}' is not NAME=RANK",
                ExitCode.USAGE,
                hint="for example q_proj=8,mlp.down_proj=32",
            )
        layers = [layer for layer in linear_layers(model) if any(ends_with(layer, target) for target in targets)]
        if not any(ends_with(layer, name) for layer in layers):
            raise UserError(
                f"--rank-pattern: no adapted layer is called '{name}'",
                ExitCode.MODEL,
                hint=f"{did_you_mean(name, targets)}adapted are {', '.join(targets)}",
            )
        ranks[name] = int(rank)
    return ranks


def check_kept(model: nn.Module, names: list[str]) -> None:
    """Exit 4 for a name of --keep-16bit that no linear layer has."""
    layers = linear_layers(model)
    for word in names:
        if not any(ends_with(layer, word) for layer in layers):
            known = last_names(layers)
            raise UserError(
                f"--keep-16bit: no linear layer is called '{word}'",
                ExitCode.MODEL,
                hint=f"{did_you_mean(word, known.split(', '))}this model has {known}",
            )


def ends_with(name: str, suffix: str) -> bool:
    """True for a module that PEFT matches by this suffix."""
    return name == suffix or name.endswith("." + suffix)


def last_names(names: Iterable[str]) -> str:
    """The last parts of module names, for hints."""
    return ", ".join(sorted({name.split(".")[-1] for name in names}))


def is_in_attention(name: str) -> bool:
    """True for a layer inside an attention block, by the name of a module around it."""
    return any(word in part for part in name.split(".")[:-1] for word in ATTENTION_WORDS)


def is_tied(model: nn.Module) -> bool:
    """True if input embedding and output head are one tensor."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return head is not None and embedding is not None and head.weight is embedding.weight


def shortest_suffixes(chosen: set[str], layers: set[str]) -> list[str]:
    """The shortest name endings that match all chosen layers and no other."""
    suffixes: set[str] = set()
    for name in chosen:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            suffix = ".".join(parts[-length:])
            if all(other in chosen for other in layers if other == suffix or other.endswith("." + suffix)):
                suffixes.add(suffix)
                break
    return sorted(suffixes)


def no_match(word: str, layers: list[str]) -> UserError:
    """The error for a name that no layer has."""
    names = sorted({name.split(".")[-1] for name in layers})
    near = did_you_mean(word, [*names, *KEYWORDS])
    return UserError(f"--targets: no linear layer is called '{word}'", ExitCode.MODEL,
                     hint=f"{near}this model has {', '.join(names)}; or {', '.join(KEYWORDS[1:])}")  # fmt: skip
