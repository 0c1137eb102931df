"""merge against PEFT's merge_and_unload + save_pretrained: python bench/merge.py [--size 0.3B] [--rounds 3]
    [--peer llamafactory=BIN] [--peer trl=BIN] [--write FILE] [--folder FOLDER]

A Llama of random bfloat16 weights in shards and a LoRA (rank 16, every linear layer) of random numbers; ftkit with and
without its proof; other programs from the bin folder of an environment of their own: LLaMA-Factory's `export`, and for
TRL, which has no export, the PEFT and transformers of its environment. Every way runs in a process of its own,
interleaved; medians, peak memory (VmHWM: pages of mapped files count) and ratios are printed, and the merged tensors
are compared one by one. Only the ratios of one run count: machines and moments differ.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = {
    "0.06B": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
    "0.3B": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 18, "num_attention_heads": 16},
    "1.1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
}
NAMES = {
    "imports": "importing torch, transformers and PEFT",
    "peft": "transformers + PEFT `merge_and_unload` + save",
    "trl": "the same in TRL's environment (TRL has no export)",
    "llamafactory": "LLaMA-Factory `export`",
    "ftkit --no-check": "`ftkit merge --no-check`",
    "ftkit": "`ftkit merge`, proven",
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_base(folder: Path, size: str, shard: str) -> None:
    """A Llama of random weights in bfloat16, in shards, with a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32000, tie_word_embeddings=False, **SIZES[size])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size=shard)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"</s>": 0} | {byte: at for at, byte in enumerate(alphabet, 1)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)


def make_adapter(base: Path, folder: Path) -> None:
    """A LoRA on every linear layer, its B random instead of trained."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    tuned = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    tuned.save_pretrained(folder)


def with_peft(base: Path, adapter: Path, out: Path, shard: str) -> None:
    """transformers loads, PEFT merges, transformers saves."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(out, max_shard_size=shard)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)


def with_ftkit(adapter: Path, out: Path, *more: str) -> None:
    """ftkit merge."""
    from ftkit.cli import main

    try:
        main(["merge", str(adapter), "-o", str(out), "-q", *more])
    except SystemExit as end:
        assert end.code == 0


def with_llamafactory(base: Path, adapter: Path, out: Path, programs: str, shard: str) -> None:
    """`llamafactory-cli export`, in a process of its own; its peak counts as this one's."""
    asked = {
        "model_name_or_path": str(base), "adapter_name_or_path": str(adapter), "template": "default",
        "export_dir": str(out), "export_size": max(1, round(gigabytes(shard))), "export_device": "cpu",
        "infer_dtype": "bfloat16",
    }  # fmt: skip
    settings = out.with_suffix(".yaml")  # JSON is YAML; its reader of .json files is broken
    settings.write_text(json.dumps(asked), encoding="utf-8")
    subprocess.run([f"{programs}/llamafactory-cli", "export", str(settings)], check=True, capture_output=True)


def gigabytes(shard: str) -> float:
    """`500MB` -> 0.5."""
    return float(shard[:-2]) * {"MB": 1e-3, "GB": 1.0}[shard[-2:]]


def imports_only() -> None:
    """What the libraries take without doing anything."""
    import peft  # noqa: F401
    import torch  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401


def run_way(way: str, folder: Path, shard: str) -> None:
    """One way, in this process."""
    base, adapter, out = folder / "base", folder / "adapter", folder / way
    if way == "make":
        make_base(base, os.environ["FTKIT_BENCH_SIZE"], shard)
        make_adapter(base, adapter)
    elif way == "imports":
        imports_only()
    elif way in ("peft", "trl"):
        with_peft(base, adapter, out, shard)
    elif way == "llamafactory":
        with_llamafactory(base, adapter, out, os.environ["FTKIT_BENCH_PEER"], shard)
    else:
        with_ftkit(adapter, out, "--shard-size", shard, *([] if way == "ftkit" else ["--no-check"]))


def measure(way: str, folder: Path, shard: str, programs: str = "") -> tuple[float, float]:
    """(seconds, peak MB) of one way in a process of its own, its start included. programs: bin folder of a peer."""
    shutil.rmtree(folder / way, ignore_errors=True)
    started = time.perf_counter()
    python = f"{programs}/python" if programs else sys.executable
    command = [python, __file__, "--way", way, "--folder", str(folder), "--shard", shard]
    environment = {**os.environ, "FTKIT_BENCH_PEER": programs}
    environment = {k: v for k, v in environment.items() if not (programs and k == "PYTHONPATH")}
    done = subprocess.run(command, capture_output=True, env=environment)
    if done.returncode:
        sys.exit(f"{way}: {done.stderr.decode(errors='replace')[-3000:]}")
    return time.perf_counter() - started, float(done.stdout.split()[-1])


def peak_mb() -> float:
    """The largest resident size that this process, or one that it started, had."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return max(int(status.split("VmHWM:")[1].split()[0]), children) / 1024


def equal_tensors(one: Path, other: Path) -> tuple[int, int]:
    """(tensors that are equal to the bit, all tensors) of two model folders."""
    import torch
    from safetensors import safe_open

    def opened(folder: Path) -> dict[str, object]:
        files = [safe_open(file, "pt") for file in sorted(folder.glob("*.safetensors"))]
        return {name: file for file in files for name in file.keys()}  # noqa: SIM118

    left, right = opened(one), opened(other)
    assert left.keys() == right.keys()
    same = [torch.equal(left[name].get_tensor(name), right[name].get_tensor(name)) for name in left]  # type: ignore[attr-defined]
    return sum(same), len(same)


def main() -> None:
    """Run one way (as a child), or all of them and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="0.3B")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shard", default="250MB")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=BIN")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between its marks in this file")
    parser.add_argument("--way")
    parser.add_argument("--folder", type=Path, help="keep base, adapter and results here, or use those that are here")
    asked = parser.parse_args()
    if asked.way:
        run_way(asked.way, asked.folder, asked.shard)
        sys.stdout.write(f"\n{peak_mb():.0f}\n")
        return
    peers = dict(peer.split("=", 1) for peer in asked.peer)
    ways = ("imports", "peft", *peers, "ftkit --no-check", "ftkit")
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as name:
        folder = asked.folder or Path(name)
        os.environ["FTKIT_BENCH_SIZE"] = asked.size
        if not (folder / "adapter").is_dir():
            measure("make", folder, asked.shard)
        for _ in range(asked.rounds):
            for way, results in found.items():
                results.append(measure(way, folder, asked.shard, peers.get(way, "")))
                sys.stderr.write(f"{way}: {results[-1][0]:.1f} s, {results[-1][1]:.0f} MB\n")
        equal = {way: equal_tensors(folder / "ftkit", folder / way) for way in ("peft", *peers)}
    medians = {
        way: tuple(statistics.median(column) for column in zip(*results, strict=True)) for way, results in found.items()
    }
    if asked.json:
        sys.stdout.write(json.dumps({"size": asked.size, "equal": equal, "medians": medians}) + "\n")
        return
    sys.stdout.write(table_of(medians, equal) + "\n")
    if asked.write:
        write_between_marks(asked.write, table_of(medians, equal))


def table_of(medians: dict[str, tuple[float, ...]], equal: dict[str, tuple[int, int]]) -> str:
    """A Markdown table; time and memory also as shares of PEFT's."""
    lines = ["| | seconds | peak MB | time | memory | tensors equal to ftkit's |", "|---|---|---|---|---|---|"]
    peft = medians["peft"]
    for way, (seconds, peak) in medians.items():
        same, tensors = equal.get(way, (0, 0))
        shares = "| |" if way == "imports" else f"| {seconds / peft[0]:.2f} | {peak / peft[1]:.2f} |"
        lines.append(
            f"| {NAMES[way]} | {seconds:.1f} | {peak:.0f} {shares} {f'{same} of {tensors}' if tensors else ''} |"
        )
    return "\n".join(lines)


def write_between_marks(path: Path, table: str) -> None:
    """Replace what stands between <!-- begin: python bench/merge.py ... --> and <!-- end -->."""
    before, mark, rest = path.read_text(encoding="utf-8").partition("<!-- begin: python bench/merge.py")
    head, _, rest = rest.partition("\n")
    path.write_text(f"{before}{mark}{head}\n{table}\n<!-- end -->{rest.partition('<!-- end -->')[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
