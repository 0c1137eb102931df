"""Predicted against measured memory: python bench/score_memory.py FILE.csv [--write docs/memory.md]

FILE has the columns of tests/published/measured.csv, one measured number a row; bench/measure_memory.py writes such
files. Every row of a run that can be simulated exactly is simulated, without a GPU, and the errors are printed as a
table; the other rows are counted with the reason. Sizes of a model come from configs.json beside FILE or beside the
published rows, or else from the model's own folder or Hugging Face. No number here is fitted to the rows, but for one
input that its source does not publish: the longest batch of PEFT's benchmark, taken from one of its rows (`PEFT_LENGTH`).
"""

import argparse
import csv
import json
import re
import shlex
import statistics
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import (
    FourierFTConfig,
    LNTuningConfig,
    LoraConfig,
    MissConfig,
    VBLoRAConfig,
    VeraConfig,
)
from transformers import AutoConfig
from transformers.utils.logging import set_verbosity_error

from ftkit.core.caching_allocator import GIB
from ftkit.core.configuration import coerce, field_types
from ftkit.core.cuda_operators import CPU, HOPPER_WORKSPACE, CudaKernels
from ftkit.core.estimate_settings import EstimateSettings
from ftkit.core.memory_estimate import MemoryEstimate
from ftkit.core.memory_simulation import SimulatedDevice
from ftkit.core.plain_script import PlainScript, script_memory
from ftkit.core.planned_run import plan_run
from ftkit.core.training_memory import training_memory
from ftkit.io.devices import DTYPES
from ftkit.io.quantization import quantization_config

PEFT_LENGTH = 641
"""Tokens of the longest batch: where LoRA of rank 32 comes out as measured; the other eight rows are predictions."""
PUBLISHED = Path(__file__).parents[1] / "tests" / "published"
METRICS = ("reserved", "resident")
"""Words of `metric`; all else is allocated bytes."""
BEGIN, END = "<!-- begin: {} -->", "<!-- end: {} -->"
"""Around the tables of a file in a document, with the file's name."""


@dataclass(frozen=True)
class Score:
    """A measured row beside its prediction, both in bytes. group: rows of one source and one metric."""

    row: dict[str, str]
    group: str
    measured: float
    predicted: int

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted / self.measured - 1


class NotScored(Exception):
    """Why a row cannot be held against a simulation."""


# ---------------------------------------------------------------- from a row to a script
def script_of(row: dict[str, str]) -> PlainScript:
    """The script behind a row; NotScored where settings are unknown or the code is another."""
    framework, quality = row["framework"], row["quality"]
    if framework == "transformers+peft script" and quality == "A":
        return t4_script(row)
    if framework == "peft benchmark script":
        return peft_script(row)
    if framework == "torchtune" and quality == "A":
        return replace(common(row), adapter=None, optimizer="adamw", dtype=torch.bfloat16)
    if quality.startswith(("C", "B-legacy")):
        raise NotScored(f"quality {quality}")
    raise NotScored(f"{framework}: code or settings of its own (compile, offload, fused kernels, unknown lengths)")


def require_known(row: dict[str, str]) -> None:
    """NotScored for a run that cannot be simulated."""
    if row["framework"] != "ftkit":
        script_of(row)


def common(row: dict[str, str]) -> PlainScript:
    """What all scripts say in the same way."""
    return PlainScript(
        rows=int(row["micro_batch"]),
        tokens=int(row["seq_len"].split()[0]),
        dtype=torch.float16 if row["dtype"].startswith("fp16") else torch.bfloat16,
        adapter=None,
        attention=row["attention"].split()[0].split("/")[0],
        is_checkpointed=row["grad_ckpt"].startswith("yes"),
    )


def t4_script(row: dict[str, str]) -> PlainScript:
    """LoRA on a 16-bit or NF4 base (no double quantisation); outputs are kept through the optimizer's step."""
    adapter = LoraConfig(task_type="CAUSAL_LM", r=int(row["rank"]), target_modules=row["targets"].split(";"))
    quantization = quantization_config(row["quant"], torch.float16) if row["method"] == "qlora" else None
    return replace(common(row), adapter=adapter, quantization=quantization)


def peft_script(row: dict[str, str]) -> PlainScript:
    """Padded batches; a step's outputs live until the next forward pass is over."""
    targets = row["targets"].split(";")
    adapters: dict[str, Any] = {
        "full": lambda: None,
        "lora": lambda: LoraConfig(task_type="CAUSAL_LM", r=int(row["rank"]), target_modules=targets),
        "fourierft": lambda: FourierFTConfig(n_frequency=1000, scaling=300, target_modules=targets),
        "ln_tuning": LNTuningConfig,
        "miss": lambda: MissConfig(r=int(row["rank"])),
        "vblora": lambda: VBLoRAConfig(r=4, num_vectors=256, vector_length=256, topk=2, target_modules=targets),
        "vera": lambda: VeraConfig(r=int(row["rank"])),
    }
    row = row | {"seq_len": str(PEFT_LENGTH)}
    return replace(
        common(row), adapter=adapters[row["method"]](), is_padded=True, keeps_outputs="next forward",
        dtype=torch.bfloat16,
    )  # fmt: skip


def predict(row: dict[str, str], config: Any) -> MemoryEstimate:
    """The simulation of a row's run."""
    if row["framework"] == "ftkit":
        return ftkit_memory(row, config)
    return script_memory(script_of(row), config, device_of(row))


def ftkit_memory(row: dict[str, str], config: Any) -> MemoryEstimate:
    """A run that bench/measure_memory.py made; its notes are the options."""
    settings = settings_of(row["notes"])
    run = plan_run(replace(settings, dtype=row["dtype"]), config.max_position_embeddings, None)
    return training_memory(
        settings, run, config, quantization_config(run.method, DTYPES[run.dtype]), device=device_of(row)
    )


def settings_of(options: str) -> EstimateSettings:
    """Options as they were typed."""
    words, values = shlex.split(options), {}
    for place, word in enumerate(words):
        if word.startswith("--"):
            is_switch = place + 1 == len(words) or words[place + 1].startswith("--")
            values[word[2:].replace("-", "_")] = True if is_switch else words[place + 1]
    types = field_types(EstimateSettings)
    return EstimateSettings(**{name: coerce(value, types[name], name) for name, value in values.items()})


def device_of(row: dict[str, str]) -> SimulatedDevice:
    """The kernels of the card that a row was measured on."""
    if row["gpu"] == "CPU":
        return SimulatedDevice(CPU)
    if any(name in row["gpu"] for name in ("H100", "H200", "B200")):
        return SimulatedDevice(CudaKernels(workspace_bytes=HOPPER_WORKSPACE))
    return SimulatedDevice(CudaKernels(has_flash="T4" not in row["gpu"]))


def config_of(name: str, folder: Path) -> Any:
    """The sizes of a model: of configs.json, a folder, or Hugging Face."""
    configs: dict[str, Any] = {}
    for known in (PUBLISHED / "configs.json", folder / "configs.json"):
        configs |= json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    if name in configs:
        return AutoConfig.for_model(**configs[name])
    try:
        return AutoConfig.from_pretrained(name)
    except OSError as error:
        raise NotScored(f"no config.json of {name}") from error


# ---------------------------------------------------------------- scoring
def score_file(path: Path) -> tuple[list[Score], Counter[str]]:
    """(all rows that can be scored, how many cannot for which reason)."""
    scores: list[Score] = []
    skipped: Counter[str] = Counter()

    @cache
    def predicted_of(settings: tuple[tuple[str, str], ...]) -> MemoryEstimate:
        row = dict(settings)
        require_known(row)
        return predict(row, config_of(row["model"], path.parent))

    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            settings = {key: row[key] for key in row if key not in ("measured_gib", "metric")}
            try:
                estimate = predicted_of(tuple(settings.items()))
            except NotScored as reason:
                skipped[str(reason)] += 1
                continue
            metric = next((name for name in METRICS if name in row["metric"]), "allocated")
            predicted = estimate.reserved_bytes if metric == "reserved" else estimate.allocated_bytes
            unit = 10**9 if "GB=1e9" in row["metric"] else GIB
            group = f"{source_of(row)}, {metric}"
            scores.append(Score(row, group, float(row["measured_gib"]) * unit, predicted))
    return scores, skipped


def source_of(row: dict[str, str]) -> str:
    """A short name of who measured: the card and the kind of script."""
    return f"{row['framework']}, {row['gpu'].replace('Tesla ', '').split()[0]}"


def report(scores: list[Score], skipped: Counter[str]) -> str:
    """Two tables in Markdown, errors by source and every row, and what was left out."""
    lines = ["| source, metric | rows | median error | mean | worst |", "|---|---|---|---|---|"]
    for group in dict.fromkeys(score.group for score in scores):
        errors = [score.error for score in scores if score.group == group]
        sizes = [abs(error) for error in errors]
        lines.append(
            f"| {group} | {len(errors)} | {statistics.median(sizes):.2%} | {statistics.mean(sizes):.2%} "
            f"| {max(errors, key=abs):+.2%} |"
        )
    lines += ["", "| model | run | metric | measured GiB | predicted GiB | error |", "|---|---|---|---|---|---|"]
    for score in scores:
        row = score.row
        unit = 10**9 if "GB=1e9" in row["metric"] else GIB
        lines.append(
            f"| {row['model'].split('/')[-1]} | {run_of(row)} | {score.group.split(', ')[-1]} | "
            f"{score.measured / unit:.3f} | {score.predicted / unit:.3f} | {score.error:+.2%} |"
        )
    lines += ["", f"Not scored: {sum(skipped.values())} rows."]
    lines += [f"- {count}: {reason}" for reason, count in skipped.most_common()]
    return "\n".join(lines if skipped else lines[:-1])


def run_of(row: dict[str, str]) -> str:
    """`qlora r 32, 2 x 512, checkpointing, eager`."""
    rank = f" r {row['rank']}" if row["rank"] else ""
    tokens = PEFT_LENGTH if row["framework"] == "peft benchmark script" else row["seq_len"]
    checkpointing = ", checkpointing" if row["grad_ckpt"].startswith("yes") else ""
    targets = " " + re.sub("_proj", "", row["targets"]).replace(";", ",") if row["targets"] else ""
    return f"{row['method']}{rank}{targets}, {row['micro_batch']} x {tokens}{checkpointing}, {row['attention']}"


def write_into(path: Path, table: str, name: str) -> None:
    """Replace what stands between a file's two marks in a document."""
    begin, end = BEGIN.format(name), END.format(name)
    before, rest = path.read_text(encoding="utf-8").split(begin)
    path.write_text(f"{before}{begin}\n{table}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def main() -> None:
    """Score a file; print the tables or write them into a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE.csv")
    parser.add_argument("--write", type=Path, metavar="DOCUMENT.md", help="put the tables between its marks")
    arguments = parser.parse_args()
    set_verbosity_error()
    table = report(*score_file(arguments.file))
    if arguments.write:
        write_into(arguments.write, table, arguments.file.name)
    else:
        print(table)


if __name__ == "__main__":
    main()
