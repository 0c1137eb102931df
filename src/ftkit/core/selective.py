"""Train some of the model's own weights: biases, the first or last blocks, or tensors by name; nothing is added."""

import re

from torch import nn

from ftkit.core.model_settings import ModelSettings
from ftkit.core.targets import class_head
from ftkit.errors import ExitCode, UserError

ENDS = re.compile(r"(last|first):(\d+)")


def free_weights(model: nn.Module, settings: ModelSettings) -> None:
    """Set free what the method trains: every weight, all biases (arXiv:2106.10199), or what --train-layers names.

    --freeze takes tensors out again. A choice that leaves nothing to train is exit 4. A head for classes is new, so it is
    trained whatever is chosen.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen = chosen_names(model, names, settings)
    if settings.freeze:
        frozen = matching(settings.freeze, names, "--freeze")
        chosen = [name for name in chosen if name not in set(frozen)]
        if not chosen:
            raise UserError(
                f"--freeze {settings.freeze} leaves nothing to train", ExitCode.MODEL, hint=f"tensors: {some(names)}"
            )
    head = class_head(model)
    free = {*chosen, *(name for name in names if head is not None and head.holds(name))}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in free)


def chosen_names(model: nn.Module, names: list[str], settings: ModelSettings) -> list[str]:
    """The tensors that a method means, before --freeze."""
    if settings.technique == "bitfit":
        biases = [name for name in names if name.split(".")[-1] == "bias"]
        if not biases:
            raise UserError(
                "--method bitfit: this model has no biases",
                ExitCode.MODEL,
                hint="--method ln trains its norms, --method ia3 one factor for each output of some layers",
            )
        return biases
    spec = settings.train_layers
    if spec is None:
        return names
    if ends := ENDS.fullmatch(spec):
        return of_blocks(model, names, ends[1], int(ends[2]))
    return matching(spec, names, "--train-layers")


def of_blocks(model: nn.Module, names: list[str], end: str, count: int) -> list[str]:
    """Tensors of the first or last blocks; behind the last ones also the final norm and an output head of its own."""
    path, blocks = block_list(model)
    if not 1 <= count <= len(blocks):
        raise UserError(
            f"--train-layers {end}:{count}: the model has {len(blocks)} blocks",
            ExitCode.USAGE,
            hint=f"--train-layers {end}:1 up to {end}:{len(blocks)}",
        )
    wanted = range(count) if end == "first" else range(len(blocks) - count, len(blocks))
    starts = tuple(f"{path}.{number}." for number in wanted)
    found = [name for name in names if name.startswith(starts)]
    if end == "last":
        last_of_blocks = max(at for at, name in enumerate(names) if name.startswith(f"{path}."))
        found += names[last_of_blocks + 1 :]
    return found


def block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and modules of the model's blocks: its longest list of modules."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UserError(
            "--train-layers: this model has no list of blocks", ExitCode.MODEL, hint="name tensors with a REGEX instead"
        )
    return max(lists, key=lambda pair: len(pair[1]))


def matching(pattern: str, names: list[str], flag: str) -> list[str]:
    """The names in which the pattern is found somewhere; exit 2 for no regular expression, 4 where it matches nothing."""
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise UserError(
            f"{flag} {pattern}: no regular expression ({error})", ExitCode.USAGE, hint=f"for example {flag} 'mlp|norm'"
        ) from None
    if not found:
        raise UserError(f"{flag} {pattern}: no tensor's name matches", ExitCode.MODEL, hint=f"tensors: {some(names)}")
    return found


def some(names: list[str]) -> str:
    """A few names, block numbers left out, for hints."""
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in names))
    return ", ".join(kinds[:12]) + (", ..." if len(kinds) > 12 else "")
