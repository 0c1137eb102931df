"""The options that train and estimate-memory share: which model is trained, and how."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal, TypeVar

from ftkit.core.methods import METHODS, recipe_of, why_unused
from ftkit.core.options import Option, flag_of, require
from ftkit.errors import ExitCode, UserError

METHOD_FLAGS = ("lora", "qlora", "load_in_8bit", "full")
METHOD_WORDS = (*METHOD_FLAGS, "method")
"""Options that each ask for a method."""
KEPT_CHECKPOINTS = 2
"""Of a run, by default, beside its best one."""


@dataclass(frozen=True)
class ModelSettings:
    """Which model is trained, how, and what that costs in memory: the options that train and estimate-memory share."""

    model: Annotated[str, Option("Base model: builtin:tiny, a folder or a Hugging Face id", metavar="MODEL")] = (
        "builtin:tiny"
    )
    revision: Annotated[str | None, Option("Branch, tag or commit of a Hugging Face id")] = None
    lora: Annotated[bool, Option("LoRA on a 16- or 32-bit base (the default method)")] = False
    qlora: Annotated[bool, Option("LoRA on a 4-bit base: NF4, double quantisation")] = False
    load_in_8bit: Annotated[bool, Option("LoRA on an 8-bit base: LLM.int8()")] = False
    full: Annotated[bool, Option("Train every weight")] = False
    method: Annotated[
        Literal["lora", "ia3", "prompt", "prefix", "ln", "bitfit", "full"] | None,
        Option("What is trained: an adapter of PEFT, all biases (bitfit), or every weight"),
    ] = None
    train_layers: Annotated[
        str | None,
        Option(
            "Train these weights only: last:4, first:2 (blocks), or names of tensors", metavar="last:N|first:N|REGEX"
        ),
    ] = None
    freeze: Annotated[
        str | None, Option("Train weights but not these tensors; alone, all the others", metavar="REGEX")
    ] = None
    quantize: Annotated[
        Literal["nf4", "fp4", "int8"] | None, Option("Hold the frozen base in 4 or 8 bits (--qlora is nf4)")
    ] = None
    double_quant: Annotated[Literal["on", "off"], Option("Quantise the scales of 4-bit weights too")] = "on"
    keep_16bit: Annotated[
        str | None, Option("Layers that --quantize leaves in 16 bits, beside the output head", metavar="NAME,...")
    ] = None
    add_tokens: Annotated[
        str | None,
        Option("New tokens, one a line of this file: their embeddings are trained beside LoRA", metavar="FILE"),
    ] = None
    dora: Annotated[bool, Option("LoRA with a trained magnitude for each output (DoRA)")] = False
    rslora: Annotated[bool, Option("LoRA scaled by alpha / sqrt(r)")] = False
    lora_init: Annotated[
        Literal["zero", "pissa", "loftq"],
        Option("LoRA's start: nothing, main singular vectors, or the rounding error of 4 bits"),
    ] = "zero"
    rank_pattern: Annotated[
        str | None, Option("Ranks of some layers: q_proj=8,mlp.down_proj=32", metavar="NAME=RANK,...")
    ] = None
    virtual_tokens: Annotated[int, Option("Virtual tokens of --method prompt and prefix", metavar="N")] = 20
    r: Annotated[int, Option("Rank of the adapter", metavar="RANK")] = 16
    alpha: Annotated[float, Option("Scale of the adapter: its product is multiplied by alpha / r")] = 32.0
    targets: Annotated[
        str, Option("Adapted layers: all-linear (LoRA's auto), attention, mlp, or names, separated by commas")
    ] = "auto"
    dropout: Annotated[float, Option("Dropout in front of the adapter")] = 0.0
    max_length: Annotated[int, Option("Longest row, in tokens (capped to the model's context)", metavar="TOKENS")] = (
        2048
    )
    batch: Annotated[int, Option("Rows per optimizer step (global batch)", metavar="ROWS")] = 16
    pack: Annotated[Literal["on", "off"], Option("Rows one after another in a sequence instead of padded")] = "on"
    share_prefix: Annotated[
        Literal["on", "off"], Option("In a pack, compute tokens that rows share from their start once")
    ] = "on"
    micro_tokens: Annotated[
        str,
        Option(
            "Tokens per forward pass; auto: 4096, of small models up to 8192, or --micro-batch times the longest row",
            metavar="auto|TOKENS",
        ),
    ] = "auto"
    micro_batch: Annotated[
        str, Option("Rows per forward pass where rows are padded; auto picks by length", metavar="auto|ROWS")
    ] = "auto"
    optimizer: Annotated[
        Literal[
            "adamw",
            "adamw-8bit",
            "paged-adamw",
            "paged-adamw-8bit",
            "adafactor",
            "lion",
            "lion-8bit",
            "paged-lion-8bit",
            "sgd",
        ],
        Option("Optimizer; paged ones need CUDA; 8-bit ones and lion are from bitsandbytes"),
    ] = "adamw"
    gradient_checkpointing: Annotated[
        Literal["auto", "on", "off"], Option("Recompute activations in the backward pass: slower, less memory")
    ] = "auto"
    checkpoint_every: Annotated[int, Option("With --gradient-checkpointing: recompute one block of N", metavar="N")] = 1
    offload_activations: Annotated[
        bool, Option("With --gradient-checkpointing on: what blocks keep waits in the computer's memory (CUDA)")
    ] = False
    dtype: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"], Option("Number format of the frozen weights and activations")
    ] = "auto"

    @property
    def technique(self) -> str:
        """The one method that was asked for, a key of METHODS; LoRA if none was."""
        asked = [name for name in METHOD_WORDS if getattr(self, name)]
        if len(asked) > 1:
            flags = " and ".join(flag_of(name) for name in asked)
            raise UserError(f"{flags} contradict each other", ExitCode.USAGE, hint=f"give one of them{self._instead()}")
        technique = self.method or ("full" if self.full else "lora")
        if self.train_layers or (self.freeze and (technique == "full" or not asked)):
            if asked and technique != "full":
                flag = f"--method {self.method}" if self.method else flag_of(asked[0])
                what = f"--train-layers is a method of its own, {flag} another"
                raise UserError(what, ExitCode.USAGE, hint="give one of them")
            return "layers"
        return technique

    def _instead(self) -> str:
        bits = next((word for name, word in (("qlora", "nf4"), ("load_in_8bit", "int8")) if getattr(self, name)), None)
        return f"; or --method {self.method} --quantize {bits}" if self.method and bits else ""

    @property
    def quantization(self) -> str | None:
        """How the frozen base is held: nf4, nf4-dq, fp4, fp4-dq, int8; None for 16 or 32 bits. dq: scales quantised too."""
        asked = [name for name in ("qlora", "load_in_8bit", "quantize") if getattr(self, name)]
        if len(asked) > 1:
            flags = " and ".join(flag_of(name) for name in asked)
            raise UserError(f"{flags} contradict each other", ExitCode.USAGE, hint="give one of them")
        kind = self.quantize or ("nf4" if self.qlora else "int8" if self.load_in_8bit else None)
        return f"{kind}-dq" if kind in ("nf4", "fp4") and self.double_quant == "on" else kind

    @property
    def kept_names(self) -> list[str]:
        """Layers that --keep-16bit names."""
        return [name for part in (self.keep_16bit or "").split(",") if (name := part.strip())]

    @property
    def recipe(self) -> str:
        """Method and quantisation in one word: lora, qlora, int8, full, ia3/nf4-dq."""
        return recipe_of(self.technique, self.quantization)

    @property
    def trains_weights(self) -> bool:
        """True where weights of the model itself are trained."""
        return METHODS[self.technique].trains_weights

    @property
    def needs_fp32(self) -> bool:
        """True where float32 is the format unless another is asked for: weights are trained, or PEFT's IA3 mixes formats."""
        return self.trains_weights or (self.technique == "ia3" and self.quantization is not None)

    @property
    def is_described(self) -> bool:
        """True for what the closed form of the memory knows: full training, and LoRA of one rank."""
        if self.recipe not in ("lora", "qlora", "int8", "full") or self.checkpoint_every > 1:
            return False
        is_plain = not (self.dora or self.rank_pattern or self.keep_16bit or self.double_quant == "off")
        is_plain = is_plain and self.add_tokens is None and not self.offload_activations
        return is_plain and self.optimizer in ("adamw", "adamw-8bit", "paged-adamw-8bit", "sgd")

    def unused(self, given: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Of the options that were given, those that change nothing beside the others: what is wrong, what would work.

        A switch that is off and a value that is absent ask for nothing.
        """
        method, told = self.technique, None
        if getattr(self, "init", None):
            method, told = "full", "--init trains every weight"
        elif method == "layers" and not self.train_layers:
            told = "the method is --freeze"
        found = {}
        for name in (name for name in given if not (getattr(self, name) is None or getattr(self, name) is False)):
            why = why_unused(name, method, told) or self._unused_quantization(name)
            if why is not None:
                found[name] = why
        return found

    def _unused_quantization(self, name: str) -> tuple[str, str] | None:
        kind = self.quantization
        if name == "double_quant" and kind in (None, "int8"):
            return "is about 4-bit bases", "--qlora --double-quant off, or --quantize fp4 --double-quant off"
        if name == "keep_16bit" and kind is None:
            return "leaves layers out of a quantisation that was not asked for", "--qlora --keep-16bit NAME"
        return None

    def check(self) -> None:
        """Raise a usage error for a value out of range or options that contradict each other."""
        others = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        for name, (what, hint) in self.unused(others).items():
            raise UserError(f"{flag_of(name)} {what}", ExitCode.USAGE, hint=hint)
        self._check_method()
        self._check_quantization()
        require(self.r >= 1, "--r", self.r, "1 or more")
        require(self.checkpoint_every >= 1, "--checkpoint-every", self.checkpoint_every, "1 or more")
        for flag, asked in (
            ("--offload-activations", self.offload_activations),
            (f"--checkpoint-every {self.checkpoint_every}", self.checkpoint_every > 1),
        ):
            if asked and self.gradient_checkpointing != "on":
                what = f"{flag} is about recomputed blocks, and none are recomputed"
                raise UserError(what, ExitCode.USAGE, hint=f"--gradient-checkpointing on {flag}")
        require(self.virtual_tokens >= 1, "--virtual-tokens", self.virtual_tokens, "1 or more")
        require(0 < self.alpha < math.inf, "--alpha", self.alpha, "a number above 0")
        require(0 <= self.dropout < 1, "--dropout", self.dropout, "0 up to, but not including, 1")
        require(self.max_length >= 2, "--max-length", self.max_length, "2 or more")
        require(self.batch >= 1, "--batch", self.batch, "1 or more")
        for name in ("micro_batch", "micro_tokens"):
            micro = getattr(self, name)
            fits = micro == "auto" or (micro.isdecimal() and int(micro) >= 1)
            require(fits, flag_of(name), micro, "auto, or 1 or more")
        if self.trains_weights and self.dtype == "fp16":
            raise UserError(
                "--dtype fp16 is too narrow to train the weights themselves",
                ExitCode.USAGE,
                hint="--dtype auto, or an adapter: --lora",
            )

    def _check_method(self) -> None:
        if self.lora_init == "pissa" and (self.dora or self.rank_pattern):
            other = "--dora" if self.dora else "--rank-pattern"
            what = f"--lora-init pissa and {other} contradict each other: its result is saved as LoRA of twice the rank"
            raise UserError(what, ExitCode.USAGE, hint="give one of them")

    def _check_quantization(self) -> None:
        kind, technique = self.quantization, self.technique
        has_4_bits = kind is not None and kind != "int8"
        if kind and not METHODS[technique].is_adapter:
            what = f"{technique} trains the weights themselves, which a base of {4 if has_4_bits else 8} bits does not have"
            raise UserError(what, ExitCode.USAGE, hint="leave out the quantisation, or --method lora")
        if self.lora_init == "loftq" and not has_4_bits:
            what = "--lora-init loftq makes up for the rounding of 4 bits"
            raise UserError(what, ExitCode.USAGE, hint="--qlora --lora-init loftq")
        if technique == "ia3" and kind and self.dtype in ("bf16", "fp16"):
            what = f"--dtype {self.dtype}: IA3 on a quantised base computes in 32 bits, PEFT's layers would mix formats"
            raise UserError(what, ExitCode.USAGE, hint="leave out --dtype")
        if self.dora and kind == "int8":
            what = "--dora on an 8-bit base: PEFT reads its weights in a way that bitsandbytes does not recover from"
            raise UserError(what, ExitCode.USAGE, hint="--qlora --dora, or leave out --dora")
        if self.lora_init == "pissa" and kind:
            what = "--lora-init pissa takes its start out of the base's weights, which are quantised here"
            raise UserError(what, ExitCode.USAGE, hint="--lora-init loftq, or leave out the quantisation")


Settings = TypeVar("Settings", bound=ModelSettings)


def held_as_stored(settings: Settings, kind: str, name: str) -> Settings:
    """The settings for a base that is quantised on disk: `kind` as `quantization` says it. Exit 2 for what contradicts it."""
    bits, _, double = kind.partition("-")
    if settings.quantization not in (None, kind):
        what = f"{name} is quantised already ({kind}), and {settings.quantization} is asked for"
        raise UserError(what, ExitCode.USAGE, hint="leave out the quantisation; --double-quant is the files' too")
    for asked, reason in (("keep_16bit", "its files decide that"), ("init", "--init makes a new model")):
        if getattr(settings, asked, None):
            raise UserError(f"{name} is quantised already; {flag_of(asked)}: {reason}", ExitCode.USAGE,
                            hint=f"leave out {flag_of(asked)}")  # fmt: skip
    if settings.lora_init == "loftq":
        what = f"--lora-init loftq makes up for what rounding lost, which the files of {name} do not hold"
        raise UserError(what, ExitCode.USAGE, hint="give the 16-bit model that it was made from")
    double_quant = "off" if bits != "int8" and not double else "on"
    held: Settings = replace(settings, qlora=False, load_in_8bit=False, quantize=bits, double_quant=double_quant)  # type: ignore[arg-type]
    held.check()
    return held
