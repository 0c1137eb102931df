"""Every command of `ftkit chat` typed in tmux, and what the screen then shows."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from test_chat import markdown_model  # noqa: F401
from test_chat_adapters import adapters  # noqa: F401

from ftkit.commands.chat_commands import COMMANDS

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")


class Tmux:
    """A terminal of its own server in tmux: types keys, reads the screen."""

    def __init__(self, socket, *arguments, cwd, columns=100, **environment):
        self.socket = str(socket)
        self.commands = set()
        told = {"XDG_STATE_HOME": str(cwd / "state"), "OMP_NUM_THREADS": "1", **environment}
        exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in told.items())
        command = shlex.join([sys.executable, "-m", "ftkit", *map(str, arguments)])
        shell = f"cd {shlex.quote(str(cwd))}; export {exports}; {command}; echo ended with $?; exec cat"
        self.run("-f", "/dev/null", "new-session", "-d", "-x", str(columns), "-y", "50", "-s", "chat", shell)
        self.run("set-option", "-g", "history-limit", "5000")

    def run(self, *arguments):
        environment = {name: value for name, value in os.environ.items() if name != "TMUX"}
        done = subprocess.run(
            ["tmux", "-S", self.socket, *arguments], capture_output=True, text=True, env=environment, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def type(self, text, *keys):
        """A text as it stands, then named keys; Enter where none are named."""
        self.commands |= {text[1:].partition(" ")[0]} if text.startswith("/") else set()
        if text:
            self.run("send-keys", "-t", "chat", "-l", text)
        for key in keys or ("Enter",):
            self.run("send-keys", "-t", "chat", key)

    def paste(self, text):
        """What a person has copied elsewhere; a terminal marks its begin and end where the program asks for it."""
        self.run("set-buffer", text)
        self.run("paste-buffer", "-p", "-r", "-t", "chat")

    def screen(self, *options):
        """All lines so far, those that scrolled away too."""
        return self.run("capture-pane", "-p", "-J", "-S", "-", "-t", "chat", *options)

    def wait_for(self, pattern, count=1, seconds=60):
        """The screen, once it shows the pattern `count` times."""
        end = time.monotonic() + seconds
        while len(re.findall(pattern, shown := self.screen())) < count:
            assert time.monotonic() < end, f"{pattern!r} is not {count} times in:\n{shown}"
            time.sleep(0.05)
        return shown


@pytest.fixture
def tmux(tmp_path):
    """Start programs in tmux; its server is ended by its own socket."""
    opened = []

    def start(*arguments, **options):
        opened.append(Tmux(tmp_path / f"socket-{len(opened)}", *arguments, cwd=tmp_path, **options))
        return opened[-1]

    yield start
    for program in opened:
        program.run("kill-server")


STATUS = r"\[\d+ tokens?, [^]]*first after [^]]*\]"


def test_every_command_in_one_session(tmux, adapters, tmp_path):  # noqa: F811
    history = tmp_path / "state" / "ftkit" / "chat_history"
    history.parent.mkdir(parents=True)
    history.write_bytes(b"\x00\xff torn")
    program = tmux("chat", adapters["fable"], adapters["poem"], "--template", "chatml", "--max-new", "6")
    start = program.wait_for("/help lists the commands")
    assert (
        re.search(r"fable is \S+fable on ", start)
        and "fable answers; /adapter and /compare know fable, poem, base" in start
    )
    assert re.search(r"was damaged: moved to \S+chat_history.damaged-1", program.wait_for("(?m)^>"))
    assert (history.parent / "chat_history.damaged-1").read_bytes() == b"\x00\xff torn"

    program.type("/help")
    for name in ("help", "reset", "system", "retry", "undo", "adapter", "compare", "vote", "save", "set", "quit"):
        program.wait_for(rf"(?m)^  /{name} ")
    program.type("Name a colour.")
    program.wait_for(STATUS)
    program.type("/retry")
    program.wait_for(STATUS, 2)
    program.type("/undo")
    program.wait_for(r"taken back: Name a colour\.")
    program.type("/system be brief")
    program.wait_for("system message: be brief")
    program.type("/set temperature 0.5")
    program.wait_for(r"max-new 6, temperature 0.5, top-k 0, top-p 1, seed 42")

    program.type("/adap", "Tab")  # completion of a command, then of an adapter
    program.wait_for(r"> /adapter")
    program.type(" po", "Tab", "Enter")
    program.wait_for("(?m)^poem answers *$")
    program.type("/compare Name a tree.")
    shown = program.wait_for("none of this is in the conversation")
    assert re.search(r"fable +poem +base", shown)
    program.type("/vote Name a tree.")
    shown = program.wait_for(r"which is best\? a, b, c")
    assert re.search(r"(?m)^ *a +b +c *$", shown)
    program.type("a")
    program.wait_for(r"votes so far: (fable|poem|base) ")
    assert (tmp_path / "votes.jsonl").read_text().count("chosen_by") == 2

    program.type("first line", "M-Enter")
    program.type("second line")
    program.wait_for(STATUS, 3)
    program.type("/save")
    program.wait_for(r"1 row added to chat.jsonl")
    assert "first line\\nsecond line" in (tmp_path / "chat.jsonl").read_text()
    program.run("resize-window", "-t", "chat", "-x", "60", "-y", "20")
    program.type("Still there?")
    program.wait_for(STATUS, 4)
    program.type("", "Up")  # the history
    program.wait_for(r"> Still there\?", 2)
    program.type("", "C-c")
    program.type("/reset")
    program.wait_for("begun again, the system message stays")
    program.type("/hlep")
    program.wait_for("did you mean 'help'")
    program.paste("a pasted text\nof two lines")
    program.wait_for(r"(?m)^ *of two lines *$")
    program.type("")
    program.wait_for(STATUS, 5)
    program.type("/undo")
    program.wait_for("taken back: a pasted text of two lines")
    program.type("/adapter base")
    program.wait_for("(?m)^base answers")
    program.type("/quit")
    assert "Traceback" not in program.wait_for("ended with 0")
    assert set(COMMANDS) <= program.commands, "every command is typed here"
    assert "+second line" in history.read_text() and history.stat().st_mode & 0o077 == 0


def test_markdown_is_drawn_at_the_end(tmux, markdown_model):  # noqa: F811
    options = ("chat", markdown_model, "--template", "chatml", "--max-new", 20)
    program = tmux(*options, columns=70)
    program.wait_for("/help lists the commands")
    program.type("Hello.")
    shown = program.wait_for(STATUS)
    assert "- w" not in shown and re.search(r"(?m)^ • w *$", shown)
    program.type("", "C-d")
    program.wait_for("ended with 0")
