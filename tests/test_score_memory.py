"""Published measurements against the simulation, and the command that scores any file of them."""

import csv
import sys
from statistics import median

import pytest
from conftest import CHECKOUT

sys.path.insert(0, str(CHECKOUT / "bench"))

import measure_memory
import score_memory

MODEL = "HuggingFaceTB/SmolLM2-135M"
PUBLISHED = CHECKOUT / "tests" / "published" / "measured.csv"


@pytest.fixture(scope="module")
def scores():
    return score_memory.score_file(PUBLISHED)


def errors(scores, framework, metric):
    return [abs(s.error) for s in scores[0] if s.row["framework"] == framework and s.group.endswith(metric)]


def test_every_row_of_quality_a_is_scored(scores):
    assert sum(score.row["quality"] == "A" for score in scores[0]) == 43
    assert sum(score.row["framework"] == "peft benchmark script" for score in scores[0]) == 9
    assert sum(scores[1].values()) == 105 - 43 - 9


def test_allocated_bytes_of_a_script_on_a_t4_are_within_half_a_percent_and_one_at_worst(scores):
    found = errors(scores, "transformers+peft script", "allocated")
    assert len(found) == 21 and median(found) <= 0.005 and max(found) <= 0.01


def test_reserved_bytes_of_a_script_on_a_t4_are_within_two_percent_and_seven_at_worst(scores):
    found = errors(scores, "transformers+peft script", "reserved")
    assert len(found) == 21 and median(found) <= 0.02 and max(found) <= 0.07


def test_nine_methods_of_peft_are_within_two_and_a_half_percent(scores):
    assert max(errors(scores, "peft benchmark script", "reserved")) <= 0.025


def test_full_fine_tuning_of_three_billion_weights_is_within_one_percent(scores):
    assert max(errors(scores, "torchtune", "allocated")) <= 0.01


def test_the_report_holds_every_row_and_says_what_was_left_out(scores):
    text = score_memory.report(*scores)
    assert text.count("| SmolLM2-1.7B |") == 8 and "Not scored: 53 rows." in text
    assert "B-legacy" in text


def further(tmp_path, *rows):
    """What is scored of a file with the first published row, changed so."""
    with PUBLISHED.open(newline="") as file:
        first = next(csv.DictReader(file))
    path = tmp_path / "further.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(first))
        writer.writeheader()
        writer.writerows(first | row for row in rows)
    return score_memory.score_file(path)


def test_rows_of_scripts_that_are_not_simulated_are_counted_with_their_reasons(tmp_path):
    scores, skipped = further(
        tmp_path,
        {"optimizer": "lomo"},
        {"optimizer": "adamw_torch in backward"},
        {"n_gpus": "8"},
        {"dtype": "fp8"},
        {"attention": "flash_attention_3"},
        {"method": "lora", "quant": "gptq-int4"},
        {"targets": ""},
        {"metric": "outside of the pool"},
        {"framework": "ftkit", "notes": "--sevenbit"},
        {"framework": "ftkit", "notes": "--lora --data mine.jsonl", "dtype": "bf16"},
        {"framework": "ftkit", "notes": "--lora", "dtype": "bf16", "n_gpus": "2"},
    )
    assert not scores and sum(skipped.values()) == len(skipped) == 11
    for words in ("optimizer of a script: lomo", "cards of a script: 8", "dtype of a script: fp8", "lora, gptq-int4",
                  "rows of mine.jsonl", "ftkit on 2 cards", "targets of a script: not stated"):  # fmt: skip
        assert any(words in reason for reason in skipped), words


def test_what_a_row_says_is_what_is_simulated(tmp_path):
    """32 bits, full training without a rank, and a fused optimizer, which has no copy of the trained weights in its step."""
    small = {"model": MODEL, "seq_len": "64", "method": "full", "quant": "none", "rank": "",
             "targets": ""}  # fmt: skip
    rows = [small | {"dtype": dtype, "optimizer": name} for dtype, name in (
        ("fp32", "adamw_torch"), ("bf16", "adamw_torch"), ("bf16", "adamw_torch_fused"))]  # fmt: skip
    scores, skipped = further(tmp_path, *rows)
    full, half, fused = (score.predicted for score in scores)
    assert not skipped and full == pytest.approx(2 * half, rel=0.1) and half > fused + 10**8


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"measured_gib": "1,8"}, r"further.csv:2: measured_gib is no number above 0: '1,8'"),
        ({"measured_gib": "nan"}, "measured_gib"),
        ({"micro_batch": "two"}, "micro_batch"),
        ({"seq_len": ""}, "seq_len"),
        ({"rank": ""}, "rank"),
    ],
)
def test_a_text_where_a_number_should_be_is_one_line(tmp_path, row, words):
    with pytest.raises(SystemExit, match=words):
        further(tmp_path, row)


def test_a_file_without_a_column_is_one_line(tmp_path):
    (tmp_path / "short.csv").write_text("model,method\na,lora\n")
    with pytest.raises(SystemExit, match=r"no column .*measured_gib"):
        score_memory.score_file(tmp_path / "short.csv")


def test_only_what_stands_between_the_marks_is_replaced(tmp_path):
    document = tmp_path / "memory.md"
    other = "<!-- begin: b.csv -->\nb\n<!-- end: b.csv -->"
    document.write_text(f"before\n<!-- begin: a.csv -->\nold\n<!-- end: a.csv -->\nbetween\n{other}\nafter\n")
    score_memory.write_into(document, "new", "a.csv")
    score_memory.write_into(document, "newer", "a.csv")
    assert document.read_text() == (
        f"before\n<!-- begin: a.csv -->\nnewer\n<!-- end: a.csv -->\nbetween\n{other}\nafter\n"
    )


def test_a_pack_with_shared_prefixes_is_laid_out_again(tmp_path):
    """The rows are not in the file of figures: they are made anew, and packed as they were."""
    options = f"--lora --gradient-checkpointing off --batch 16 --micro-tokens 16384 --data {measure_memory.SHARED}"
    run = {"method": "lora", "tokens": 486, "pack": True, "rows": 8, "checkpointing": False, "optimizer": "adamw",
           "dtype": "fp32"}  # fmt: skip
    report = {"run": run, "data": {"heaviest": 2586}, "device": "CPU", "versions": {"torch": "2"},
              "measured": {"resident_bytes": 2**30}}  # fmt: skip
    rows = [
        row for more in ("", " --share-prefix off") for row in measure_memory.rows_of(MODEL, options + more, report)
    ]
    assert rows[0]["seq_len"] == "2586 shared packed" and rows[0]["micro_batch"] == 1
    path = tmp_path / "measured.csv"
    with path.open("w", newline="") as file:
        measure_memory.write_rows(file, rows)
    (shared, alone), skipped = score_memory.score_file(path)
    assert not skipped and shared.predicted < 0.6 * alone.predicted


def test_what_the_grid_measures_can_be_scored(tmp_path):
    """Options of a run -> a row -> the same run again."""
    report = {
        "run": {"method": "qlora", "tokens": 256, "pack": True, "rows": 2, "checkpointing": True, "optimizer": "adamw",
                "dtype": "bf16"},
        "data": None, "device": "CPU", "versions": {"torch": "2"}, "measured": {"resident_bytes": 2**29, "allocated_bytes": None},
    }  # fmt: skip
    options = "--qlora --max-length 256 --batch 4 --micro-batch 2 --dtype bf16 --gradient-checkpointing on"
    rows = measure_memory.rows_of(MODEL, options, report)
    assert [set(row) - set(measure_memory.COLUMNS) for row in rows] == [set()]
    path = tmp_path / "measured.csv"
    with path.open("w", newline="") as file:
        measure_memory.write_rows(file, rows)
    [score], skipped = score_memory.score_file(path)
    assert not skipped and score.group == "ftkit, CPU, resident"
    assert score.measured == 2**29 and 2**27 < score.predicted < 2**30
