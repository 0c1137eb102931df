"""Does moving weights at random foretell what rounding them did? python bench/merge_rounding.py [MODEL ...]

Random adapters (LoRA, rsLoRA, DoRA; three sizes of updates, two seeds) on each model in bfloat16, builtin:tiny by
default: mean KL between base + adapter and the merged files, the same between these and their weights moved at random
as far as rounding may have moved them, and the ratio of the two, of which the proof allows 4.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
sys.path[:0] = [str(CHECKOUT / "tests"), str(CHECKOUT / "src")]
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

from test_merge import as_bfloat16, make_adapter, merge  # noqa: E402

from ftkit.commands.merge_proof import base_and_adapter, probe_ids, rounded_otherwise, run_from_files  # noqa: E402
from ftkit.core.proof import compare_logits, other_logits, plan_probes, reference_logits  # noqa: E402
from ftkit.io.adapter_weights import open_adapter_weights  # noqa: E402
from ftkit.io.base_model import BUILTIN, Base, check_base, find_base  # noqa: E402
from ftkit.io.trained import open_trained  # noqa: E402

METHODS = {"LoRA": {}, "rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True}}
SPREADS = (0.005, 0.05, 0.3)


def measure(adapter: Path, out: Path) -> tuple[float, float]:
    """(mean KL by rounding, mean KL by moving the rounded weights at random) of one merge."""
    merged = Base("merged", str(merge(adapter, out, no_check=True)))
    trained = open_trained(str(adapter))
    config = check_base(trained.base)
    probes = plan_probes(probe_ids(trained, config, 8), config.get_text_config().vocab_size)
    reference = base_and_adapter(trained, open_adapter_weights(adapter), config, seen={})
    expected, continued = reference_logits(reference, probes)
    given = other_logits(run_from_files(merged, check_base(merged)), probes, continued)
    changed = json.loads((out / "merge.json").read_text(encoding="utf-8"))["tensors"]["changed"]
    moved = other_logits(rounded_otherwise(merged, changed), probes, continued)
    return compare_logits(expected, given).mean_kl, compare_logits(given, moved).mean_kl


def main() -> None:
    """Measure every combination; print a line for each, and the range of the ratios."""
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        for number, model in enumerate(sys.argv[1:] or [BUILTIN]):
            plain = Path(name) / f"plain-{number}"
            made_by_ftkit = shutil.ignore_patterns("manifest.json", "ftkit.json")
            shutil.copytree(find_base(model).location, plain, ignore=made_by_ftkit)
            base = as_bfloat16(plain, Path(name) / f"base-{number}")
            cells = [(method, spread, seed) for method in METHODS for spread in SPREADS for seed in (1, 2)]
            for method, spread, seed in cells:
                place = Path(name) / f"{number}-{method}-{spread}-{seed}"
                options = {"spread": spread, "seed": seed, "target_modules": "all-linear", **METHODS[method]}
                found, moved = measure(make_adapter(base, place / "adapter", **options), place / "out")
                ratios.append(found / moved)
                line = f"{method:<7} {spread:<6} {seed}  {found:.1e}  {moved:.1e}  {ratios[-1]:.2f}"
                sys.stdout.write(f"{Path(model).name:<20} {line}\n")
    ratios.sort()
    tenth = len(ratios) // 10
    sys.stdout.write(f"{len(ratios)} merges: {ratios[0]:.2f} to {ratios[-1]:.2f}, ")
    sys.stdout.write(f"but for a tenth at either end {ratios[tenth]:.2f} to {ratios[-1 - tenth]:.2f}\n")


if __name__ == "__main__":
    main()
