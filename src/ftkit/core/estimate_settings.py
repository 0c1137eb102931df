"""The options of `ftkit estimate-memory`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from ftkit.core.model_settings import METHOD_WORDS, ModelSettings
from ftkit.core.options import Option, flag_of, require
from ftkit.errors import ExitCode, UserError

ESTIMATE_RIVALS = [
    *(("gpu", other) for other in ("fit", "measure")),
    *(("fast", other) for other in ("measure", "data")),
    *(("fit", other) for other in ("compare", "measure", "data")),
    *(("compare", other) for other in ("measure", "data", "method", "quantize", "train_layers", "freeze")),
]
"""Options of estimate-memory that exclude each other."""


@dataclass(frozen=True)
class EstimateSettings(ModelSettings):
    """Say how much memory training would take, before it runs and without a GPU."""

    gpu: Annotated[
        str | None, Option("Does it fit? A card's name (t4, 4090, a100-80, h100, ...) or a size", metavar="NAME|SIZE")
    ] = None
    fit: Annotated[
        str | None,
        Option(
            "Find settings that fit this card or size, and print the command to train with them", metavar="NAME|SIZE"
        ),
    ] = None
    compare: Annotated[bool, Option("One row a method: full, LoRA, 8-bit, QLoRA")] = False
    fast: Annotated[bool, Option("A formula of the model's sizes instead of the simulation: instant, within 3 %")] = (
        False
    )
    data: Annotated[
        str | None, Option("Rows written by `ftkit prep`: their real lengths, steps and tokens count", metavar="FILE")
    ] = None
    template: Annotated[
        str | None,
        Option("The template file that the rows of --data were made with, if it is your own", metavar="FILE"),
    ] = None
    framework: Annotated[
        Literal["ftkit", "hf"],
        Option("hf: a plain script of transformers and PEFT, as published figures are made with"),
    ] = "ftkit"
    gpus: Annotated[
        int, Option("Cards that share the work, by the formula (ftkit itself trains on one)", metavar="N")
    ] = 1
    parallel: Annotated[
        Literal["ddp", "zero1", "zero2", "zero3", "fsdp"], Option("How --gpus share weights, gradients and states")
    ] = "fsdp"
    measure: Annotated[
        bool, Option("Make two real steps with random weights on this machine, and show predicted beside measured")
    ] = False
    json: Annotated[bool, Option("Print one JSON object instead of the table")] = False

    def check(self) -> None:
        """Raise a usage error for a value out of range, or options that exclude each other."""
        super().check()
        require(self.gpus >= 1, "--gpus", self.gpus, "1 or more")
        for one, other in ESTIMATE_RIVALS:
            if getattr(self, one) and getattr(self, other):
                raise UserError(
                    f"{flag_of(one)} and {flag_of(other)} exclude each other", ExitCode.USAGE, hint="give one of them"
                )
        if self.gpus > 1 and (self.data or self.measure or self.fit):
            raise UserError(
                "--gpus is of the formula, which takes neither --data nor --measure, and --fit looks for a run on one card",
                ExitCode.USAGE,
                hint="leave out --gpus",
            )
        for flag, given, other in (
            ("--parallel", self.parallel != "fsdp" and self.gpus == 1, "--gpus"),
            ("--template", self.template and not self.data, "--data"),
        ):
            if given:
                raise UserError(f"{flag} is about {other}", ExitCode.USAGE, hint=f"give {other} too, or leave it out")
        if self.framework == "hf" and not self.is_described:
            what = "--framework hf is a script of plain LoRA or full training"
            raise UserError(what, ExitCode.USAGE, hint="leave out --framework, or the method's options")
        if self.framework == "hf" and (self.fast or self.data or self.measure or self.gpus > 1):
            raise UserError(
                "--framework hf is simulated with rows of --max-length only",
                ExitCode.USAGE,
                hint="leave out --fast, --data, --measure and --gpus",
            )


def settings_of_training(table: Mapping[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    """What costs memory in train's settings; places: where each stands. A new model (init) is one that is trained in full."""
    if table.get("objective") == "classify":
        raise UserError(
            f"{places['objective']}: a head for classes is not estimated here",
            ExitCode.ENVIRONMENT,
            hint="ftkit train with this file and --dry-run foretells its memory",
        )
    shared = {each.name: table[each.name] for each in fields(ModelSettings) if each.name in table}
    if table.get("init"):
        shared = {name: value for name, value in shared.items() if name not in METHOD_WORDS}
        shared |= {"model": table["init"], "full": True}
    return shared
