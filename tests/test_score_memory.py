"""Published measurements against the simulation, and the command that scores any file of them."""

import sys
from statistics import median

import pytest
from conftest import CHECKOUT

sys.path.insert(0, str(CHECKOUT / "bench"))

import measure_memory
import score_memory

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


def test_only_what_stands_between_the_marks_is_replaced(tmp_path):
    document = tmp_path / "memory.md"
    other = "<!-- begin: b.csv -->\nb\n<!-- end: b.csv -->"
    document.write_text(f"before\n<!-- begin: a.csv -->\nold\n<!-- end: a.csv -->\nbetween\n{other}\nafter\n")
    score_memory.write_into(document, "new", "a.csv")
    score_memory.write_into(document, "newer", "a.csv")
    assert document.read_text() == (
        f"before\n<!-- begin: a.csv -->\nnewer\n<!-- end: a.csv -->\nbetween\n{other}\nafter\n"
    )


def test_what_the_grid_measures_can_be_scored(tmp_path):
    """Options of a run -> a row -> the same run again."""
    report = {
        "run": {"method": "qlora", "tokens": 256, "pack": True, "rows": 2, "checkpointing": True, "optimizer": "adamw",
                "dtype": "bf16"},
        "device": "CPU", "versions": {"torch": "2"}, "measured": {"resident_bytes": 2**29, "allocated_bytes": None},
    }  # fmt: skip
    options = "--qlora --max-length 256 --batch 4 --micro-batch 2 --dtype bf16 --gradient-checkpointing on"
    rows = measure_memory.rows_of("HuggingFaceTB/SmolLM2-135M", options, report)
    assert [set(row) - set(measure_memory.COLUMNS) for row in rows] == [set()]
    path = tmp_path / "measured.csv"
    with path.open("w", newline="") as file:
        measure_memory.write_rows(file, rows)
    [score], skipped = score_memory.score_file(path)
    assert not skipped and score.group == "ftkit, CPU, resident"
    assert score.measured == 2**29 and 2**27 < score.predicted < 2**30
