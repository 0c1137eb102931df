"""The options of `ftkit train`."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from ftkit.core.durations import rhythm_of, seconds_of
from ftkit.core.model_settings import KEPT_CHECKPOINTS, METHOD_WORDS, ModelSettings
from ftkit.core.options import Argument, Option, flag_of, require, require_seed
from ftkit.errors import ExitCode, UserError


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
    keep: Annotated[int, Option("Checkpoints that stay, the best one not counted", metavar="N")] = KEPT_CHECKPOINTS
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
