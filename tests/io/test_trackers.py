"""What the trackers hold afterwards, read back through their own libraries, and that none of them can stop a run."""

import json
import os
import socket
import sqlite3
import struct
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from conftest import CHECKOUT

from ftkit.errors import ExitCode, UserError
from ftkit.io.run_folder import RunFolder
from ftkit.io.trackers import check_trackers, flatten, no_stdout, open_trackers, without_userinfo

FACTS = {
    "lr": 2e-4,
    "model": "https://someone:swordfish@example.org/base",
    "targets": ["q_proj", "v_proj"],
    "dry_run": False,
    "steps": None,
    "data": {"rows": 30},
}
FLAT = {
    "lr": 2e-4,
    "model": "https://example.org/base",
    "targets": '["q_proj", "v_proj"]',
    "dry_run": False,
    "data.rows": 30,
}
SESSION = """
import json, random, sys
from pathlib import Path
import numpy
from ftkit.io.run_folder import RunFolder
from ftkit.io.trackers import check_trackers, open_trackers
names, first, last, status, known, facts = json.loads(sys.argv[1])
chances = lambda: (random.getstate(), numpy.random.get_state()[1].tolist())
before = chances()
check_trackers(names)
run = RunFolder(Path("runs/one"))
opened = open_trackers(names, run, facts, known=known, done_steps=first - 1)
print(json.dumps(opened.known))
for step in range(first, last + 1):
    opened.log(step, {"step": step, "loss": 1 / step, "tokens": 10 * step, "words": "left out", "flag": True})
opened.log(last, {"valid_loss": last / 4})
run.adapter.mkdir(exist_ok=True)
(run.adapter / "adapter_config.json").write_text("{}")
opened.end(status)
print("chance is", "untouched" if chances() == before else "disturbed")
"""
"""Steps `first` to `last` of a run as train tells them, in a process of its own; stdout: the names to resume with, a word."""
END = "chance is untouched"


def run_python(folder, *arguments, **environment):
    """Python in `folder`, as a user without an account of any tracker has it."""
    foreign = ("WANDB", "MLFLOW", "PYTEST", "CI", "GITHUB", "XDG", "TB_", "NETRC")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    (folder / "home").mkdir(exist_ok=True)
    settings = {"HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "SECRET_TOKEN": "swordfish"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=kept | settings | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def session(folder, names, first, last, *, status="complete", known=None, **environment):
    """One session of a run; what its process said."""
    (folder / "runs" / "one").mkdir(parents=True, exist_ok=True)
    told = json.dumps([names, first, last, status, known, FACTS])
    return run_python(folder, "-c", SESSION, told, **({"WANDB_MODE": "offline"} | environment))


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run under all trackers: five steps, stopped, resumed from the checkpoint of step 3, complete after step 8.

    It is in a checkout whose remote is reached with a token.
    """
    folder = tmp_path_factory.mktemp("tracked")
    for command in ("init", "remote add origin https://swordfish@example.org/a", "commit --allow-empty -m first"):
        who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
        subprocess.run(["git", *who, *command.split()], cwd=folder, check=True, capture_output=True)
    first = session(folder, "mlflow,tensorboard, wandb", 1, 5, status="stopped")
    assert first.returncode == 0, first.stderr
    known = json.loads(first.stdout.splitlines()[0])
    second = session(folder, "mlflow,tensorboard,wandb", 4, 8, known=known)
    assert second.returncode == 0, second.stderr
    return folder, first, second


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty run in an empty folder; the environment is as before afterwards."""
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    run = RunFolder(tmp_path / "runs" / "one")
    run.path.mkdir(parents=True)
    yield run
    os.environ.clear()
    os.environ.update(before)


def mlflow_client(folder):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


def mlflow_run(folder):
    """The one run of the one experiment."""
    client = mlflow_client(folder)
    experiment = client.get_experiment_by_name("ftkit")
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def tensorboard_events(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


def wandb_records(path):
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB), 7 bytes in front, protobuf inside."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def wandb_sessions(folder):
    """Of each session, oldest first: the run's id, its configuration, {step: numbers}, names of artefacts, exit code."""
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        found = {"config": {}, "steps": {}, "artifacts": []}
        for record in wandb_records(path):
            match record.WhichOneof("record_type"):
                case "run":
                    found["id"] = record.run.run_id
                    found["config"] |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
                case "history":
                    items = {
                        item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item
                    }
                    found["steps"][record.history.step.num] = {k: v for k, v in items.items() if k[0] != "_"}
                case "artifact":
                    found["artifacts"].append(
                        (record.artifact.type, [e.path for e in record.artifact.manifest.contents])
                    )
                case "exit":
                    found["exit"] = record.exit.exit_code
        yield found


def test_facts_become_one_level_without_what_is_none_and_without_passwords():
    assert flatten(FACTS) == FLAT


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("postgresql://me:pw@host:5432/db", "postgresql://host:5432/db"),
        ("https://token@github.com/a/b", "https://github.com/a/b"),
        ("https://host/a@b", "https://host/a@b"),
        ("write to me@example.org", "write to me@example.org"),
    ],
)
def test_the_name_and_password_of_an_address_are_cut_out(text, clean):
    assert without_userinfo(f"see {text} now") == f"see {clean} now"


def test_nothing_of_a_library_or_its_processes_reaches_stdout(capfd):
    with no_stdout():
        print("from python")
        subprocess.run(["echo", "from a process"], check=True)
        os.write(1, b"from C\n")
    print("ours")
    assert capfd.readouterr().out == "ours\n"


def test_mlflow_holds_parameters_and_every_number_of_every_step(tracked):
    client, run = mlflow_run(tracked[0])
    assert run.data.params == {key: str(value) for key, value in FLAT.items()}
    assert run.info.run_name == "one" and run.info.status == "FINISHED"
    points = {(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")}
    assert points == {(step, 1 / step) for step in range(1, 9)}
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "valid_loss")] == [(5, 1.25), (8, 2)]
    assert set(run.data.metrics) == {"loss", "tokens", "valid_loss"}


def test_mlflow_holds_the_adapter(tracked):
    client, run = mlflow_run(tracked[0])
    assert [file.path for file in client.list_artifacts(run.info.run_id, "adapter")] == ["adapter/adapter_config.json"]
    local = client.download_artifacts(run.info.run_id, "adapter/adapter_config.json", str(tracked[0]))
    assert Path(local).read_text() == "{}"


def test_tensorboard_holds_each_step_once_also_those_made_again_after_a_resume(tracked):
    events = tensorboard_events(tracked[0] / "runs" / "one")
    assert events.Tags()["scalars"] == ["loss", "tokens", "valid_loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(s, pytest.approx(1 / s)) for s in range(1, 9)]
    (table,) = events.Tensors("parameters/text_summary")
    assert "| lr | 0.0002 |" in table.tensor_proto.string_val[0].decode()
    assert [e.tensor_proto.string_val[0] for e in events.Tensors("status/text_summary")] == [b"stopped", b"complete"]


def test_tensorboard_shows_nothing_of_a_session_that_died_before_its_first_checkpoint(here):
    known = {}
    for last in (4, 2):
        opened = open_trackers("tensorboard", here, FACTS, known=known)
        for step in range(1, last + 1):
            opened.log(step, {"loss": 1 / step})
        opened.end("stopped")
        known = opened.known
    events = tensorboard_events(here.path)
    assert [e.step for e in events.Scalars("loss")] == [1, 2]
    assert len(events.Tensors("parameters/text_summary")) == 1


def test_tensorboard_knows_the_hyperparameters(tracked):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = tensorboard_events(tracked[0] / "runs" / "one")
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    assert values["lr"].number_value == 2e-4 and values["targets"].string_value == FLAT["targets"]


def test_wandb_offline_holds_parameters_steps_and_the_adapter_under_one_id(tracked):
    first, second = wandb_sessions(tracked[0])
    assert first["id"] == second["id"]
    assert {key: first["config"][key] for key in FLAT} == FLAT
    assert {step: numbers["loss"] for step, numbers in first["steps"].items()} == {s: 1 / s for s in range(1, 6)}
    assert {step: numbers["loss"] for step, numbers in second["steps"].items()} == {s: 1 / s for s in range(4, 9)}
    assert second["steps"][8] == {"loss": 1 / 8, "tokens": 80, "valid_loss": 2}
    assert first["artifacts"] == [] and ("model", ["adapter_config.json"]) in second["artifacts"]
    assert (first["exit"], second["exit"]) == (1, 0)


def test_stdout_is_ours_alone_and_stderr_says_only_where_to_look(tracked):
    _, first, second = tracked
    assert first.stdout.splitlines()[1:] == second.stdout.splitlines()[1:] == [END]
    for done in (first, second):
        assert [line.split(": ")[0] for line in done.stderr.splitlines()] == ["mlflow", "tensorboard", "wandb"]


def test_a_resumed_run_keeps_its_names(tracked):
    _, first, second = tracked
    known = json.loads(first.stdout.splitlines()[0])
    assert set(known) == {"mlflow", "tensorboard", "wandb"}
    assert json.loads(second.stdout.splitlines()[0]) == known


def test_no_secret_of_address_or_environment_is_in_any_file(tracked):
    files = [path for path in tracked[0].rglob("*") if path.is_file() and ".git" not in path.parts]
    assert {".db", ".wandb"} < {path.suffix for path in files}
    assert not [path for path in files if b"swordfish" in path.read_bytes()]


def test_telemetry_is_off(tmp_path):
    script = """
from ftkit.io.tracker_libraries import set_environment
set_environment()
from mlflow.telemetry import get_telemetry_client
from wandb.env import error_reporting_enabled
print(get_telemetry_client(), error_reporting_enabled())
"""
    done = run_python(tmp_path, "-c", script)
    assert done.stdout == "None False\n", done.stderr


def test_what_the_user_sets_in_the_environment_holds(here):
    os.environ["MLFLOW_EXPERIMENT_NAME"] = "mine"
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{here.path.parent / 'theirs.db'}"
    opened = open_trackers("mlflow", here, FACTS)
    opened.log(1, {"loss": 2.0})
    opened.end("complete")
    from mlflow import MlflowClient

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.run_id == opened.known["mlflow"]["run_id"] and run.data.metrics == {"loss": 2.0}


def test_without_trackers_nothing_happens(here, capfd):
    opened = open_trackers(None, here, FACTS)
    opened.log(1, {"loss": 2.0})
    opened.end("complete")
    assert opened.known == {} and not list(here.path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_a_server_that_is_gone_is_one_warning(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address = f"http://me:swordfish@127.0.0.1:{port}"
    known = {"mlflow": {"run_id": "of an earlier session"}}
    settings = {"MLFLOW_TRACKING_URI": address, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    done = session(tmp_path, "mlflow", 1, 3, known=known, **settings)
    assert done.returncode == 0 and done.stdout.splitlines() == [json.dumps(known), END]
    (line,) = done.stderr.splitlines()
    assert line.startswith("ftkit: warning: mlflow: ") and line.endswith("; the run goes on without it")
    assert "swordfish" not in line


def test_a_server_that_never_answers_is_one_warning_and_does_not_keep_the_process(tmp_path):
    script = SESSION.replace("names, first", "import ftkit.io.trackers as t; t.OPEN_SECONDS = 4; names, first", 1)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        told = json.dumps(["mlflow", 1, 3, "complete", None, FACTS])
        settings = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{server.getsockname()[1]}"}
        done = run_python(tmp_path, "-c", script, told, **settings)
    assert done.returncode == 0 and done.stdout.splitlines() == ["{}", END]
    assert done.stderr == "ftkit: warning: mlflow: no answer within 4 s; the run goes on without it\n"


def test_a_tracker_that_breaks_on_the_way_is_one_warning_and_the_others_go_on(here, capfd, monkeypatch):
    monkeypatch.setattr("ftkit.io.trackers.GATHER_SECONDS", 0.01)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{here.path.parent / 'mlflow.db'}"
    opened = open_trackers("mlflow,tensorboard", here, FACTS)
    with sqlite3.connect(here.path.parent / "mlflow.db") as store:
        store.execute("drop table metrics")
    for step in range(1, 6):
        opened.log(step, {"loss": 1.0})
        time.sleep(0.05)  # several calls, not one with all the steps
    opened.end("complete")
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ftkit: warning")]
    assert len(lines) == 1 and "no such table: metrics" in lines[0] and lines[0].startswith("ftkit: warning: mlflow: ")
    assert [e.step for e in tensorboard_events(here.path).Scalars("loss")] == [1, 2, 3, 4, 5]


def test_a_folder_that_cannot_be_made_is_one_warning(here, capfd):
    (here.path / "tensorboard").write_text("in the way")
    opened = open_trackers("tensorboard", here, FACTS)
    opened.log(1, {"loss": 1.0})
    opened.end("complete")
    assert opened.known == {}
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("ftkit: warning: tensorboard: FileExistsError")


@pytest.mark.parametrize("name", ["mlflow", "tensorboard", "wandb"])
def test_a_missing_library_is_exit_6_with_an_extra_that_exists(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError) as refused:
        check_trackers(f"{name}")
    assert refused.value.exit_code == ExitCode.ENVIRONMENT
    assert refused.value.hint == f"pip install 'ftkit[{name}]'"
    assert name in tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_an_unknown_tracker_is_exit_2_with_the_nearest(monkeypatch):
    with pytest.raises(UserError) as refused:
        check_trackers("mlfow")
    assert refused.value.exit_code == ExitCode.USAGE and "mlflow" in refused.value.hint


def test_wandb_without_a_key_is_refused_and_asks_nothing_on_a_terminal(tmp_path):
    script = """
import pathlib
from ftkit.errors import UserError
from ftkit.io.trackers import check_trackers
try:
    check_trackers("wandb")
except UserError as error:
    pathlib.Path("said").write_text(f"{int(error.exit_code)} {error.message} {error.hint}")
"""
    on_a_terminal = "import pty, sys; sys.exit(pty.spawn([sys.executable, '-c', sys.argv[1]]))"
    done = run_python(tmp_path, "-c", on_a_terminal, script)
    assert (tmp_path / "said").read_text() == (
        "6 --tracker wandb: there is no API key wandb login, or WANDB_MODE=offline"
    ), done
    assert done.stdout == ""
