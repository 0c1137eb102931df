"""The GPU benches keep what they have: a run that fails or is cut off is a row that says so. Programs are stand-ins."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def bench():
    """The two scripts, imported from their folder."""
    before = list(sys.path)
    sys.path.insert(0, str(BENCH))
    import gpu
    import measure_memory

    yield SimpleNamespace(gpu=gpu, memory=measure_memory)
    sys.path[:] = before


def python(code):
    return [sys.executable, "-c", code]


PLAIN = json.dumps({"seconds": 4.0, "step_seconds": [3.0, 1.0, 1.0], "peak_bytes": 2**31})
ASKED = Namespace(peer=None, steps=2, length=128)


def test_each_run_is_a_row_and_so_is_each_failure(bench, tmp_path):
    gpu, out = bench.gpu, tmp_path / "out"
    ways = ["ftkit", "transformers and PEFT", "TRL, packing, Liger"]
    pairing = gpu.Pairing("tiny", "lora", {way: [] for way in ways})
    gpu.take(pairing, ways[0], python("import sys; sys.exit('CUDA error: out of memory')"), out, 60)
    gpu.take(pairing, ways[1], python(f"print('loading'); print('''{PLAIN}''')"), out, 60)
    gpu.take(pairing, ways[2], python("import time; time.sleep(600)"), out, 0.3)
    assert pairing.found[ways[1]] == [gpu.Measured(4.0, 1.0, 0.0, None, 2.0)]
    assert pairing.failed == {ways[0]: "failed: CUDA error: out of memory", ways[2]: "cut off: the time was over"}
    rows = {
        line.split(" | ")[0]: line for line in gpu.table_of(pairing, 1.0, ASKED).splitlines() if line.startswith("| ")
    }
    assert "| 1 | 512 | 1,024 |" in rows["| transformers and PEFT"], (
        "8 rows of 128 tokens, two steps in 4 s, a median of 1 s"
    )
    assert "out of memory" in rows["| ftkit"] and "cut off" in rows["| TRL, packing, Liger"]


def test_what_is_missing_is_told_before_anything_runs(bench, tmp_path, monkeypatch):
    gpu = bench.gpu
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu.shutil, "disk_usage", lambda place: SimpleNamespace(free=10**9))
    told = gpu.missing(["1B", "8B"], ["lora"], tmp_path)
    assert ["no CUDA card" in told[0], "1 GB free, 21 are needed" in told[1], str(tmp_path / "trl") in told[2]] == [
        True
    ] * 3
    assert gpu.missing(["tiny"], ["qlora"], None) == []


def test_a_measurement_that_takes_too_long_is_left_out(bench, tmp_path, capsys):
    assert bench.memory.measure(tmp_path, "--lora", 0.01) is None
    assert "cut off" in capsys.readouterr().err


def test_predicted_stands_beside_measured(bench):
    report = {
        "measured": {"allocated_bytes": 2**30, "resident_bytes": None},
        "predicted": {"allocated_bytes": 1.1 * 2**30},
    }
    told = bench.memory.told("llama", "--lora", report)
    assert told == "llama --lora: max_memory_allocated 1.000 GiB, predicted 1.100 (+10.0%)"
