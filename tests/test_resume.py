"""A run that was interrupted, however and wherever, ends with the bytes of one that was not."""

import json
import shutil
import time

import pytest
from peft import PeftModel
from train_shell import files_in, jsonl, run_train, without_lora, write_rows
from transformers import AutoModelForCausalLM

from ftkit import faults
from ftkit.errors import ExitCode
from ftkit.io.checkpoint import checkpoint_steps
from ftkit.io.run_lock import locked
from ftkit.stopping import STARTED

RUN = ["train.jsonl", "--steps", 12, "--batch", 8, "--r", 4, "--lr", 0.01, "--run", "run"]
"""32 of 40 rows are trained, so an epoch has 4 steps."""
METHODS = {
    "lora, dropout, packs": ["--dropout", 0.2, "--micro-tokens", 200, "--dtype", "fp32"],
    "lora, padded, accumulated": ["--pack", "off", "--micro-batch", 3, "--dtype", "fp32"],
    "noise, smoothed labels": ["--neftune", 5, "--label-smoothing", 0.1, "--dtype", "fp32"],
    "lora in bf16": ["--dtype", "bf16"],
    "qlora": ["--qlora", "--dropout", 0.1],
    "qlora in bf16": ["--qlora", "--dtype", "bf16"],
    "int8": ["--load-in-8bit"],
    "full": ["--full", "--dtype", "fp32", "--optimizer", "sgd"],
    "full in bf16, 8-bit optimizer": ["--full", "--dtype", "bf16", "--optimizer", "adamw-8bit"],
}


@pytest.fixture
def train(tmp_path, tiny_model, monkeypatch):
    """`ftkit train` in tmp_path with a fault put in, or none."""
    write_rows(tmp_path / "train.jsonl")

    def run(*arguments, fault="", cwd=tmp_path):
        faults.forget()
        monkeypatch.setenv("FTKIT_FAULT", fault)
        return run_train(*arguments, "--model", tiny_model, cwd=cwd)

    return run


@pytest.fixture
def whole(train, tmp_path):
    """The files that an uninterrupted run makes, in a folder of its own."""

    def run(*options):
        place = tmp_path / "whole"
        place.mkdir()
        write_rows(place / "train.jsonl")
        result = train(*options, cwd=place)
        assert result.exit_code == 0, result.stderr
        return made(place / "run")

    return run


def made(run):
    """What a run is for: its adapter or model, byte by byte."""
    (folder,) = [path for path in (run / "adapter", run / "model") if path.is_dir()]
    return files_in(folder)


def info_of(run):
    return json.loads((run / "run.json").read_text())


# ---------------------------------------------------------------- the same bytes
@pytest.mark.parametrize("step", [3, 4], ids=["in an epoch", "at its end"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_stopped_by_a_scheduler_ends_with_the_bytes_of_one_that_was_not(method, step, train, whole, tmp_path):
    options = [*(without_lora(RUN) if "--full" in METHODS[method] else RUN), *METHODS[method]]
    expected = whole(*options)
    stopped = train(*options, fault=f"step:term:{step}")
    assert stopped.exit_code == ExitCode.STOPPED and stopped.stdout == ""
    assert f"stopped by SIGTERM after step {step} of 12; saved in run" in stopped.stderr
    assert info_of(tmp_path / "run")["status"] == "stopped" and not (tmp_path / "runs").exists()
    again = train(*options)
    assert (again.exit_code, again.stdout) == (0, "run\n") and f"going on after step {step} of 12" in again.stderr
    assert made(tmp_path / "run") == expected
    assert info_of(tmp_path / "run")["resumed_from"] == [step]


def test_numbers_go_on_too_and_no_step_is_told_twice(train, whole, tmp_path):
    whole(*RUN)
    train(*RUN, "--save-every", 4, fault="step:int:7")
    for fault in ("step:usr1:2", ""):
        train(*RUN, "--save-every", 4, fault=fault)
    ours, theirs = (jsonl(place / "run" / "metrics.jsonl") for place in (tmp_path, tmp_path / "whole"))
    timeless = [
        [{key: value for key, value in line.items() if "second" not in key and "memory" not in key} for line in lines]
        for lines in (ours, theirs)
    ]
    assert timeless[0] == timeless[1]
    ours, theirs = (info_of(place / "run") for place in (tmp_path, tmp_path / "whole"))
    assert ours["resumed_from"] == [7, 9] and ours["status"] == "complete"
    for key in ("steps", "first_loss", "last_loss", "valid_loss_before", "valid_loss", "trainable"):
        assert ours[key] == theirs[key]


def test_a_stop_in_the_last_validation_is_gone_on_with(train, whole, tmp_path):
    expected = whole(*RUN)
    stopped = train(*RUN, fault="validation:hup:2")  # one pack is held out: the second pass is after the last step
    assert stopped.exit_code == ExitCode.STOPPED and "stopped by SIGHUP after step 12 of 12" in stopped.stderr
    again = train(*RUN)
    assert again.exit_code == 0 and made(tmp_path / "run") == expected


def test_a_stop_before_the_first_step_saves_nothing_and_loses_nothing(train, whole, tmp_path):
    expected = whole(*RUN)
    stopped = train(*RUN, fault="validation:term:1")
    assert stopped.exit_code == ExitCode.STOPPED and checkpoint_steps(tmp_path / "run") == []
    assert train(*RUN).exit_code == 0 and made(tmp_path / "run") == expected


# ---------------------------------------------------------------- checkpoints
def test_checkpoints_are_adapters_that_peft_and_ftkit_open(train, tmp_path, tiny_model, run_here):
    assert train(*RUN, "--save-every", "25%", "--keep", 3).exit_code == 0
    assert checkpoint_steps(tmp_path / "run") == [3, 6, 9]
    folder = tmp_path / "run" / "checkpoints" / "step-000009"
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert PeftModel.from_pretrained(base, folder).peft_config["default"].r == 4
    answered = run_here("chat", folder, "-p", "Tell me", "--max-new", 2)
    assert answered.exit_code == 0, answered.stderr


def test_a_run_with_more_steps_between_checkpoints_than_it_has_writes_none(train, tmp_path):
    assert train(*RUN, "--save-every", 50).exit_code == 0
    assert checkpoint_steps(tmp_path / "run") == []


DAMAGES = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "flipped": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
    "deleted": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(damage, train, whole, tmp_path):
    """Every file of the newest checkpoint in turn."""
    expected = whole(*RUN, "--save-every", 3)
    stopped = train(*RUN, "--save-every", 3, fault="step:term:7")
    assert stopped.exit_code == ExitCode.STOPPED and checkpoint_steps(tmp_path / "run") == [6, 7]
    for name in files_in(tmp_path / "run" / "checkpoints" / "step-000007"):
        place = tmp_path / name.replace("/", "-")
        shutil.copytree(tmp_path / "run", place / "run")
        write_rows(place / "train.jsonl")
        DAMAGES[damage](place / "run" / "checkpoints" / "step-000007" / name)
        again = train(*RUN, "--save-every", 3, cwd=place)
        assert again.exit_code == 0, again.stderr
        assert "step-000007" in again.stderr and "going back behind step 7" in again.stderr
        assert "going on after step 6" in again.stderr and made(place / "run") == expected
        assert checkpoint_steps(place / "run") == [6, 9]


def test_a_checkpoint_that_is_not_of_this_run_is_refused(train, tmp_path):
    train(*RUN, fault="step:term:4")
    state = tmp_path / "run" / "checkpoints" / "step-000004" / "training" / "state.json"
    known = json.loads(state.read_text())
    known["optimizer"] = {"optimizer.7.0.step": 4}
    state.write_text(json.dumps(known))
    manifest = state.parents[1] / "manifest.json"
    listed = json.loads(manifest.read_text())
    from ftkit.io.atomic import sha256_of_file

    listed["files"]["training/state.json"] = {"bytes": state.stat().st_size, "sha256": sha256_of_file(state)}
    manifest.write_text(json.dumps(listed))
    again = train(*RUN)
    assert again.exit_code == ExitCode.MODEL and "does not fit this run" in again.stderr


# ---------------------------------------------------------------- which run
def test_without_run_the_same_command_finds_the_unfinished_one(train, tmp_path):
    options = [*RUN[:-2], "--save-every", 5]
    train(*options, fault="step:term:6")
    (folder,) = (path.parent for path in (tmp_path / "runs").glob("*/run.json"))
    again = train(*options)
    assert again.exit_code == 0 and again.stdout.strip() == str(folder.relative_to(tmp_path))
    assert "already trained" in train(*options).stderr


def test_a_new_run_names_the_unfinished_one_that_it_might_have_meant(train, tmp_path):
    train(*RUN[:-2], fault="step:term:6")
    (folder,) = (path.parent for path in (tmp_path / "runs").glob("*/run.json"))
    other = train(*RUN[:-2], "--seed", 7)
    assert other.exit_code == 0
    assert f"a new run; {folder.relative_to(tmp_path)} is unfinished and differs in: seed 42 -> 7" in other.stderr
    fresh = train(*RUN[:-2], "--resume", "never")
    assert fresh.exit_code == 0 and "going on" not in fresh.stderr and fresh.stdout != other.stdout


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--r", 8], "r 4 -> 8"),
        (["--seed", 1], "seed 42 -> 1"),
        (["--batch", 4], "batch 8 -> 4"),
        (["--targets", "q_proj"], "targets all-linear -> q_proj"),
        (["--qlora"], "qlora False -> True"),
    ],
)
@pytest.mark.parametrize("allow", [[], ["--allow-change"]])
def test_a_run_does_not_go_on_as_another_one(change, said, allow, train, tmp_path):
    train(*RUN, fault="step:term:4")
    before = files_in(tmp_path / "run")
    refused = train(*RUN, *change, *allow)
    assert refused.exit_code == ExitCode.MODEL and said in refused.stderr and "--allow-change" not in refused.stderr
    assert files_in(tmp_path / "run") == before


def test_other_rows_are_another_run(train, tmp_path):
    train(*RUN, fault="step:term:4")
    (tmp_path / "train.jsonl").write_text((tmp_path / "train.jsonl").read_text() * 2)
    refused = train(*RUN, "--allow-change")
    assert refused.exit_code == ExitCode.MODEL and "different: rows" in refused.stderr


def test_safe_settings_may_change_when_that_is_asked_for(train, tmp_path):
    train(*RUN, fault="step:term:4")
    refused = train(*RUN, "--lr", 0.001, "--steps", 6)
    assert refused.exit_code == ExitCode.MODEL and "--allow-change" in refused.stderr
    assert "lr 0.01 -> 0.001" in refused.stderr and "steps 12 -> 6" in refused.stderr
    going = train(*RUN, "--lr", 0.001, "--steps", 6, "--allow-change")
    assert going.exit_code == 0 and "going on after step 4 of 6" in going.stderr
    info = info_of(tmp_path / "run")
    assert (info["steps"], info["settings"]["lr"], info["resumed_from"]) == (6, 0.001, [4])
    assert "lr 0.01 -> 0.001" in str(info["changes"])


def test_never_resuming_refuses_a_folder_that_holds_an_unfinished_run(train, tmp_path):
    train(*RUN, fault="step:term:4")
    refused = train(*RUN, "--resume", "never")
    assert refused.exit_code == ExitCode.EXISTS and "unfinished" in refused.stderr


def test_one_process_at_a_time_trains_a_run(train, tmp_path):
    train(*RUN, fault="step:term:4")
    with locked(tmp_path / "run"):
        refused = train(*RUN)
    assert refused.exit_code == ExitCode.EXISTS and "trains this run" in refused.stderr
    assert train(*RUN).exit_code == 0


# ---------------------------------------------------------------- asked to stop
@pytest.mark.parametrize(("sent", "status"), [("int", 130), ("term", 75), ("usr1", 75), ("hup", 75)])
def test_each_signal_has_its_status(sent, status, train):
    result = train(*RUN, fault=f"step:{sent}:2")
    assert result.exit_code == status and "the same command goes on" in result.stderr


def test_a_second_ctrl_c_stops_at_once(train, tmp_path):
    result = train(*RUN, "--pack", "off", "--micro-batch", 1, fault="pass:int:3,pass:int:4")  # in the first step
    assert result.exit_code == ExitCode.INTERRUPTED and "interrupted" in result.stderr
    assert checkpoint_steps(tmp_path / "run") == [] and info_of(tmp_path / "run")["status"] == "stopped"


def test_before_the_time_limit_is_over_a_checkpoint_is_written(train, tmp_path):
    """This process has run for a while: the limit counts from its start."""
    limit = f"{time.monotonic() - STARTED + 15:.0f}s"
    stopped = train(*RUN, "--steps", 100_000, "--time-limit", limit)
    assert stopped.exit_code == ExitCode.STOPPED and "stopped by --time-limit after step" in stopped.stderr
    last = checkpoint_steps(tmp_path / "run")[-1]
    assert f"after step {last:,} of 100,000; saved in run" in stopped.stderr
    over = train(*RUN, "--steps", 100_000, "--time-limit", "1s")
    assert over.exit_code == ExitCode.USAGE and "before a single step was made" in over.stderr
    assert checkpoint_steps(tmp_path / "run")[-1] == last


@pytest.mark.parametrize(
    "options", [["--time-limit", "soon"], ["--save-every", "0"], ["--keep", 0], ["--early-stop", 0],
                ["--early-stop", 2, "--save-every", "5m"], ["--early-stop", 2, "--valid", 0]],
)  # fmt: skip
def test_times_and_counts_out_of_range_are_usage_errors(options, train):
    assert train(*RUN, *options).exit_code == ExitCode.USAGE


# ---------------------------------------------------------------- what goes wrong in a step
@pytest.mark.parametrize("mode", [["--micro-tokens", 200], ["--pack", "off", "--micro-batch", 4]])
def test_where_memory_runs_out_the_same_rows_go_on_in_smaller_pieces(mode, train, tmp_path):
    options = [*RUN, *mode, "--dtype", "fp32"]
    assert train(*options, cwd=fresh(tmp_path, "plain")).exit_code == 0
    halved = train(*options, fault="pass:memory:4")
    assert halved.exit_code == 0 and "out of memory: it goes on with" in halved.stderr
    info = info_of(tmp_path / "run")
    assert len(info["events"]) == 1 and "out of memory" in info["events"][0]["what"]
    ours = [line["loss"] for line in jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    theirs = [line["loss"] for line in jsonl(tmp_path / "plain" / "run" / "metrics.jsonl") if "loss" in line]
    assert ours == pytest.approx(theirs, rel=1e-4)


def fresh(tmp_path, name):
    place = tmp_path / name
    place.mkdir()
    write_rows(place / "train.jsonl")
    return place


def test_a_halving_is_kept_over_a_stop(train, tmp_path):
    stopped = train(*RUN, "--pack", "off", "--micro-batch", 8, fault="pass:memory:2,step:term:4")
    assert stopped.exit_code == ExitCode.STOPPED
    known = json.loads((tmp_path / "run/checkpoints/step-000004/training/state.json").read_text())
    assert known["used"]["micro_batch"] == 4
    assert train(*RUN, "--pack", "off", "--micro-batch", 8).exit_code == 0
    assert len(info_of(tmp_path / "run")["events"]) == 1


def test_one_row_that_does_not_fit_ends_with_a_checkpoint_and_status_5(train, whole, tmp_path):
    options = [*RUN, "--pack", "off", "--micro-batch", 1]
    expected = whole(*options)
    result = train(*options, fault="pass:memory:20")  # in the third step
    assert result.exit_code == ExitCode.MEMORY and "checkpoints/step-000002" in result.stderr
    assert train(*options).exit_code == 0 and made(tmp_path / "run") == expected


@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_number_that_is_none_stops_and_the_last_checkpoint_is_named(place, train, whole, tmp_path):
    options = [*RUN, "--save-every", 2]
    expected = whole(*options)
    result = train(*options, fault=f"{place}:nan:5")
    assert (
        result.exit_code == ExitCode.DIVERGED and "the last checkpoint is run/checkpoints/step-000004" in result.stderr
    )
    assert info_of(tmp_path / "run")["status"] == "diverged"
    assert train(*options).exit_code == 0 and made(tmp_path / "run") == expected


@pytest.mark.parametrize("what", ["enospc", "eio", "edquot"])
def test_a_full_disk_keeps_the_checkpoint_before_and_ends_with_74(what, train, whole, tmp_path):
    options = [*RUN, "--save-every", 4]
    expected = whole(*options)
    result = train(*options, fault=f"manifest:{what}:2")
    assert result.exit_code == ExitCode.IO and checkpoint_steps(tmp_path / "run") == [4]
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-*"))
    assert train(*options).exit_code == 0 and made(tmp_path / "run") == expected


# ---------------------------------------------------------------- early stopping
def test_training_stops_when_the_held_out_loss_rises_and_the_best_adapter_stays(train, tmp_path):
    options = [
        "train.jsonl",
        "--steps",
        60,
        "--batch",
        8,
        "--r",
        8,
        "--lr",
        0.1,
        "--run",
        "run",
        "--valid",
        "valid.jsonl",
    ]
    rows = [{"prompt": "Tell me.\n", "completion": f"{word} no {word} yes {word}"} for word in ("blue", "sky", "grass")]
    write_rows(tmp_path / "valid.jsonl", rows)
    result = train(*options, "--early-stop", 2, "--save-every", 3, "--keep", 1)
    assert result.exit_code == 0, result.stderr
    info = info_of(tmp_path / "run")
    losses = {x["step"]: x["valid_loss"] for x in jsonl(tmp_path / "run" / "metrics.jsonl") if "valid_loss" in x}
    best = min((loss, step) for step, loss in losses.items() if step)[1]
    assert info["best_step"] == best and info["steps"] == best + 6 < 60 and info["valid_loss"] == losses[best]
    assert f"lowest after step {best} of {best + 6}" in result.stderr
    assert checkpoint_steps(tmp_path / "run") == [best, best + 6]
    kept = files_in(tmp_path / "run" / "checkpoints" / f"step-{best:06d}")
    mine = made(tmp_path / "run")
    assert mine["adapter_model.safetensors"] == kept["adapter_model.safetensors"]
    assert set(mine) == {name for name in kept if not name.startswith("training/")}


def test_early_stopping_goes_on_to_the_same_bytes_too(train, whole, tmp_path):
    options = [*RUN, "--early-stop", 3, "--save-every", 2]
    expected = whole(*options)
    for fault in ("step:term:3", "validation:term:3", "staged:term:1"):
        assert train(*options, fault=fault).exit_code == ExitCode.STOPPED
    assert train(*options).exit_code == 0 and made(tmp_path / "run") == expected
    ours, theirs = (info_of(place / "run") for place in (tmp_path, tmp_path / "whole"))
    assert ours["best_step"] == theirs["best_step"]
    losses = [
        {x["step"]: x["valid_loss"] for x in jsonl(place / "run" / "metrics.jsonl") if "valid_loss" in x}
        for place in (tmp_path, tmp_path / "whole")
    ]
    assert losses[0] == losses[1] and list(losses[0]) == [0, 2, 4, 6, 8, 10, 12]


# ---------------------------------------------------------------- room, and the unusual
def test_a_disk_without_room_for_the_checkpoints_is_said_before_anything_is_loaded(train, tmp_path, monkeypatch):
    monkeypatch.setattr("ftkit.io.free_space.shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000}))
    result = train(*RUN, "--keep", 4)
    assert result.exit_code == ExitCode.IO and "5 checkpoints take" in result.stderr
    assert "plan:" not in result.stderr


def test_a_machine_without_memory_for_the_weights_is_said_before_they_are_loaded(train, tmp_path, monkeypatch):
    facts = tmp_path / "meminfo"
    facts.write_text("MemAvailable:   5 kB\n")
    monkeypatch.setattr("ftkit.io.free_space.MEMORY_FACTS", facts)
    result = train(*RUN)
    assert result.exit_code == ExitCode.MEMORY and "takes 222 KB" in result.stderr and "5 KB are free" in result.stderr


def test_a_spike_of_the_loss_is_reported_and_kept(train, tmp_path, monkeypatch):
    monkeypatch.setattr("ftkit.commands.train_loop.SPIKE_WINDOW", 3)
    monkeypatch.setattr("ftkit.commands.train_loop.SPIKE", 0.9)  # a loss that falls slowly is one
    result = train(*RUN)
    (event, *_) = info_of(tmp_path / "run")["events"]
    assert result.exit_code == 0 and "the median of the 3 before" in event["what"] and event["what"] in result.stderr
    losses = [line["loss"] for line in jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    step = event["step"]
    assert losses[step - 1] > 0.9 * sorted(losses[step - 4 : step - 1])[1]


# ---------------------------------------------------------------- what a hostile reader thought of
def test_memory_that_runs_out_in_a_validation_changes_no_step_after_it(train, whole, tmp_path):
    options = [*RUN, "--dropout", 0.3, "--early-stop", 9, "--save-every", 2, "--valid", 0.3, "--pack", "off",
               "--micro-batch", 4]  # fmt: skip
    expected = whole(*options)
    result = train(*options, fault="validation:memory:5")
    assert result.exit_code == 0 and made(tmp_path / "run") == expected
    assert [event["what"] for event in info_of(tmp_path / "run")["events"]] == [
        "out of memory on the held-out rows: they went through in smaller micro-batches"
    ]


def test_a_damaged_best_checkpoint_sends_the_run_back_behind_it(train, whole, tmp_path):
    options = ["train.jsonl", "--steps", 30, "--batch", 8, "--r", 8, "--lr", 0.1, "--run", "run", "--valid", "valid.jsonl",
               "--early-stop", 4, "--save-every", 3, "--keep", 1]  # fmt: skip
    rows = [{"prompt": "Tell me.\n", "completion": f"{word} no {word} yes {word}"} for word in ("blue", "sky", "grass")]
    (tmp_path / "whole").mkdir()
    for place in (tmp_path, tmp_path / "whole"):
        write_rows(place / "valid.jsonl", rows)
        write_rows(place / "train.jsonl")
    assert train(*options, cwd=tmp_path / "whole").exit_code == 0
    best = info_of(tmp_path / "whole" / "run")["best_step"]
    assert train(*options, fault=f"step:term:{best + 4}").exit_code == ExitCode.STOPPED
    file = tmp_path / "run" / "checkpoints" / f"step-{best:06d}" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    again = train(*options)
    assert again.exit_code == 0 and f"step-{best:06d}" in again.stderr and "going back behind step" in again.stderr
    assert made(tmp_path / "run") == made(tmp_path / "whole" / "run")


def test_a_death_before_the_first_checkpoint_leaves_no_line_behind(train, tmp_path):
    train(*RUN, fault="pass:memory:999,step:enospc:4")
    assert train(*RUN).exit_code == 0
    steps = [line["step"] for line in jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, 13))


def test_a_signal_after_the_last_step_does_not_take_a_finished_run_away(train, whole, tmp_path):
    expected = whole(*RUN)
    result = train(*RUN, fault="staged:usr1:1")  # while the adapter is written
    assert result.exit_code == 0 and made(tmp_path / "run") == expected
    assert (tmp_path / "runs" / "latest").is_file()


def test_a_complete_run_without_its_adapter_is_not_taken_for_complete(train, whole, tmp_path):
    expected = whole(*RUN, "--save-every", 4)
    train(*RUN, "--save-every", 4)
    shutil.rmtree(tmp_path / "run" / "adapter")
    again = train(*RUN, "--save-every", 4)
    assert again.exit_code == 0 and "going on after step 8" in again.stderr and made(tmp_path / "run") == expected


def test_never_resuming_trains_a_complete_run_once_more(train, tmp_path):
    first = train(*RUN[:-2])
    second = train(*RUN[:-2], "--resume", "never")
    assert second.exit_code == 0 and second.stdout != first.stdout
    train(*RUN)
    assert train(*RUN, "--resume", "never").exit_code == ExitCode.EXISTS


def test_a_held_out_loss_that_is_no_number_stops_the_run(train, tmp_path, tiny_model):
    import torch
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][ord("~") - 33 + 3] = torch.nan  # a token that only the held-out row has
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    write_rows(tmp_path / "valid.jsonl", [{"prompt": "~~~~", "completion": "~~"}])
    result = run_train(*RUN, "--valid", "valid.jsonl", "--model", broken, cwd=tmp_path)
    assert result.exit_code == ExitCode.DIVERGED and "step 0: the held-out loss is nan" in result.stderr


def test_early_stopping_without_held_out_rows_is_refused(train, tmp_path):
    (tmp_path / "valid.jsonl").write_text(json.dumps({"prompt": "p" * 5000, "completion": "x"}) + "\n")
    result = train(*RUN, "--early-stop", 2, "--valid", "valid.jsonl")
    assert result.exit_code == ExitCode.DATA and "no row is held out" in result.stderr


def test_changed_sizes_of_micro_batches_are_those_that_are_used(train, tmp_path):
    options = [*RUN, "--pack", "off"]
    train(*options, "--micro-batch", 2, fault="step:term:4")
    going = train(*options, "--micro-batch", 8, "--allow-change", fault="step:term:2")
    assert going.exit_code == ExitCode.STOPPED
    known = json.loads((tmp_path / "run/checkpoints/step-000006/training/state.json").read_text())
    assert known["used"]["micro_batch"] == 8


def test_fewer_steps_than_are_made_is_refused(train):
    train(*RUN, fault="step:term:6")
    result = train(*RUN, "--steps", 3, "--allow-change")
    assert result.exit_code == ExitCode.MODEL and "6 steps are made already, --steps asks for 3" in result.stderr


def test_another_rhythm_of_early_stopping_is_named(train):
    options = [*RUN, "--early-stop", 3]
    train(*options, "--save-every", 2, fault="step:term:3")
    refused = train(*options, "--save-every", 3)
    assert refused.exit_code == ExitCode.MODEL and "save_every 2 -> 3" in refused.stderr
    assert train(*options, "--save-every", 3, "--allow-change").exit_code == 0


def test_a_disk_with_room_for_one_more_checkpoint_is_enough_to_go_on(train, tmp_path, monkeypatch):
    train(*RUN, "--save-every", 2, fault="step:term:6")
    size = sum(path.stat().st_size for path in (tmp_path / "run/checkpoints/step-000006").rglob("*"))
    usage = type("Usage", (), {"free": 2 * size})
    monkeypatch.setattr("ftkit.io.free_space.shutil.disk_usage", lambda place: usage)
    assert train(*RUN, "--save-every", 2).exit_code == 0


def test_rows_that_had_to_be_padded_stay_padded(train, tmp_path, monkeypatch):
    monkeypatch.setattr("ftkit.commands.train.packing_fault", lambda *_: "it leaks")
    train(*RUN, fault="step:term:4")
    monkeypatch.setattr("ftkit.commands.train.packing_fault", lambda *_: None)
    again = train(*RUN)
    assert again.exit_code == 0 and "rows are padded, not packed" in again.stderr and "it leaks" in again.stderr
