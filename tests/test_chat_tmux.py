"""Every command of `ftkit chat` typed in tmux, and what the screen then shows."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from test_chat_adapters import adapters  # noqa: F401

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")


class Tmux:
    """A terminal of its own server in tmux: types keys, reads the screen."""

    def __init__(self, socket, *arguments, cwd, columns=100, **environment):
        self.socket = str(socket)
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
        if text:
            self.run("send-keys", "-t", "chat", "-l", text)
        for key in keys or ("Enter",):
            self.run("send-keys", "-t", "chat", key)

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
    program.wait_for(r"max-new 6, temperature 0.5, seed 42")

    program.type("/ada", "Tab")  # completion of a command, then of an adapter
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
    program.type("", "C-d")
    assert "Traceback" not in program.wait_for("ended with 0")
    assert "+second line" in history.read_text() and history.stat().st_mode & 0o077 == 0


@pytest.fixture(scope="module")
def markdown_model(tiny_model, tmp_path_factory):
    """A model that says the same Markdown to whatever it is asked: the next token depends on the last one only."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    from ftkit.core.encoding import Encoder
    from ftkit.io.template_files import load_template

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("models") / "markdown")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    asked = Encoder(tokenizer, load_template("chatml")).chat_ids([{"role": "user", "content": "Hello."}])
    ids = [asked[-1], *tokenizer("- w").input_ids]
    assert len(set(ids)) == len(ids), "each token has one successor"
    weights = load_file(folder / "model.safetensors")
    width = weights["lm_head.weight"].shape[1]
    torch.manual_seed(0)
    marks = torch.nn.functional.normalize(torch.randn(512, width), dim=1) * width**0.5
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = torch.zeros_like(tensor)  # nothing is added to the embedding of the last token
    weights["model.embed_tokens.weight"], weights["model.norm.weight"] = marks, torch.ones(width)
    head = torch.zeros(512, width)
    for last, following in zip(ids, [*ids[1:], 0], strict=True):
        head[following] += marks[last]
    weights["lm_head.weight"] = head
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_markdown_is_drawn_at_the_end_and_left_alone_on_a_dumb_terminal(tmux, markdown_model):
    options = ("chat", markdown_model, "--template", "chatml", "--max-new", 20)
    program = tmux(*options, columns=70)
    program.wait_for("/help lists the commands")
    program.type("Hello.")
    shown = program.wait_for(STATUS)
    assert "- w" not in shown and re.search(r"(?m)^ • w *$", shown)
    program.type("", "C-d")
    program.wait_for("ended with 0")

    plain = tmux(*options, TERM="dumb", NO_COLOR="1")
    plain.wait_for("/help lists the commands")
    plain.type("Hello.")
    assert re.search("(?m)^- w *$", plain.wait_for(STATUS)) and "\x1b" not in plain.screen("-e")
    plain.type("", "C-d")
    plain.wait_for("ended with 0")
