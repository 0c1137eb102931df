"""What each command is asked to do: every option with its type, default and help, written once.

`ftkit.cli` turns these dataclasses into command lines; `ftkit.core.configuration` fills them from flags,
environment and files. Nothing here imports a heavy library.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal, TypeVar

from ftkit.core.byte_sizes import byte_size
from ftkit.core.durations import rhythm_of, seconds_of
from ftkit.core.methods import METHODS, recipe_of, why_unused
from ftkit.errors import ExitCode, UserError


@dataclass(frozen=True)
class Option:
    """How a field is typed on the command line: its help, extra names (`-o`), what stands for its value."""

    help: str
    names: tuple[str, ...] = ()
    metavar: str | None = None
    environment: bool = True
    """Whether the variable FTKIT_<NAME> sets it too."""


@dataclass(frozen=True)
class Argument:
    """A positional argument of a command."""

    help: str
    metavar: str


@dataclass(frozen=True)
class PrepSettings:
    """Turn tables, files of records, conversations or plain text into training rows (JSONL)."""

    inputs: Annotated[
        list[str],
        Argument(
            "CSV, TSV, JSON, JSONL, Parquet or text, also .gz or .zst; folders; hf:org/name:split; - is stdin; "
            "a.jsonl=0.7 mixes",
            "INPUT...",
        ),
    ] = ()  # type: ignore[assignment]
    template: Annotated[str | None, Option("A shipped template's name or a .toml file", metavar="NAME|FILE")] = None
    list_templates: Annotated[bool, Option("List the shipped templates and what they need, and leave")] = False
    map: Annotated[
        list[str],
        Option(
            "Fill a field of the template: output=description, instruction='Describe {product}'",
            metavar="FIELD=COLUMN|TEXT",
        ),
    ] = ()  # type: ignore[assignment]
    output: Annotated[
        str | None, Option("File for the rows (a folder with --split); stdout if absent", ("-o",), "PATH")
    ] = None
    split: Annotated[
        str | None, Option("Split by content hash: train=0.9,valid=0.1 (needs -o FOLDER)", metavar="NAME=SHARE,...")
    ] = None
    stratify: Annotated[
        str | None, Option("With --split: keep the shares within each value of this column", metavar="COLUMN")
    ] = None
    where: Annotated[
        str | None,
        Option("Keep the records for which this holds: \"lang == 'en' and stars|int > 3\"", metavar="EXPRESSION"),
    ] = None
    min_chars: Annotated[int | None, Option("Leave out rows with fewer characters in all their texts", metavar="N")] = (
        None
    )
    max_chars: Annotated[int | None, Option("Leave out rows with more characters in all their texts", metavar="N")] = (
        None
    )
    dedupe: Annotated[
        Literal["exact", "near", "none"],
        Option("Leave out rows that are equal to an earlier one, or nearly so (MinHash)"),
    ] = "exact"
    near: Annotated[
        float, Option("With --dedupe near: share of common word triples from which rows count as the same")
    ] = 0.8
    sample: Annotated[str | None, Option("Take this many rows at random, or this share of them", metavar="N|SHARE")] = (
        None
    )
    shuffle: Annotated[bool, Option("Put the rows in random order, also more than memory holds")] = False
    seed: Annotated[int, Option("Seed of --sample and --shuffle")] = 42
    tokenizer: Annotated[str | None, Option("Model whose tokenizer counts tokens", metavar="MODEL")] = None
    max_tokens: Annotated[int | None, Option("Longest row, in tokens of --tokenizer", metavar="N")] = None
    overlength: Annotated[Literal["drop", "truncate", "error"], Option("What a row beyond --max-tokens does")] = "drop"
    show: Annotated[
        int,
        Option(
            "Print the first N rows as the model sees them: trained tokens marked, a bar between tokens", metavar="N"
        ),
    ] = 0
    stats: Annotated[bool, Option("Print lengths, their histogram, labels and leaks between the parts of a split")] = (
        False
    )
    against: Annotated[
        str | None, Option("Warn of rows that are also in this file of rows (a test set)", metavar="FILE")
    ] = None
    strict: Annotated[bool, Option("Rows also found by --against are an error")] = False
    augment: Annotated[
        str | None,
        Option(
            "Pass each record through a Python function: a record in, a list of records out", metavar="FILE.py:FUNCTION"
        ),
    ] = None
    plain: Annotated[bool, Option("Leave ftkit's own keys (template, pattern, meta) out of the rows")] = False
    on_error: Annotated[Literal["stop", "skip"], Option("What a bad row does")] = "stop"
    rejects: Annotated[
        str | None, Option("With --on-error skip: write the rejected rows and reasons here", metavar="FILE")
    ] = None
    format: Annotated[Literal["auto", "csv", "json", "jsonl", "parquet", "text"], Option("Format of the input")] = (
        "auto"
    )
    encoding: Annotated[
        str | None, Option("Text encoding of the input; found by itself for UTF-8 and byte order marks")
    ] = None
    delimiter: Annotated[str | None, Option("Column delimiter of a table; found by itself", metavar="CHAR")] = None
    columns: Annotated[
        str | None, Option("Names of the columns of a table that has no line of them", metavar="NAME,...")
    ] = None
    no_header: Annotated[bool, Option("The table has no line of column names: columns are called 1, 2, 3")] = False
    skip_lines: Annotated[int, Option("Lines above the table that are no part of it", metavar="N")] = 0
    quoting: Annotated[
        Literal["standard", "none"], Option("none: a quote in a table is a character like any other")
    ] = "standard"
    records: Annotated[
        str | None, Option("Key (dotted: a.b) of the list of records inside a JSON object", metavar="KEY")
    ] = None
    documents: Annotated[
        Literal["file", "paragraph", "line"] | None,
        Option("Read plain text; a row is the whole file, a paragraph or a line"),
    ] = None
    turns: Annotated[
        str | None,
        Option(
            "Dialogues as plain text: what user and assistant turns begin with, as User:,Bot:", metavar="USER,ASSISTANT"
        ),
    ] = None
    max_field_bytes: Annotated[int, Option("Longest value accepted in a table")] = 10_000_000
    jobs: Annotated[int, Option("Processes that make the rows; the result is the same", metavar="N")] = 1
    shard: Annotated[
        str | None,
        Option(
            "Part I of N of the records, for array jobs: the parts are the whole; equal records are in one part, where "
            "--dedupe exact finds them",
            metavar="I/N",
        ),
    ] = None
    force: Annotated[bool, Option("Replace the output if it exists")] = False
    json: Annotated[bool, Option("Print the summary as one JSON object on stdout (rows then need -o)")] = False

    def check(self) -> None:
        """Raise a usage error for a value out of range or options that need another."""
        require(self.jobs >= 1, "--jobs", self.jobs, "1 or more")
        require(self.max_field_bytes >= 1, "--max-field-bytes", self.max_field_bytes, "1 or more")
        require(self.skip_lines >= 0, "--skip-lines", self.skip_lines, "0 or more")
        require(0 < self.near <= 1, "--near", self.near, "above 0, at most 1")
        require(self.max_tokens is None or self.max_tokens >= 2, "--max-tokens", self.max_tokens, "2 or more")
        require(self.show >= 0, "--show", self.show, "0 or more")
        require_seed(self.seed)
        for name, needed in (("stratify", "split"), ("strict", "against"), ("max_tokens", "tokenizer")):
            if getattr(self, name) and not getattr(self, needed):
                raise UserError(
                    f"{flag_of(name)} needs {flag_of(needed)}", ExitCode.USAGE, hint=f"give {flag_of(needed)} too"
                )


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
        Option("Tokens per forward pass; auto: 4096, or --micro-batch times the longest row", metavar="auto|TOKENS"),
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


METHOD_FLAGS = ("lora", "qlora", "load_in_8bit", "full")
METHOD_WORDS = (*METHOD_FLAGS, "method")
"""Options that each ask for a method."""
ESTIMATE_RIVALS = [
    *(("gpu", other) for other in ("fit", "measure")),
    *(("fast", other) for other in ("measure", "data")),
    *(("fit", other) for other in ("compare", "measure", "data")),
    *(("compare", other) for other in ("measure", "data")),
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
        if self.gpus > 1 and (self.data or self.measure):
            raise UserError(
                "--gpus is of the formula, which takes neither --data nor --measure",
                ExitCode.USAGE,
                hint="leave out --gpus",
            )
        if self.framework == "hf" and not self.is_described:
            what = "--framework hf is a script of plain LoRA or full training"
            raise UserError(what, ExitCode.USAGE, hint="leave out --framework, or the method's options")
        if self.framework == "hf" and (self.fast or self.data or self.measure or self.gpus > 1):
            raise UserError(
                "--framework hf is simulated with rows of --max-length only",
                ExitCode.USAGE,
                hint="leave out --fast, --data, --measure and --gpus",
            )


@dataclass(frozen=True)
class TrainSettings(ModelSettings):
    """Fine-tune a model on rows; writes a run folder with the adapter and prints its path."""

    data: Annotated[str | None, Argument("Rows written by `ftkit prep`; stdin if absent or -", "DATA")] = None
    valid: Annotated[str, Option("Held-out rows: a file, a share of the data, or 0 for none", metavar="FILE|SHARE")] = (
        "0.05"
    )
    objective: Annotated[
        Literal["auto", "sft", "text", "classify"],
        Option("What is learned: answers (sft), all of the text, or labels (classify); found from the rows"),
    ] = "auto"
    across: Annotated[
        bool, Option("Text: join documents to rows of --max-length, and let attention cross from one to the next")
    ] = False
    train_turns: Annotated[
        Literal["all", "last"], Option("Which of the assistant's turns of a conversation are trained")
    ] = "all"
    class_weights: Annotated[
        Literal["none", "balanced"], Option("balanced: every label counts the same, however many rows it has")
    ] = "none"
    init: Annotated[
        str | None, Option("Train from scratch: folder with a config.json and a tokenizer", metavar="CONFIG")
    ] = None
    lr: Annotated[
        float | None,
        Option(
            "Learning rate; 2e-4 for LoRA (1e-3 with labels), 2e-5 for --full, 1e-3 from scratch, else see the docs"
        ),
    ] = None
    lora_plus: Annotated[
        float | None, Option("LoRA+: the second factor learns this many times as fast", metavar="RATIO")
    ] = None
    save: Annotated[
        Literal["auto", "changed", "full"],
        Option("Trained weights: the changed tensors alone or a whole model; auto: whole where all were trained"),
    ] = "auto"
    epochs: Annotated[float, Option("Passes over the data")] = 3.0
    steps: Annotated[int | None, Option("Optimizer steps; replaces --epochs")] = None
    schedule: Annotated[
        Literal["linear", "cosine", "constant", "wsd"],
        Option("Course of the learning rate after warm-up; wsd: constant, falling in the last tenth"),
    ] = "linear"
    warmup: Annotated[
        float, Option("Steps in which the learning rate rises from 0; below 1 a share", metavar="SHARE|STEPS")
    ] = 0.03
    weight_decay: Annotated[float, Option("Decoupled weight decay of matrices")] = 0.0
    max_grad_norm: Annotated[float, Option("Gradients are clipped to this norm")] = 1.0
    neftune: Annotated[
        float, Option("Noise on the embeddings while training, of this strength: 5 to 15 (NEFTune)", metavar="ALPHA")
    ] = 0.0
    label_smoothing: Annotated[
        float, Option("Share of a trained token's probability that is spread over all others", metavar="SHARE")
    ] = 0.0
    overlength: Annotated[
        Literal["drop", "truncate"], Option("What happens to rows beyond --max-length; both are counted")
    ] = "drop"
    seed: Annotated[int, Option("Seed of order, dropout and new weights")] = 42
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], Option("Where to train")] = "auto"
    template: Annotated[
        str | None, Option("The template file that the rows were made with, if it is your own", metavar="FILE")
    ] = None
    save_every: Annotated[
        str,
        Option(
            "Steps, share or time between checkpoints: 100, 10%, 30m; auto: 10m, or 10% with --early-stop",
            metavar="auto|STEPS|SHARE|TIME",
        ),
    ] = "auto"
    keep: Annotated[int, Option("Checkpoints that stay, the best one not counted", metavar="N")] = 2
    early_stop: Annotated[
        int | None,
        Option("Stop after N checkpoints without a lower held-out loss, and keep the best one", metavar="N"),
    ] = None
    resume: Annotated[
        Literal["auto", "never"], Option("Go on with an unfinished run of the same rows and settings")
    ] = "auto"
    allow_change: Annotated[
        bool, Option("With --run: go on though settings such as --lr or --steps are others now")
    ] = False
    time_limit: Annotated[
        str | None, Option("Save and end with status 75 before this time is over: 55m, 1h30m", metavar="TIME")
    ] = None
    run: Annotated[str | None, Option("Folder of this run; runs/<time>-<model>-<id> if absent", metavar="DIR")] = None
    force: Annotated[bool, Option("Train though the GPU is foretold to lack the memory for it")] = False
    tracker: Annotated[
        str | None, Option("Log to mlflow, tensorboard or wandb as well; several with commas", metavar="NAMES")
    ] = None
    dry_run: Annotated[bool, Option("Make every check, load no weights, train nothing")] = False
    json: Annotated[bool, Option("Print one JSON object instead of the run's path")] = False

    def check(self) -> None:
        """Raise a usage error for a value out of range."""
        super().check()
        require(self.lr is None or 0 < self.lr <= 1, "--lr", self.lr, "above 0, at most 1")
        require(0 < self.epochs < math.inf, "--epochs", self.epochs, "a number above 0")
        require(self.steps is None or self.steps >= 1, "--steps", self.steps, "1 or more")
        is_known = 0 <= self.warmup < 1 or (1 <= self.warmup < math.inf and self.warmup == int(self.warmup))
        require(is_known, "--warmup", self.warmup, "a share below 1, or a whole number of steps")
        require(0 <= self.weight_decay < math.inf, "--weight-decay", self.weight_decay, "0 or more")
        require(self.max_grad_norm > 0, "--max-grad-norm", self.max_grad_norm, "above 0")
        require(0 <= self.neftune < math.inf, "--neftune", self.neftune, "0 (none) or more; usual are 5 to 15")
        require(
            0 <= self.label_smoothing < 1, "--label-smoothing", self.label_smoothing, "0 up to, but not including, 1"
        )
        require_seed(self.seed)
        self.check_saving()
        require(
            self.lora_plus is None or 0 < self.lora_plus < math.inf, "--lora-plus", self.lora_plus, "a number above 0"
        )
        asked = [name for name in METHOD_WORDS if getattr(self, name)]
        if self.init and self.technique != "full" and (asked or self.technique == "layers"):
            flag = flag_of(asked[0] if asked else "train_layers" if self.train_layers else "freeze")
            raise UserError("--init trains every weight from scratch", ExitCode.USAGE, hint=f"leave out {flag}")
        if self.init and self.add_tokens:
            hint = "put them into the tokenizer in the folder of --init"
            raise UserError("--add-tokens is for a trained model; --init makes a new one", ExitCode.USAGE, hint=hint)
        if self.init and self.quantization:
            hint = "leave out --quantize"
            raise UserError("--init trains every weight from scratch", ExitCode.USAGE, hint=hint)
        if self.init and self.save != "auto":
            what = "--save is about weights of the base that are trained; --init makes all of them"
            raise UserError(what, ExitCode.USAGE, hint="leave it out")

    @property
    def makes_model(self) -> bool:
        """True where a whole model is written: from scratch, with every weight trained, or with --save full."""
        if self.init or self.save == "full":
            return True
        return self.save == "auto" and self.technique == "full"

    def check_saving(self) -> None:
        """The options about checkpoints and their times."""
        require(self.keep >= 1, "--keep", self.keep, "1 or more")
        require(self.early_stop is None or self.early_stop >= 1, "--early-stop", self.early_stop, "1 or more")
        limit = self.time_limit
        require(limit is None or seconds_of(limit) is not None, "--time-limit", limit, "a time such as 55m or 1h30m")
        rhythm = rhythm_of(self.save_every, steps=100)
        is_known = self.save_every == "auto" or rhythm is not None
        require(is_known, "--save-every", self.save_every, "steps, a share such as 10%, or a time such as 30m")
        if self.early_stop and self.valid == "0":
            raise UserError("--early-stop compares held-out losses, --valid 0 holds no row out", ExitCode.USAGE,
                            hint="--valid 0.05")  # fmt: skip
        if self.early_stop and rhythm is not None and rhythm.steps is None:
            raise UserError(
                "--early-stop compares checkpoints of fixed steps, --save-every gives a time",
                ExitCode.USAGE,
                hint="--save-every 10%",
            )


@dataclass(frozen=True)
class EvalSettings:
    """Say whether a run is better than its base, how sure that is, and what it forgot, on rows it has not seen."""

    data: Annotated[
        list[str],
        Argument("Rows to score; the rows that the run held out if absent; - is stdin", "DATA"),
    ] = ()  # type: ignore[assignment]
    run: Annotated[str | None, Option("Run folder; the run that completed last if absent", metavar="RUN")] = None
    # not from the environment: FTKIT_MODEL is the base to train, and must not replace the run that came of it
    model: Annotated[
        str | None,
        Option(
            "Score a model instead of a run: a folder, a Hugging Face id, builtin:tiny",
            metavar="MODEL",
            environment=False,
        ),
    ] = None
    baseline: Annotated[bool, Option("Score the untuned base beside it, with 95 % intervals of the difference")] = False
    against: Annotated[
        list[str], Option("Compare with this run or model on the same rows; may be given several times", metavar="RUN")
    ] = ()  # type: ignore[assignment]
    forgetting: Annotated[
        str | None,
        Option(
            "General text (rows): its loss before and after training; default: the text that comes with ftkit",
            metavar="FILE|default",
        ),
    ] = None
    metrics: Annotated[
        str | None,
        Option(
            "Only these: loss, exact_match, f1, rouge, bleu, chrf, json, fields, labels; what fits the rows if absent",
            metavar="NAME,...",
        ),
    ] = None
    lang: Annotated[
        str | None, Option("Language of the answers (zh, ja, ...), for BLEU's tokenizer", metavar="CODE")
    ] = None
    schema: Annotated[str | None, Option("JSON schema that answers must fit", metavar="FILE")] = None
    extract: Annotated[
        str | None,
        Option("Compare what this finds last in answer and reference: its group, or all of it", metavar="REGEX"),
    ] = None
    scorer: Annotated[
        list[str],
        Option("A function of your own: (answer, reference, row) -> a number or a dict", metavar="FILE.py:FUNCTION"),
    ] = ()  # type: ignore[assignment]
    fail_under: Annotated[
        list[str],
        Option("Exit 8 if a score is worse than this: f1=0.7, loss=1.5 (losses: above it)", metavar="NAME=VALUE"),
    ] = ()  # type: ignore[assignment]
    fail_if_worse: Annotated[
        bool, Option("Exit 8 if any score is clearly worse than that of --baseline or --against")
    ] = False
    report: Annotated[str | None, Option("Write a page for the browser: one file, no network", metavar="FILE.html")] = (
        None
    )
    compare_runs: Annotated[bool, Option("DATA are run folders: one line each, with its settings and scores")] = False
    max_new: Annotated[int, Option("Longest generated answer", metavar="TOKENS")] = 256
    temperature: Annotated[float, Option("0 always takes the likeliest token; higher is more varied")] = 0.0
    batch: Annotated[int, Option("Rows generated at once", metavar="ROWS")] = 16
    seed: Annotated[
        list[str],
        Option("Seed of the bootstrap and of sampling; several with --temperature: scores are averaged", metavar="N"),
    ] = ("42",)  # type: ignore[assignment]
    cache: Annotated[
        str | None,
        Option("Keep answers in this file as they come; what is there is not computed again", metavar="FILE"),
    ] = None
    output: Annotated[str | None, Option("File for the predictions (JSONL); stdout if absent", ("-o",), "FILE")] = None
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], Option("Where to run")] = "auto"
    template: Annotated[
        str | None, Option("Template file for rows that name your own, if the run does not carry it", metavar="FILE")
    ] = None
    force: Annotated[bool, Option("Replace the outputs if they exist")] = False
    json: Annotated[bool, Option("Print the scores as one JSON object on stdout (predictions then need -o)")] = False

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds as numbers, each once."""
        return tuple(dict.fromkeys(map(int, self.seed)))

    def check(self) -> None:
        """Raise a usage error for a value out of range or options that contradict each other."""
        require(self.max_new >= 1, "--max-new", self.max_new, "1 or more")
        require(self.batch >= 1, "--batch", self.batch, "1 or more")
        require(0 <= self.temperature < math.inf, "--temperature", self.temperature, "0 or more")
        for seed in self.seed:
            require(seed.isdecimal() and seed.isascii(), "--seed", seed, "0 up to 2^63 - 1")
            require_seed(int(seed))
        self._check_what_excludes()
        self._check_what_is_needed()

    def _check_what_excludes(self) -> None:
        for one, other, hint in (
            ("run", "model", "give one of them"),
            ("compare_runs", "run", "with --compare-runs the runs are arguments: ftkit eval --compare-runs runs/*"),
            ("compare_runs", "model", "with --compare-runs the runs are arguments: ftkit eval --compare-runs runs/*"),
            ("compare_runs", "baseline", "compare one run with its base: ftkit eval --run RUN --baseline"),
            ("compare_runs", "against", "leave --against out: every run has a line"),
            ("compare_runs", "forgetting", "look at one run: ftkit eval --run RUN --forgetting default"),
            ("compare_runs", "fail_under", "gates are for one run: ftkit eval --run RUN --fail-under f1=0.7"),
        ):
            if getattr(self, one) and getattr(self, other):
                what = f"{flag_of(one)} and {flag_of(other)} contradict each other"
                raise UserError(what, ExitCode.USAGE, hint=hint)
        if self.model and self.baseline:
            raise UserError(
                "--baseline compares a run with its base; --model has none", ExitCode.USAGE, hint="give --run"
            )
        if len(self.data) > 1 and not self.compare_runs:
            what = f"one file of rows at a time, not {len(self.data)}"
            raise UserError(what, ExitCode.USAGE, hint="cat them together; for runs: ftkit eval --compare-runs runs/*")

    def _check_what_is_needed(self) -> None:
        if self.fail_if_worse and not (self.baseline or self.against):
            what = "--fail-if-worse needs something to compare with"
            raise UserError(what, ExitCode.USAGE, hint="ftkit eval --baseline --fail-if-worse, or --against RUN")
        if len(self.seeds) > 1 and self.temperature == 0:
            what = "several --seed change nothing at temperature 0: the likeliest token is always taken"
            raise UserError(what, ExitCode.USAGE, hint="give --temperature 0.7, or one --seed")
        for name in ("output", "report"):
            if getattr(self, name) and getattr(self, name) in self.data:
                raise UserError(f"{flag_of(name)} is the input file", ExitCode.USAGE, hint="give another file")


@dataclass(frozen=True)
class MergeSettings:
    """Add a run's adapter into its base model, prove that the result is what was trained, and publish it."""

    run: Annotated[
        str | None, Argument("Run folder or adapter folder; the run that completed last if absent", "RUN")
    ] = None
    output: Annotated[str | None, Option("Folder for the merged model; RUN/merged if absent", ("-o",), "DIR")] = None
    onto: Annotated[
        Literal["auto", "trained", "original"],
        Option("Add to the weights that training saw (trained: the default) or to the unquantised ones (original)"),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"], Option("Number format of the merged weights; auto keeps the base's")
    ] = "auto"
    adapter: Annotated[
        list[str], Option("Instead of RUN: several adapters of one base, each with a weight", metavar="PATH=WEIGHT")
    ] = ()  # type: ignore[assignment]
    combine: Annotated[
        Literal["cat", "linear", "svd", "ties", "dare-ties"],
        Option("How several adapters become one: cat is their exact sum, svd that sum at the largest rank"),
    ] = "cat"
    density: Annotated[float, Option("Share of values that ties and dare-ties keep")] = 0.5
    seed: Annotated[int, Option("Seed of dare-ties, which keeps values at random")] = 42
    trained_on: Annotated[
        Literal["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"] | None,
        Option("How the base was quantised in training, for adapters of other tools (dq: double quantisation)"),
    ] = None
    untie: Annotated[
        bool, Option("Give a tied head a tensor of its own, where the adapter changes it or the embeddings alone")
    ] = False
    dequantise: Annotated[
        bool, Option("Where the base is quantised on disk (bitsandbytes): merge onto the numbers that it stands for")
    ] = False
    shard_size: Annotated[str, Option("Largest file of weights, such as 500MB or 5GB", metavar="SIZE")] = "5GB"
    check: Annotated[int, Option("Probe prompts of the proof", metavar="N")] = 8
    no_check: Annotated[bool, Option("Publish without the proof; the model card says UNPROVEN")] = False
    push_to_hub: Annotated[
        str | None, Option("Upload the proven model there, too; a new repository is private", metavar="OWNER/NAME")
    ] = None
    force: Annotated[bool, Option("Replace the output if it exists")] = False
    json: Annotated[bool, Option("Print merge.json on stdout instead of the path")] = False

    @property
    def shard_bytes(self) -> int:
        """`shard_size` in bytes; 0 where it is no size."""
        return byte_size(self.shard_size) or 0

    def check_ranges(self) -> None:
        """Raise a usage error for a value out of range."""
        require(self.check >= 1, "--check", self.check, "1 or more")
        require(self.shard_bytes >= 1, "--shard-size", self.shard_size, "a size such as 500MB or 5GB")
        if self.push_to_hub is not None and self.no_check:
            what = "--push-to-hub publishes only what was proven, and --no-check proves nothing"
            raise UserError(what, ExitCode.USAGE, hint="leave one of them out")


@dataclass(frozen=True)
class ChatSettings:
    """Talk to a run, a merged model or any model; lines or JSONL in, answers out when piped."""

    runs: Annotated[
        list[str],
        Argument("Runs, adapters or models, several if of one base; the run that completed last if absent", "RUN..."),
    ] = ()  # type: ignore[assignment]
    prompt: Annotated[str | None, Option("Answer this and leave", ("-p",), "TEXT")] = None
    system: Annotated[
        str | None,
        Option("System message, for chat templates; that of training if absent, '' for none", metavar="TEXT"),
    ] = None
    template: Annotated[
        str | None, Option("Template to use instead of the one that training stored", metavar="NAME|FILE")
    ] = None
    max_new: Annotated[
        int | None, Option("Longest answer; if absent as the model says, else 256", metavar="TOKENS")
    ] = None
    temperature: Annotated[
        float | None,
        Option("0 always takes the likeliest token, higher is more varied; if absent as the model says, else 0"),
    ] = None
    top_k: Annotated[
        int | None, Option("With a temperature: draw from the N likeliest tokens only, 0 from all", metavar="N")
    ] = None
    top_p: Annotated[
        float | None,
        Option("With a temperature: draw from the fewest tokens that have this probability together", metavar="SHARE"),
    ] = None
    seed: Annotated[int, Option("Seed of the sampling")] = 42
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], Option("Where to run")] = "auto"
    json: Annotated[bool, Option("One JSON object per answer")] = False

    def check(self) -> None:
        """Raise a usage error for a value out of range."""
        require(self.max_new is None or self.max_new >= 1, "--max-new", self.max_new, "1 or more")
        is_warm = self.temperature is None or 0 <= self.temperature < math.inf
        require(is_warm, "--temperature", self.temperature, "0 or more")
        require(self.top_k is None or self.top_k >= 0, "--top-k", self.top_k, "0 (all) or more")
        require(self.top_p is None or 0 < self.top_p <= 1, "--top-p", self.top_p, "above 0, at most 1")
        require_seed(self.seed)


def flag_of(field_name: str) -> str:
    """`load_in_8bit` -> `--load-in-8bit`."""
    return "--" + field_name.replace("_", "-")


def require(holds: bool, flag: str, value: object, allowed: str) -> None:
    """Raise a usage error that names the flag, its value and the allowed range."""
    if not holds:
        raise UserError(f"{flag} {value} is out of range", ExitCode.USAGE, hint=f"{flag} takes {allowed}")


def require_seed(seed: int) -> None:
    """Seeds are what torch's generators take without folding two of them into one."""
    require(0 <= seed < 2**63, "--seed", seed, "0 up to 2^63 - 1")
