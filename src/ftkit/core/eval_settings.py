"""The options of `ftkit eval`."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from ftkit.core.options import Argument, Option, flag_of, require, require_seed
from ftkit.errors import ExitCode, UserError


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
