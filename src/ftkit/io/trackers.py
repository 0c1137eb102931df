"""Experiment trackers: what train measures, also in MLflow, TensorBoard or Weights & Biases.

A tracker never stops a run, and the run never waits for one while it trains: each works in a thread of its own, and the
first thing that goes wrong there is one warning and its last call. The run's metrics.jsonl holds everything regardless.
"""

import importlib.util
import io
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Any, Protocol

from ftkit import console
from ftkit.errors import ExitCode, UserError, did_you_mean
from ftkit.io.run_folder import COMPLETE, RunFolder

OPEN_SECONDS = 60
"""How long train waits for a tracker before the first step."""
END_SECONDS = 120
"""How long it waits for one to take the rest and the adapter."""
STOP_SECONDS = 10
"""The same for a run that was stopped: whoever stops it does not wait long."""
LIBRARIES = {"mlflow": ("mlflow", "sqlalchemy", "alembic"), "tensorboard": ("tensorboard",), "wandb": ("wandb",)}
ENVIRONMENT = {
    "MLFLOW_EXPERIMENT_NAME": "ftkit",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "WANDB_PROJECT": "ftkit",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_DISABLE_GIT": "true",
    "WANDB__DISABLE_META": "true",
    "WANDB_INIT_TIMEOUT": "30",
    "WANDB_FINISH_TIMEOUT": str(END_SECONDS),
}
"""What the libraries read before they start, each unless it is set: names, no telemetry, no words of their own, an end to
waiting. wandb's "meta" is the command line, the user and the address of the git remote."""
USERINFO = re.compile(r"(?<=://)[^/@\s]+@")
MLFLOW_STATUS = {COMPLETE: "FINISHED", "stopped": "KILLED", "interrupted": "KILLED"}
MOST_PARAMETERS, MOST_METRICS = 100, 1000
"""What MLflow takes in one call."""


@dataclass(frozen=True)
class Session:
    """What a tracker is told at the start.

    known: what this tracker called the run in an earlier session (empty in the first).
    done_steps: steps that the checkpoint holds, 0 in a new run.
    """

    run: RunFolder
    parameters: dict[str, Any]
    known: dict[str, str]
    done_steps: int


@dataclass(frozen=True)
class Point:
    """Numbers of one step, and when they were measured in seconds since 1970."""

    step: int
    values: dict[str, float]
    at: float


@dataclass(frozen=True)
class End:
    """How the run ended, and its adapter where it has one."""

    status: str
    adapter: Path | None


class Tracker(Protocol):
    """One library. All calls come from one thread and may fail in any way."""

    known: dict[str, str]
    """What names the run there; given back to the next session."""
    where: str
    """For the person: where to look."""

    def log(self, points: Sequence[Point]) -> None:
        """Numbers of some steps, in order."""

    def end(self, end: End) -> None:
        """Write the rest, the status and the adapter."""


class Mlflow:
    """A run in the experiment MLFLOW_EXPERIMENT_NAME of MLFLOW_TRACKING_URI (MLflow's default: mlflow.db here).

    The client of MLflow is used, not its fluent functions: those also record the git commit and the user's name.
    """

    def __init__(self, session: Session) -> None:
        import mlflow
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, mlflow.MlflowClient()
        name, experiment = session.run.path.name, os.environ["MLFLOW_EXPERIMENT_NAME"]
        if session.known:
            self._id = session.known["run_id"]
            self._client.update_run(self._id, status="RUNNING")
        else:
            found = self._client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else self._client.create_experiment(experiment)
            tags = {"mlflow.source.name": "ftkit"}
            self._id = self._client.create_run(number, run_name=name, tags=tags).info.run_id
        known = self._client.get_run(self._id).data.params  # a parameter cannot be set twice
        new = [Param(key, str(value)) for key, value in session.parameters.items() if key not in known]
        for start in range(0, len(new), MOST_PARAMETERS):
            self._client.log_batch(self._id, params=new[start : start + MOST_PARAMETERS])
        self.known = {"run_id": self._id}
        self.where = f"mlflow: run {name}, experiment {experiment}, {mlflow.get_tracking_uri()}"

    def log(self, points: Sequence[Point]) -> None:
        """As few calls as MLflow allows: one takes about as long as a step of a small model."""
        metrics = [
            self._metric(name, value, int(point.at * 1000), point.step)
            for point in points
            for name, value in point.values.items()
        ]
        for start in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + MOST_METRICS])

    def end(self, end: End) -> None:
        """The adapter as the artefact `adapter`."""
        if end.adapter:
            self._client.log_artifacts(self._id, str(end.adapter), "adapter")
        self._client.set_terminated(self._id, MLFLOW_STATUS.get(end.status, "FAILED"))


class Tensorboard:
    """Event files in RUN/tensorboard, one a session; steps that a resumed run makes again replace the first ones."""

    def __init__(self, session: Session) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = session.run.path / "tensorboard"
        again = session.done_steps + 1 if session.known else None
        self._writer: Any = SummaryWriter(str(folder), purge_step=again, flush_secs=10)
        experiment, start, self._success = hparams(session.parameters, {})
        if not session.known:
            self._writer.file_writer.add_summary(experiment)
            self._writer.file_writer.add_summary(start)
            rows = [f"| {key} | {value} |" for key, value in session.parameters.items()]
            self._writer.add_text("parameters", "\n".join(["| name | value |", "| --- | --- |", *rows]))
        self.known = {"folder": folder.name}
        self.where = f"tensorboard: tensorboard --logdir {folder}"

    def log(self, points: Sequence[Point]) -> None:
        """One scalar a number."""
        for point in points:
            for name, value in point.values.items():
                self._writer.add_scalar(name, value, point.step, walltime=point.at)

    def end(self, end: End) -> None:
        """The status as text. There are no artefacts: the adapter is beside the folder."""
        self._writer.add_text("status", end.status)
        if end.status == COMPLETE:
            self._writer.file_writer.add_summary(self._success)
        self._writer.close()


class Wandb:
    """A run of WANDB_PROJECT; with WANDB_MODE=offline only a folder in ./wandb (or WANDB_DIR), to be synced later."""

    def __init__(self, session: Session) -> None:
        import wandb

        self._artifact = wandb.Artifact
        self.known = {"id": session.known.get("id") or secrets.token_hex(4)}
        self._run = wandb.init(
            id=self.known["id"],
            name=os.environ.get("WANDB_NAME") or session.run.path.name,
            config=session.parameters,
            resume="allow",
            allow_val_change=True,
        )
        place = "disabled" if self._run.disabled else self._run.url or Path(self._run.dir).parent
        self.where = f"wandb: {place}"

    def log(self, points: Sequence[Point]) -> None:
        """wandb leaves out steps that it has already; in a resumed run those are made again with equal numbers."""
        for point in points:
            self._run.log(point.values, step=point.step)

    def end(self, end: End) -> None:
        """The adapter as an artifact of type model; "immutable": no copy of it is made beforehand."""
        if end.adapter:
            artifact = self._artifact(f"adapter-{self.known['id']}", type="model")
            artifact.add_dir(str(end.adapter), policy="immutable")
            self._run.log_artifact(artifact)
        self._run.summary["status"] = end.status
        self._run.finish(exit_code=0 if end.status == COMPLETE else 1)


KINDS: dict[str, Callable[[Session], Tracker]] = {"mlflow": Mlflow, "tensorboard": Tensorboard, "wandb": Wandb}


class Worker:
    """A tracker in a thread of its own. A daemon: what hangs in a library must not keep the process alive."""

    def __init__(self, name: str, begin: Callable[[], Tracker]) -> None:
        self.name, self.has_failed = name, False
        self.tracker: Tracker | None = None
        self._items: SimpleQueue[Point | End] = SimpleQueue()
        self._has_started, self._has_ended, self._lock = Event(), Event(), Lock()
        Thread(target=self._work, args=(begin,), name=f"tracker-{name}", daemon=True).start()

    def put(self, item: Point | End) -> None:
        """Returns at once."""
        if not self.has_failed:
            self._items.put(item)

    def wait_for_start(self, seconds: float) -> None:
        """Until the tracker is there, or has failed."""
        if not self._has_started.wait(seconds):
            self._give_up(f"no answer within {seconds:.0f} s")

    def wait_for_end(self, seconds: float) -> None:
        """Until everything is written, or the tracker has failed."""
        if self.has_failed or self._has_ended.wait(min(seconds, 3)):
            return
        console.info(f"waiting for {self.name}, {seconds:.0f} s at most")
        if not self._has_ended.wait(seconds - 3):
            self._give_up(f"not done within {seconds:.0f} s")

    def _work(self, begin: Callable[[], Tracker]) -> None:
        try:
            self.tracker = begin()
            self._has_started.set()
            while not self.has_failed and not self._take(self.tracker):
                pass
        except BaseException as error:  # a library may even call sys.exit
            self._give_up(reason(error))
        self._has_started.set()
        self._has_ended.set()

    def _take(self, tracker: Tracker) -> bool:
        """Hand over what has come, all numbers at once; True after the end."""
        points: list[Point] = []
        item: Point | End | None = self._items.get()
        while isinstance(item, Point):
            points.append(item)
            try:
                item = self._items.get_nowait()
            except Empty:
                item = None
        if points:
            tracker.log(points)
        if item is not None:
            tracker.end(item)
        return item is not None

    def _give_up(self, why: str) -> None:
        with self._lock:
            is_first, self.has_failed = not self.has_failed, True
        if is_first:
            console.warn(f"{self.name}: {why}; the run goes on without it")


class Trackers:
    """All trackers of a run. As a context manager it ends them as the block ends: complete with the adapter, or how not."""

    def __init__(self, run: RunFolder, workers: Sequence[Worker], known: Mapping[str, dict[str, str]]) -> None:
        self._run, self._workers = run, workers
        started = {worker.name: worker.tracker.known for worker in workers if worker.tracker is not None}
        self.known = {**known, **started}
        """What each tracker calls this run, to be kept in run.json and given to `open_trackers` by the next session."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """The numbers among the values; returns at once."""
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for worker in self._workers:
            worker.put(Point(step, numbers, time.time()))

    def end(self, status: str) -> None:
        """Hand over the status and, of a complete run, the adapter; wait for that, but not for ever."""
        is_complete = status == COMPLETE
        adapter = self._run.adapter if is_complete and self._run.adapter.is_dir() else None
        until = time.monotonic() + (END_SECONDS if is_complete else STOP_SECONDS)
        with no_stdout():
            for worker in self._workers:
                worker.put(End(status, adapter))
            for worker in self._workers:
                worker.wait_for_end(max(0.0, until - time.monotonic()))

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.end(status_of(error))


def check_trackers(names: str | None) -> None:
    """Unknown names are exit 2; a missing library, or wandb without a key, exit 6. Made before anything else starts."""
    for name in split_names(names):
        missing = [library for library in LIBRARIES[name] if importlib.util.find_spec(library) is None]
        if missing:
            what = f"--tracker {name} needs {', '.join(missing)}"
            raise UserError(what, ExitCode.ENVIRONMENT, hint=f"pip install 'ftkit[{name}]'")
        if name == "wandb":
            check_wandb()


def check_wandb() -> None:
    """Without a key wandb would ask for one on the terminal."""
    set_environment()
    hint = "wandb login, or WANDB_MODE=offline"
    try:
        with no_stdout():
            import wandb

            is_ready = wandb.setup().settings.mode != "online" or wandb.login(prompt=False, verify=False)
    except Exception as error:
        raise UserError(f"--tracker wandb: {reason(error)}", ExitCode.ENVIRONMENT, hint=hint) from None
    if not is_ready:
        raise UserError("--tracker wandb: there is no API key", ExitCode.ENVIRONMENT, hint=hint)


def open_trackers(
    names: str | None,
    run: RunFolder,
    facts: Mapping[str, Any],
    *,
    known: Mapping[str, dict[str, str]] | None = None,
    done_steps: int = 0,
) -> Trackers:
    """Start the trackers of a comma list (None: none) and hand them the facts as parameters (`data.rows` for nested ones).

    known: `Trackers.known` of the session before; those trackers continue the same run. done_steps: of the checkpoint
    that it resumes. Does not raise, but for unknown names.
    """
    known = known or {}
    chosen = split_names(names)
    set_environment()
    parameters = flatten(facts)
    with no_stdout():
        until = time.monotonic() + OPEN_SECONDS
        workers = [begin(name, Session(run, parameters, known.get(name, {}), done_steps)) for name in chosen]
        for worker in workers:
            worker.wait_for_start(max(0.0, until - time.monotonic()))
    for worker in workers:
        if worker.tracker is not None:
            console.info(without_userinfo(worker.tracker.where))
    return Trackers(run, workers, known)


def begin(name: str, session: Session) -> Worker:
    """The tracker's thread, started."""
    return Worker(name, lambda: KINDS[name](session))


def split_names(names: str | None) -> list[str]:
    """The trackers of a comma list, each once."""
    chosen = list(dict.fromkeys(name.strip() for name in (names or "").split(",") if name.strip()))
    for name in chosen:
        if name not in KINDS:
            hint = f"{did_you_mean(name, list(KINDS))}known: {', '.join(KINDS)}"
            raise UserError(f"--tracker: no tracker '{name}'", ExitCode.USAGE, hint=hint)
    return chosen


def set_environment() -> None:
    """Settle what the libraries read when they are imported, and keep their logs to errors."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic", "urllib3", "wandb", "tensorboard"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextmanager
def no_stdout() -> Iterator[None]:
    """Nothing that a library prints, nor a process that it starts, reaches stdout: that is for our data."""
    kept = os.dup(1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def flatten(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested facts as one level, `{"data": {"rows": 3}}` as `{"data.rows": 3}`; what is None is left out."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in facts.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float):
            flat[prefix + key] = value
        elif value is not None:
            flat[prefix + key] = without_userinfo(value if isinstance(value, str) else json.dumps(value))
    return flat


def without_userinfo(text: str) -> str:
    """`https://user:password@host` as `https://host`."""
    return USERINFO.sub("", text)


def reason(error: BaseException) -> str:
    """The start of an error in one line, after its type."""
    text = " ".join(without_userinfo(str(error)).split())
    return f"{type(error).__name__}: {text[:200]}".removesuffix(": ")


def status_of(error: BaseException | None) -> str:
    """The word for how a block ended: complete, stopped, interrupted or failed."""
    code = error.exit_code if isinstance(error, UserError) else None
    if isinstance(error, KeyboardInterrupt) or code == ExitCode.INTERRUPTED:
        return "interrupted"
    if code == ExitCode.STOPPED:
        return "stopped"
    return "failed" if error else COMPLETE
