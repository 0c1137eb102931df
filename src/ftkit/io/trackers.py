"""Experiment trackers: what train measures, also in MLflow, TensorBoard or Weights & Biases.

A tracker never stops a run, and the run never waits for one while it trains: each works in a thread of its own, and the
first thing that goes wrong there is one warning and its last call. The run's metrics.jsonl holds everything regardless.
"""

import importlib.util
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

from ftkit import console
from ftkit.errors import ExitCode, UserError, did_you_mean
from ftkit.io.run_folder import COMPLETE, RunFolder
from ftkit.io.tracker_libraries import END_SECONDS, KINDS, End, Point, Session, Tracker, set_environment

OPEN_SECONDS = 60
"""How long train waits for a tracker before the first step."""
STOP_SECONDS = 10
"""How long a run that was stopped waits for one to take the rest: whoever stops it does not wait long."""
GATHER_SECONDS = 1.0
"""A call takes as long for many numbers as for one; what is lost of them in a sudden death is at most this."""
USERINFO = re.compile(r"(?<=://)[^/@\s]+@")


class Worker:
    """A tracker in a thread of its own. A daemon: what hangs in a library must not keep the process alive."""

    def __init__(self, name: str, begin: Callable[[], Tracker]) -> None:
        self.name, self.has_failed = name, False
        self.tracker: Tracker | None = None
        self._items: SimpleQueue[Point | End] = SimpleQueue()
        self._has_started, self._has_ended, self._lock = Event(), Event(), Lock()
        try:
            Thread(target=self._work, args=(begin,), name=f"tracker-{name}", daemon=True).start()
        except RuntimeError as error:  # no thread is left
            self._give_up(reason(error))

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
        self._has_ended.set()

    def _take(self, tracker: Tracker) -> bool:
        """Hand over the numbers of a second at once, or what comes before the end; True after the end."""
        points: list[Point] = []
        item: Point | End | None = self._items.get()
        until = time.monotonic() + GATHER_SECONDS
        while isinstance(item, Point):
            points.append(item)
            try:
                item = self._items.get(timeout=max(0.0, until - time.monotonic()))
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
        self._has_started.set()
        self._has_ended.set()


class Trackers:
    """All trackers of a run."""

    def __init__(self, run: RunFolder, workers: Sequence[Worker], known: Mapping[str, dict[str, str]]) -> None:
        self._run, self._workers = run, workers
        started = {worker.name: worker.tracker.known for worker in workers if worker.tracker is not None}
        self.known = {**known, **started}
        """What each tracker calls this run, to be kept in run.json and given to `open_trackers` by the next session."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """The numbers among the values, but for `step` itself; returns at once."""
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
        }
        for worker in self._workers:
            worker.put(Point(step, numbers, time.time()))

    def end(self, status: str) -> None:
        """Hand over the run's status and, of a complete run, the adapter; wait for that, but not for ever."""
        is_complete = status == COMPLETE
        adapter = self._run.adapter if is_complete and self._run.adapter.is_dir() else None
        until = time.monotonic() + (END_SECONDS if is_complete else STOP_SECONDS)
        with no_stdout():
            for worker in self._workers:
                worker.put(End(status, adapter))
            for worker in self._workers:
                worker.wait_for_end(max(0.0, until - time.monotonic()))


def check_trackers(names: str | None) -> None:
    """Unknown names are exit 2; a missing library, or wandb without a key, exit 6. Made before anything else starts."""
    for name in split_names(names):
        missing = [library for library in KINDS[name].needs if importlib.util.find_spec(library) is None]
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
