"""Requests to stop: what each signal becomes, when it waits, who answers."""

import os
import signal
import subprocess
import sys
import threading
import time

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
    with pytest.raises(UserError), stop_requests() as stop:
        with stop.held():
            send(signal.SIGTERM)
            assert stop.is_due() and stop.reason == "SIGTERM"
            with pytest.raises(Stopped):
                stop.check()
        stop.check()
        pytest.fail("it went on")


def test_a_second_ctrl_c_does_not_wait_and_the_first_reason_stays():
    with pytest.raises(KeyboardInterrupt), stop_requests() as stop, stop.held():
        send(signal.SIGTERM)
        send(signal.SIGUSR1)
        assert stop.reason == "SIGTERM"
        send(signal.SIGINT)


def test_the_time_limit_counts_from_the_start_of_the_process(monkeypatch):
    monkeypatch.setattr(stopping, "STARTED", time.monotonic() - 100)
    with stop_requests(160.0) as stop:
        assert not stop.is_due() and not stop.is_due(seconds_ahead=59.0)
        assert stop.is_due(seconds_ahead=61.0) and stop.reason == "--time-limit"
    with pytest.raises(UserError, match="stopped by --time-limit") as caught, stop_requests(90.0) as stop:
        stop.check()
    assert caught.value.exit_code == ExitCode.STOPPED


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


@pytest.mark.parametrize("seconds", [0.6, 2.0])
def test_a_scheduler_gets_75_while_libraries_load_too(seconds, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "one two"}\n' * 9)
    command = [sys.executable, "-m", "ftkit", "train", "train.jsonl", "--steps", "100000"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.terminate()
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (75, ""), err
    assert "stopped by SIGTERM" in err and "Traceback" not in err
