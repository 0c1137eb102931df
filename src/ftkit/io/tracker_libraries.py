"""MLflow, TensorBoard and Weights & Biases behind the same three calls: begin, log, end."""

import logging
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ftkit.io.run_folder import COMPLETE, RunFolder

END_SECONDS = 120
"""How long a complete run waits for a tracker to take the rest and the adapter."""
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
waiting. wandb's "meta" holds the command line and the address of the git remote, with the user and token in it (0.31)."""
MLFLOW_STATUS = {COMPLETE: "FINISHED", "stopped": "KILLED"}
MOST_PARAMETERS, MOST_METRICS = 100, 1000
"""What MLflow takes in one call."""


def set_environment() -> None:
    """Settle what the libraries read when they are imported, and silence their logs: what stops them they also raise."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic", "urllib3", "wandb", "tensorboard"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


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

    needs: tuple[str, ...] = ("mlflow", "sqlalchemy", "alembic")

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

    needs: tuple[str, ...] = ("tensorboard",)

    def __init__(self, session: Session) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = session.run.path / "tensorboard"
        self._writer: Any = SummaryWriter(str(folder), purge_step=session.done_steps + 1, flush_secs=10)
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

    needs: tuple[str, ...] = ("wandb",)

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


KINDS: dict[str, type[Mlflow] | type[Tensorboard] | type[Wandb]] = {
    "mlflow": Mlflow,
    "tensorboard": Tensorboard,
    "wandb": Wandb,
}
