"""Requests to stop: what each signal becomes, when it waits, who answers."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ftkit import stopping
from ftkit.errors import ExitCode, UserError
from ftkit.stopping import Stopped, stop_requests


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75)],
)
def test_a_signal_ends_the_work_at_once_with_its_status(number, status):
    with pytest.raises(UserError, match=f"stopped by {number.name}") as caught, stop_requests():
        send(number)
        pytest.fail("it went on")
    assert caught.value.exit_code == status


def test_while_it_is_held_a_signal_waits_to_be_asked_for():
    with stop_requests() as stop:
        stop.hold()
        assert not stop.is_due()
        send(signal.SIGTERM)
        assert stop.is_due() and stop.reason == "SIGTERM"
        with pytest.raises(Stopped):
            stop.check()


def test_a_second_ctrl_c_does_not_wait_and_the_first_reason_stays():
    with pytest.raises(KeyboardInterrupt), stop_requests() as stop:
        stop.hold()
        send(signal.SIGTERM)
        send(signal.SIGUSR1)
        send(signal.SIGINT)  # the first one
        assert (stop.reason, stop.exit_code) == ("SIGTERM", ExitCode.STOPPED)
        send(signal.SIGINT)


def test_the_time_limit_counts_from_the_start_of_the_process(monkeypatch):
    monkeypatch.setattr(stopping, "STARTED", time.monotonic() - 100)
    with stop_requests(160.0) as stop:
        stop.hold()
        assert not stop.is_due() and not stop.is_due(seconds_ahead=59.0)
        assert stop.is_due(seconds_ahead=61.0) and stop.reason == "--time-limit"


def test_a_time_limit_that_ends_before_any_step_is_a_mistake_and_no_reason_to_try_again(monkeypatch):
    """With status 75 a script would type the same command for ever."""
    monkeypatch.setattr(stopping, "STARTED", time.monotonic())
    began = time.monotonic()
    with pytest.raises(UserError, match="--time-limit is over before a single step") as caught, stop_requests(0.2):
        time.sleep(60)
    assert caught.value.exit_code == ExitCode.USAGE and time.monotonic() - began < 30


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as stop:  # as nohup starts it
            send(signal.SIGHUP)
            assert not stop.is_due()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_error_that_a_library_makes_of_a_stop_is_the_stop():
    with pytest.raises(UserError, match="stopped by SIGTERM") as caught, stop_requests():
        try:
            send(signal.SIGTERM)
        except BaseException as error:
            raise ImportError("initialization failed") from error
    assert caught.value.exit_code == ExitCode.STOPPED
    with pytest.raises(ImportError), stop_requests():
        raise ImportError("a real one")


def test_no_limit_and_no_signal_stop_nothing():
    with stop_requests() as stop:
        stop.check()
        assert not stop.is_due(seconds_ahead=1e9)


def test_the_handlers_that_were_there_are_put_back():
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    with stop_requests():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before


def test_another_thread_may_train_without_listening():
    heard = []

    def work():
        with stop_requests() as stop:
            heard.append(stop.is_due())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert heard == [False]


def test_a_stop_is_no_exception_that_a_library_might_swallow():
    assert not issubclass(Stopped, Exception)


def listens(process):
    """True once the process has a handler of its own for SIGTERM, as Linux tells."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (caught,) = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux tells who listens")
@pytest.mark.parametrize("seconds", [0, 1.5, 3])
def test_a_scheduler_gets_75_while_libraries_load_too(seconds, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "one two"}\n' * 9)
    command = [sys.executable, "-m", "ftkit", "train", "train.jsonl", "--steps", "100000"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not listens(process):
        time.sleep(0.001)
    time.sleep(seconds)
    process.terminate()
    out, err = process.communicate(timeout=240)
    assert (process.returncode, out) == (75, ""), err
    assert "stopped by SIGTERM" in err and "internal error" not in err
