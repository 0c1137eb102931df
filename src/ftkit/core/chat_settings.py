"""The options of `ftkit chat`."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from ftkit.core.options import Argument, Option, require, require_seed


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
