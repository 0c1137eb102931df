"""`ftkit train --tracker`: the numbers of metrics.jsonl are in the trackers, and the run is the same as without them."""

import json
import os

import pytest
from conftest import assert_refused
from train_shell import QUICK, write_rows

from ftkit.errors import ExitCode
from ftkit.io.atomic import sha256_of_file


@pytest.fixture
def train(tmp_path, run_here, tiny_model):
    """`ftkit train` in tmp_path, which holds train.jsonl; the environment is as before afterwards."""
    write_rows(tmp_path / "train.jsonl")
    before = dict(os.environ)
    yield lambda *arguments: run_here("train", "train.jsonl", "--model", tiny_model, *QUICK, *arguments)
    os.environ.clear()
    os.environ.update(before)


def test_a_tracked_run_makes_the_same_bytes_and_both_trackers_hold_its_log(train, tmp_path):
    plain, tracked = train("--run", "plain"), train("--run", "tracked", "--tracker", "mlflow,tensorboard")
    assert (plain.exit_code, tracked.exit_code) == (0, 0) and tracked.stdout == "tracked\n", tracked.stderr
    assert (
        len(
            {sha256_of_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("plain", "tracked")}
        )
        == 1
    )
    logged = [json.loads(line) for line in (tmp_path / "tracked" / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"]) for line in logged if "loss" in line]
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = client.get_run(json.loads((tmp_path / "tracked" / "run.json").read_text())["trackers"]["mlflow"]["run_id"])
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == losses
    assert run.info.status == "FINISHED" and client.list_artifacts(run.info.run_id, "adapter")
    assert run.data.params["r"] and run.data.params["data.rows"] and "json" in run.data.params
    events = EventAccumulator(str(tmp_path / "tracked" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [step for step, _ in losses]


def test_an_unknown_tracker_is_refused_before_anything_is_made(train, tmp_path):
    assert_refused(train("--tracker", "tensorbord"), ExitCode.USAGE, "tensorbord", "did you mean 'tensorboard'?")
    assert not (tmp_path / "runs").exists()
