"""What each command is asked to do: every option with its type, default and help, written once.

`ftkit.cli` turns these dataclasses into command lines; `ftkit.core.configuration` fills them from flags,
environment and files. Nothing here imports a heavy library.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from ftkit.errors import ExitCode, UserError


@dataclass(frozen=True)
class Option:
    """How a field is typed on the command line: its help, extra names (`-o`), what stands for its value."""

    help: str
    names: tuple[str, ...] = ()
    metavar: str | None = None


@dataclass(frozen=True)
class Argument:
    """A positional argument of a command."""

    help: str
    metavar: str


@dataclass(frozen=True)
class PrepSettings:
    """Turn a table or a file of records into training rows (JSONL)."""

    inputs: Annotated[list[str], Argument("CSV, TSV, JSON or JSONL files; - is stdin", "INPUT...")] = ()  # type: ignore[assignment]
    template: Annotated[str | None, Option("A shipped template's name or a .toml file", metavar="NAME|FILE")] = None
    map: Annotated[
        list[str],
        Option("Fill a field of the template: output=description, instruction='Describe {product}'", metavar="FIELD=COLUMN|TEXT"),
    ] = ()  # type: ignore[assignment]
    output: Annotated[str | None, Option("File for the rows (a folder with --split); stdout if absent", ("-o",), "PATH")] = None
    split: Annotated[str | None, Option("Split by content hash: train=0.9,valid=0.1 (needs -o FOLDER)", metavar="NAME=SHARE,...")] = None
    dedupe: Annotated[Literal["exact", "none"], Option("Leave out rows that are equal to an earlier one")] = "exact"
    on_error: Annotated[Literal["stop", "skip"], Option("What a bad row does")] = "stop"
    rejects: Annotated[str | None, Option("With --on-error skip: write the rejected rows and reasons here", metavar="FILE")] = None
    format: Annotated[Literal["auto", "csv", "json", "jsonl"], Option("Format of the input")] = "auto"
    encoding: Annotated[str | None, Option("Text encoding of the input; found by itself for UTF-8 and byte order marks")] = None
    delimiter: Annotated[str | None, Option("Column delimiter of a table; found by itself", metavar="CHAR")] = None
    max_field_bytes: Annotated[int, Option("Longest value accepted in a table")] = 10_000_000
    force: Annotated[bool, Option("Replace the output if it exists")] = False
    json: Annotated[bool, Option("Print the summary as one JSON object on stdout (rows then need -o)")] = False


@dataclass(frozen=True)
class ModelSettings:
    """The options that decide which model is trained and what it costs in memory: shared by train and estimate-memory."""

    model: Annotated[str, Option("Base model: builtin:tiny, a folder or a Hugging Face id", metavar="MODEL")] = "builtin:tiny"
    revision: Annotated[str | None, Option("Branch, tag or commit of a Hugging Face id")] = None
    lora: Annotated[bool, Option("LoRA on a 16- or 32-bit base (the default method)")] = False
    qlora: Annotated[bool, Option("LoRA on a 4-bit base: NF4, double quantisation")] = False
    load_in_8bit: Annotated[bool, Option("LoRA on an 8-bit base: LLM.int8()")] = False
    full: Annotated[bool, Option("Train every weight")] = False
    r: Annotated[int, Option("Rank of the adapter", metavar="RANK")] = 16
    alpha: Annotated[float, Option("Scale of the adapter: its product is multiplied by alpha / r")] = 32.0
    targets: Annotated[
        str, Option("Adapted layers: all-linear, attention, mlp, or names, separated by commas")
    ] = "all-linear"
    dropout: Annotated[float, Option("Dropout in front of the adapter")] = 0.0
    max_length: Annotated[int, Option("Longest row, in tokens (capped to the model's context)", metavar="TOKENS")] = 2048
    batch: Annotated[int, Option("Rows per optimizer step (global batch)", metavar="ROWS")] = 16
    micro_batch: Annotated[str, Option("Rows per forward pass; auto picks by length", metavar="auto|ROWS")] = "auto"
    optimizer: Annotated[
        Literal["adamw", "adamw-8bit", "paged-adamw-8bit", "sgd"], Option("Optimizer; the 8-bit ones are from bitsandbytes")
    ] = "adamw"
    gradient_checkpointing: Annotated[
        Literal["auto", "on", "off"], Option("Recompute activations in the backward pass: slower, less memory")
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"], Option("Number format of the frozen weights and activations")
    ] = "auto"

    @property
    def method(self) -> Literal["lora", "qlora", "int8", "full"]:
        """The one training method that was asked for; LoRA if none was."""
        asked = [name for name in METHOD_FLAGS if getattr(self, name)]
        if len(asked) > 1:
            flags = " and ".join(flag_of(name) for name in asked)
            raise UserError(f"{flags} contradict each other", ExitCode.USAGE, hint="give one of them")
        return METHOD_FLAGS[asked[0]] if asked else "lora"

    def check(self) -> None:
        """Raise a usage error for a value out of range."""
        _ = self.method
        require(self.r >= 1, "--r", self.r, "1 or more")
        require(self.alpha > 0, "--alpha", self.alpha, "above 0")
        require(0 <= self.dropout < 1, "--dropout", self.dropout, "0 up to, but not including, 1")
        require(self.max_length >= 2, "--max-length", self.max_length, "2 or more")
        require(self.batch >= 1, "--batch", self.batch, "1 or more")
        micro = self.micro_batch
        require(micro == "auto" or (micro.isdigit() and int(micro) >= 1), "--micro-batch", micro, "auto, or 1 or more")


METHOD_FLAGS: dict[str, Literal["lora", "qlora", "int8", "full"]] = {
    "lora": "lora",
    "qlora": "qlora",
    "load_in_8bit": "int8",
    "full": "full",
}


@dataclass(frozen=True)
class EstimateSettings(ModelSettings):
    """Say how much memory training would take, before it runs and without a GPU."""

    gpu: Annotated[str | None, Option("Does it fit? A card's name (t4, 4090, a100-80, h100, ...) or a size", metavar="NAME|SIZE")] = None
    json: Annotated[bool, Option("Print one JSON object instead of the table")] = False


@dataclass(frozen=True)
class TrainSettings(ModelSettings):
    """Fine-tune a model on rows; writes a run folder with the adapter and prints its path."""

    data: Annotated[str | None, Argument("Rows written by `ftkit prep`; stdin if absent or -", "DATA")] = None
    valid: Annotated[str, Option("Held-out rows: a file, a share of the data, or 0 for none", metavar="FILE|SHARE")] = "0.05"
    objective: Annotated[Literal["auto", "sft", "text"], Option("What is learned: answers (sft) or all of the text; found from the rows")] = "auto"
    init: Annotated[
        str | None, Option("Train from scratch: folder with a config.json and a tokenizer", metavar="CONFIG")
    ] = None
    lr: Annotated[float | None, Option("Learning rate; 2e-4 for adapters, 2e-5 for --full, 1e-3 from scratch")] = None
    epochs: Annotated[float, Option("Passes over the data")] = 3.0
    steps: Annotated[int | None, Option("Optimizer steps; replaces --epochs")] = None
    schedule: Annotated[Literal["linear", "cosine", "constant"], Option("Course of the learning rate after warm-up")] = "linear"
    warmup: Annotated[float, Option("Share of the steps in which the learning rate rises from 0")] = 0.03
    weight_decay: Annotated[float, Option("Decoupled weight decay of matrices")] = 0.0
    max_grad_norm: Annotated[float, Option("Gradients are clipped to this norm")] = 1.0
    overlength: Annotated[Literal["drop", "truncate"], Option("What happens to rows beyond --max-length; both are counted")] = "drop"
    seed: Annotated[int, Option("Seed of order, dropout and new weights")] = 42
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], Option("Where to train")] = "auto"
    template: Annotated[str | None, Option("The template file that the rows were made with, if it is your own", metavar="FILE")] = None
    run: Annotated[str | None, Option("Folder of this run; runs/<time>-<model>-<id> if absent", metavar="DIR")] = None
    dry_run: Annotated[bool, Option("Make every check, load no weights, train nothing")] = False
    json: Annotated[bool, Option("Print one JSON object instead of the run's path")] = False

    def check(self) -> None:
        """Raise a usage error for a value out of range."""
        super().check()
        require(self.lr is None or 0 < self.lr <= 1, "--lr", self.lr, "above 0, at most 1")
        require(self.epochs > 0, "--epochs", self.epochs, "above 0")
        require(self.steps is None or self.steps >= 1, "--steps", self.steps, "1 or more")
        require(0 <= self.warmup < 1, "--warmup", self.warmup, "0 up to, but not including, 1")
        require(self.weight_decay >= 0, "--weight-decay", self.weight_decay, "0 or more")
        require(self.max_grad_norm > 0, "--max-grad-norm", self.max_grad_norm, "above 0")
        if self.init and self.method != "full" and any(getattr(self, name) for name in METHOD_FLAGS):
            raise UserError("--init trains every weight from scratch", ExitCode.USAGE, hint=f"leave out --{self.method}")


@dataclass(frozen=True)
class EvalSettings:
    """Score a run on rows it has not seen: loss, perplexity and what it generates."""

    data: Annotated[str | None, Argument("Rows to score; the rows that the run held out if absent; - is stdin", "DATA")] = None
    run: Annotated[str | None, Option("Run folder; the run that completed last if absent", metavar="RUN")] = None
    model: Annotated[str | None, Option("Score a model instead of a run: a folder, a Hugging Face id, builtin:tiny", metavar="MODEL")] = None
    baseline: Annotated[bool, Option("Score the untuned base beside it, with 95 % intervals of the difference")] = False
    max_new: Annotated[int, Option("Longest generated answer", metavar="TOKENS")] = 256
    batch: Annotated[int, Option("Rows generated at once", metavar="ROWS")] = 16
    seed: Annotated[int, Option("Seed of the bootstrap")] = 42
    output: Annotated[str | None, Option("File for the predictions (JSONL); stdout if absent", ("-o",), "FILE")] = None
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], Option("Where to run")] = "auto"
    template: Annotated[str | None, Option("Template file for rows that name your own, if the run does not carry it", metavar="FILE")] = None
    force: Annotated[bool, Option("Replace the output if it exists")] = False
    json: Annotated[bool, Option("Print the scores as one JSON object on stdout (predictions then need -o)")] = False

    def check(self) -> None:
        """Raise a usage error for a value out of range or options that contradict each other."""
        require(self.max_new >= 1, "--max-new", self.max_new, "1 or more")
        require(self.batch >= 1, "--batch", self.batch, "1 or more")
        if self.run and self.model:
            raise UserError("--run and --model contradict each other", ExitCode.USAGE, hint="give one of them")
        if self.model and self.baseline:
            raise UserError("--baseline compares a run with its base; --model has none", ExitCode.USAGE, hint="give --run")


@dataclass(frozen=True)
class MergeSettings:
    """Add a run's adapter into its base model, prove that the result is what was trained, and publish it."""

    run: Annotated[str | None, Argument("Run folder or adapter folder; the run that completed last if absent", "RUN")] = None
    output: Annotated[str | None, Option("Folder for the merged model; RUN/merged if absent", ("-o",), "DIR")] = None
    onto: Annotated[
        Literal["auto", "trained", "original"],
        Option("Add to the weights that training saw (trained: the default) or to the unquantised ones (original)"),
    ] = "auto"
    dtype: Annotated[Literal["auto", "bf16", "fp16", "fp32"], Option("Number format of the merged weights; auto keeps the base's")] = "auto"
    check: Annotated[int, Option("Probe prompts of the proof", metavar="N")] = 8
    force: Annotated[bool, Option("Replace the output if it exists")] = False
    json: Annotated[bool, Option("Print merge.json on stdout instead of the path")] = False


@dataclass(frozen=True)
class ChatSettings:
    """Talk to a run, a merged model or any model; lines or JSONL in, answers out when piped."""

    run: Annotated[str | None, Argument("Run, folder or model; the run that completed last if absent", "RUN")] = None
    prompt: Annotated[str | None, Option("Answer this and leave", ("-p",), "TEXT")] = None
    system: Annotated[str | None, Option("System message, for chat templates", metavar="TEXT")] = None
    template: Annotated[str | None, Option("Template to use instead of the one that training stored", metavar="NAME|FILE")] = None
    max_new: Annotated[int, Option("Longest answer", metavar="TOKENS")] = 256
    temperature: Annotated[float, Option("0 always takes the likeliest token; higher is more varied")] = 0.0
    seed: Annotated[int, Option("Seed of the sampling")] = 42
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], Option("Where to run")] = "auto"
    json: Annotated[bool, Option("One JSON object per answer")] = False

    def check(self) -> None:
        """Raise a usage error for a value out of range."""
        require(self.max_new >= 1, "--max-new", self.max_new, "1 or more")
        require(self.temperature >= 0, "--temperature", self.temperature, "0 or more")


def flag_of(field_name: str) -> str:
    """`load_in_8bit` -> `--load-in-8bit`."""
    return "--" + field_name.replace("_", "-")


def require(holds: bool, flag: str, value: object, allowed: str) -> None:
    """Raise a usage error that names the flag, its value and the allowed range."""
    if not holds:
        raise UserError(f"{flag} {value} is out of range", ExitCode.USAGE, hint=f"{flag} takes {allowed}")
