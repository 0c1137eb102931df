"""The options of `ftkit merge`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from ftkit.core.byte_sizes import byte_size
from ftkit.core.options import Argument, Option, require
from ftkit.errors import ExitCode, UserError


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
