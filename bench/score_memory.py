"""Predicted against measured memory: python bench/score_memory.py FILE.csv [--write docs/memory.md]

FILE has the columns of tests/published/measured.csv, one measured number a row; bench/measure_memory.py writes such
files. Every row of a run that can be simulated exactly is simulated, without a GPU, and the errors are printed as a
table; the other rows are counted with the reason. A column that is missing, or a text where a number should be, ends it with a
line. Sizes of a model come from configs.json beside FILE or beside the
published rows, or else from the model's own folder or Hugging Face. No number here is fitted to the rows, but for one
input that its source does not publish: the longest batch of PEFT's benchmark, taken from one of its rows (`PEFT_LENGTH`).
"""

import argparse
import csv
import json
import math
import re
import shlex
import statistics
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from peft import (
    FourierFTConfig,
    LNTuningConfig,
    LoraConfig,
    MissConfig,
    VBLoRAConfig,
    VeraConfig,
)
from shared_rows import NAME as SHARED
from shared_rows import write_shared_rows
from transformers import AutoConfig
from transformers.utils.logging import set_verbosity_error

from ftkit.commands.estimate_data import RealRows, read_data
from ftkit.commands.estimate_model import Model
from ftkit.commands.estimate_run import Estimates
from ftkit.core.caching_allocator import GIB
from ftkit.core.configuration import coerce, field_types
from ftkit.core.cuda_operators import CPU, HOPPER_WORKSPACE, CudaKernels
from ftkit.core.estimate_settings import EstimateSettings
from ftkit.core.memory_estimate import MemoryEstimate
from ftkit.core.memory_simulation import SimulatedDevice
from ftkit.core.plain_script import PlainScript, script_memory
from ftkit.core.training_memory import training_memory
from ftkit.errors import UserError
from ftkit.io.base_model import Base
from ftkit.io.devices import DTYPES
from ftkit.io.quantization import quantization_config
from ftkit.io.stored_quantization import FOUR_BITS

PEFT_LENGTH = 641
"""Tokens of the longest batch: where LoRA of rank 32 comes out as measured; the other eight rows are predictions."""
PUBLISHED = Path(__file__).parents[1] / "tests" / "published"
METRICS = ("reserved", "resident")
"""Words of `metric`; all else is allocated bytes."""
NEEDED = (
    *("model", "method", "quant", "rank", "targets", "seq_len", "micro_batch", "grad_ckpt", "optimizer", "dtype"),
    *("attention", "n_gpus", "measured_gib", "gpu", "metric", "framework", "quality", "notes"),
)
"""Columns that are read."""
OPTIMIZERS = {"adamw_torch": "adamw-foreach", "adamw_torch_fused": "adamw", "adamw_fused": "adamw",
              "adamw_bnb_8bit": "adamw-8bit", "paged_adamw_8bit": "paged-adamw-8bit"}  # fmt: skip
"""How scripts call an optimizer -> how we do. PyTorch's own AdamW on CUDA is the one of foreach, unless it is told."""
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


class NoNumber(Exception):
    """A column's name, and the text that stands there instead of a number."""


# ---------------------------------------------------------------- from a row to a script
def script_of(row: dict[str, str]) -> PlainScript:
    """The script behind a row; NotScored where settings are unknown or the code is another."""
    framework, quality = row["framework"], row["quality"]
    if framework == "transformers+peft script" and quality == "A":
        return t4_script(row)
    if framework == "peft benchmark script":
        return peft_script(row)
    if framework == "torchtune" and quality == "A":
        return common(row) if row["method"] == "full" else not_simulated("method", row["method"])
    if quality.startswith(("C", "B-legacy")):
        raise NotScored(f"quality {quality}")
    raise NotScored(f"{framework}: code or settings of its own (compile, offload, fused kernels, unknown lengths)")


def require_known(row: dict[str, str]) -> None:
    """NotScored for a run that cannot be simulated."""
    if row["framework"] != "ftkit":
        script_of(row)


def not_simulated(what: str, value: str) -> Any:
    """Leave the row out: the simulation of a script knows no such thing."""
    raise NotScored(f"{what} of a script: {value or 'not stated'}")


def common(row: dict[str, str]) -> PlainScript:
    """What all scripts say in the same way."""
    dtype, attention, optimizer = (re.split(r"[\s/,]", row[key])[0] for key in ("dtype", "attention", "optimizer"))
    if row["n_gpus"] != "1":
        not_simulated("number of cards", row["n_gpus"])
    if dtype not in DTYPES:
        not_simulated("dtype", row["dtype"])
    if attention not in ("eager", "sdpa"):
        not_simulated("attention", row["attention"])
    if optimizer not in OPTIMIZERS or "backward" in row["optimizer"]:
        not_simulated("optimizer", row["optimizer"])
    return PlainScript(
        rows=number(row, "micro_batch"),
        tokens=number(row, "seq_len"),
        dtype=DTYPES[dtype],
        adapter=None,
        attention=attention,
        is_checkpointed=row["grad_ckpt"].startswith("yes"),
        optimizer=OPTIMIZERS[optimizer],
    )


def number(row: dict[str, str], column: str) -> int:
    """The whole number above 0 with which a field starts; ends with a line where there is none."""
    word = (row[column].split() or [""])[0]
    if not word.isdecimal() or int(word) < 1:
        raise NoNumber(column, row[column])
    return int(word)


def t4_script(row: dict[str, str]) -> PlainScript:
    """Full training, or LoRA on a 16-bit, 8-bit or 4-bit base; outputs are kept through the optimizer's step."""
    script, quant = common(row), row["quant"]
    if row["method"] == "full" and quant == "none":
        return script
    is_packed = quant in FOUR_BITS or quant == "int8"
    if row["method"] not in ("lora", "qlora") or not (is_packed or (quant == "none" and row["method"] == "lora")):
        not_simulated("method", f"{row['method']}, {quant}")
    if not row["targets"]:
        not_simulated("targets", "")
    adapter = LoraConfig(task_type="CAUSAL_LM", r=number(row, "rank"), target_modules=row["targets"].split(";"))
    return replace(script, adapter=adapter, quantization=quantization_config(quant, script.dtype))


def peft_script(row: dict[str, str]) -> PlainScript:
    """Padded batches; a step's outputs live until the next forward pass is over."""
    targets = row["targets"].split(";")
    adapters: dict[str, Any] = {
        "full": lambda: None,
        "lora": lambda: LoraConfig(task_type="CAUSAL_LM", r=number(row, "rank"), target_modules=targets),
        "fourierft": lambda: FourierFTConfig(n_frequency=1000, scaling=300, target_modules=targets),
        "ln_tuning": LNTuningConfig,
        "miss": lambda: MissConfig(r=number(row, "rank")),
        "vblora": lambda: VBLoRAConfig(r=4, num_vectors=256, vector_length=256, topk=2, target_modules=targets),
        "vera": lambda: VeraConfig(r=number(row, "rank")),
    }
    if row["method"] not in adapters or row["quant"] != "none":
        not_simulated("method", f"{row['method']}, {row['quant']}")
    script = common(row | {"seq_len": str(PEFT_LENGTH)})
    return replace(script, adapter=adapters[row["method"]](), is_padded=True, keeps_outputs="next forward")


def predict(row: dict[str, str], config: Any) -> MemoryEstimate:
    """The simulation of a row's run."""
    if row["framework"] == "ftkit":
        return ftkit_memory(row, config)
    return script_memory(script_of(row), config, device_of(row))


def ftkit_memory(row: dict[str, str], config: Any) -> MemoryEstimate:
    """A run that bench/measure_memory.py made; its notes are the options."""
    settings = settings_of(row["notes"])
    if row["n_gpus"] != "1" or settings.gpus != 1 or row["dtype"] not in DTYPES:
        raise NotScored(f"ftkit on {row['n_gpus']} cards in {row['dtype']}")
    settings = replace(settings, dtype=row["dtype"])
    with tempfile.TemporaryDirectory() as folder:
        model = Model(Base(row["model"], folder), {}, config, None)
        rows = shared_rows(settings, model, Path(folder)) if settings.data else None
        run = Estimates(model, rows).plan(settings, None)
        return training_memory(
            settings, run, config, quantization_config(run.method, DTYPES[run.dtype]), device=device_of(row),
            heaviest=partial(rows.heaviest, settings) if rows else None,
        )  # fmt: skip


def shared_rows(settings: EstimateSettings, model: Model, folder: Path) -> RealRows:
    """The rows that the grid of bench/measure_memory.py knows, encoded again."""
    if settings.data != SHARED:
        raise NotScored(f"the rows of {settings.data} are not known here")
    return read_data(replace(settings, data=str(write_shared_rows(folder))), model)


def settings_of(options: str) -> EstimateSettings:
    """Options as they were typed; NotScored where they are none of ours."""
    words, values = shlex.split(options), {}
    for place, word in enumerate(words):
        if word.startswith("--"):
            is_switch = place + 1 == len(words) or words[place + 1].startswith("--")
            values[word[2:].replace("-", "_")] = True if is_switch else words[place + 1]
    types = field_types(EstimateSettings)
    try:
        settings = EstimateSettings(**{name: coerce(value, types[name], name) for name, value in values.items()})
        settings.check()
    except (KeyError, UserError) as error:
        raise NotScored(f"notes are no options of ftkit: {error}") from None
    return settings


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
        reader = csv.DictReader(file, restval="")
        if missing := set(NEEDED) - set(reader.fieldnames or ()):
            sys.exit(f"score_memory.py: {path}: no column {', '.join(sorted(missing))}")
        for row in reader:
            settings = {key: row[key] for key in NEEDED if key not in ("measured_gib", "metric")}
            try:
                measured = gib(row)
                estimate = predicted_of(tuple(settings.items()))
            except (NotScored, UserError) as reason:  # the latter: of an architecture that cannot be simulated
                skipped[str(reason)] += 1
                continue
            except NoNumber as error:
                column, text = error.args
                sys.exit(f"score_memory.py: {path}:{reader.line_num}: {column} is no number above 0: {text!r}")
            metric = next((name for name in METRICS if name in row["metric"]), "allocated")
            predicted = estimate.reserved_bytes if metric == "reserved" else estimate.allocated_bytes
            unit = 10**9 if "GB=1e9" in row["metric"] else GIB
            group = f"{source_of(row)}, {metric}"
            scores.append(Score(row, group, measured * unit, predicted))
    return scores, skipped


def gib(row: dict[str, str]) -> float:
    """What was measured; NotScored for what is not predicted."""
    if "outside of the pool" in row["metric"]:
        raise NotScored("outside of the pool: assumed, not simulated")
    try:
        measured = float(row["measured_gib"])
    except ValueError:
        measured = 0.0
    if not 0 < measured < math.inf:
        raise NoNumber("measured_gib", row["measured_gib"])
    return measured


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
