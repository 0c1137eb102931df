"""ftkit chat: piped as a shell sees it, and at a terminal through a pseudo-terminal."""

import fcntl
import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import redirect_stdout, suppress

import pytest
from conftest import assert_refused

from ftkit import console
from ftkit.commands import chat_editing, chat_terminal
from ftkit.core.chat_settings import ChatSettings
from ftkit.errors import ExitCode, UserError
from ftkit.io.card import Card, write_card
from ftkit.io.template_files import load_template


class Piped(io.TextIOWrapper):
    """A stdin that is no terminal."""

    def __init__(self, data):
        super().__init__(io.BytesIO(data if isinstance(data, bytes) else data.encode()))


@pytest.fixture
def chat(monkeypatch, capfdbinary):
    """Run the command in this process; returns (stdout, stderr)."""
    from ftkit.commands import chat as command

    def run(model, stdin="", **settings):
        monkeypatch.setattr("sys.stdin", Piped(stdin))
        asked = ChatSettings(runs=[] if model is None else [str(model)], **{"max_new": 6, **settings})
        try:
            command.run(asked)
        finally:
            sys.stdout.flush()
            run.stdout, run.stderr = (text.decode() for text in capfdbinary.readouterr())
        return run.stdout, run.stderr

    return run


@pytest.fixture(scope="session")
def alpaca_model(tiny_model, tmp_path_factory):
    """A model folder that says it was trained with the alpaca template, on prompts of a pattern."""
    folder = tmp_path_factory.mktemp("models") / "tuned"
    shutil.copytree(tiny_model, folder)
    alpaca = load_template("alpaca")
    card = Card(
        base="builtin:tiny", base_location=str(tiny_model), base_revision=None, base_config_sha256="0" * 64,
        method="full", objective="sft", dtype="fp32", max_length=512,
        template_text=alpaca.text, template_fingerprint=alpaca.fingerprint,
        pattern="Write the description. product: {product}", example="Write the description. product: Lamp",
        stop_tokens=[0],
    )  # fmt: skip
    write_card(folder, card)
    return folder


@pytest.fixture(scope="session")
def endless_model(tiny_model, tmp_path_factory):
    """The tiny model with a context that no answer fills, and a stop token that is never the likeliest."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("models") / "endless"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 1_000_000
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0] = weights["lm_head.weight"][1] / 2  # half the logit of token 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def direct_answers(folder, prompts, *, max_new, template=None):
    """What batched generation says to these texts, without the command."""
    from ftkit.core.encoding import Encoder
    from ftkit.core.generation import generate_batch
    from ftkit.io.trained import load_trained, open_trained

    loaded = load_trained(open_trained(str(folder)), "cpu")
    encoder = Encoder(loaded.tokenizer, load_template(template) if template else None)
    ids = [encoder.prompt_ids(encoder.template.prompt_for(text) if template else text) for text in prompts]
    return generate_batch(
        loaded.model, loaded.tokenizer, ids, stop_ids=encoder.stop_ids, max_new=max_new, context=loaded.context
    )


# piped


def test_piped_answers_are_those_of_batched_generation_in_order(chat, tiny_model):
    prompts = ["Once upon a time", "### Response:", "a b c", "instruction"]
    out, err = chat(tiny_model, "\n".join(prompts), max_new=9, json=True)
    rows = [json.loads(line) for line in out.splitlines()]
    answers = direct_answers(tiny_model, prompts, max_new=9)
    assert [row["prompt"] for row in rows] == prompts
    assert [(row["answer"], row["finish"], row["tokens"]) for row in rows] == [
        (a.text, a.finish, len(a.ids)) for a in answers
    ]
    assert "no template, it continues your text" in err


def test_a_typed_line_is_rendered_by_the_template_that_training_stored(chat, alpaca_model):
    [answer] = direct_answers(alpaca_model, ["Name a colour."], max_new=6, template="alpaca")
    out, err = chat(alpaca_model, "Name a colour.\n")
    assert out == answer.text.strip() + "\n"
    assert load_template("alpaca").fingerprint in err


def test_each_line_is_a_conversation_of_its_own(chat, tiny_model):
    out, _ = chat(tiny_model, "Hello.\nWhat?\nHello.\n", template="chatml", json=True)
    first, _, again = [json.loads(line) for line in out.splitlines()]
    assert first == again


def test_text_and_rows_mix_and_blank_lines_are_passed_over(chat, tiny_model):
    row = json.dumps({"prompt": "Name a colour.", "completion": "Blue."})
    out, _ = chat(tiny_model, f"\ufeffName a colour.\r\n\n  \n{row}\n", json=True)
    typed, read = [json.loads(line) for line in out.splitlines()]
    assert typed == read


def test_a_row_that_prep_rendered_is_fed_as_it_is(chat, alpaca_model):
    template = load_template("alpaca")
    row = {"prompt": template.prompt_for("Name a colour."), "completion": "Blue.", "template": template.fingerprint}
    out, _ = chat(alpaca_model, "Name a colour.\n" + json.dumps(row), json=True)
    typed, rendered = [json.loads(line) for line in out.splitlines()]
    assert typed["answer"] == rendered["answer"] and rendered["prompt"] == row["prompt"]


def test_a_row_of_another_template_is_refused_at_its_line(chat, alpaca_model):
    row = json.dumps({"prompt": "User: hi", "completion": "x", "template": "mine@0123456789ab"})
    with pytest.raises(UserError, match=r"<stdin>:2: the row was made with template mine@0123456789ab") as caught:
        chat(alpaca_model, "hello\n" + row)
    assert caught.value.exit_code == ExitCode.DATA


def test_messages_are_answered_up_to_the_last_question(chat, tiny_model):
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
    asked, trained = json.dumps({"messages": turns[:1]}), json.dumps({"messages": turns})
    out, _ = chat(tiny_model, f"Hello.\n{asked}\n{trained}\n", template="chatml", json=True)
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 3 and rows[0] == rows[1] == rows[2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "x",}', r"<stdin>:2:\d+: not JSON"),
        (b'{"prompt": "x"', r"<stdin>:2: ends inside a JSON value"),
        (b'{"prompt": 3}', r"<stdin>:2: 'prompt' is a number, should be text"),
        (b'{"prompt": " "}', r"<stdin>:2: 'prompt' is empty"),
        (b'{"question": "x"}', r"<stdin>:2: no question in this row \(it has question\)"),
        (b'{"messages": []}', r"<stdin>:2: 'messages' should be a list"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', r"<stdin>:2: turn 1 has the unknown role 'robot'"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', r"<stdin>:2: the user asks nothing"),
        (b'{"messages": [{"role": "user", "content": "x"}]}\n', None),
        (b'{"prompt": "x", "template": 1}', r"<stdin>:2: 'template' is a number"),
        (b"caf\xe9", r"<stdin>:2: not UTF-8 at byte 3"),
        (b"a\x00b", r"<stdin>:2: holds a NUL byte"),
    ],
)
def test_a_line_that_cannot_be_asked_is_told_at_its_place(line, message):
    from ftkit.io.questions import read_questions

    lines = io.BytesIO(b"fine\n" + line)
    if message is None:
        assert len(list(read_questions(lines, "<stdin>"))) == 2
        return
    with pytest.raises(UserError, match=message) as caught:
        list(read_questions(lines, "<stdin>"))
    assert caught.value.exit_code == ExitCode.DATA


def test_a_template_other_than_the_stored_one_is_said_and_used(chat, alpaca_model, tiny_model):
    out, err = chat(alpaca_model, "Hello.", template="chatml")
    chatml, alpaca = load_template("chatml").fingerprint, load_template("alpaca").fingerprint
    assert f"was trained with template {alpaca}, --template is {chatml}" in err
    assert chat(tiny_model, "Hello.", template="chatml")[0] == out
    assert "was trained with" not in chat(alpaca_model, "Hello.", template="alpaca")[1]


def test_the_pattern_of_the_training_prompts_is_shown_with_an_example(chat, alpaca_model):
    _, err = chat(alpaca_model, "Hello.")
    [line] = [line for line in err.splitlines() if "{product}" in line]
    assert "Write the description. product: {product}" in line and "product: Lamp" in line


def test_a_system_message_needs_a_template_that_takes_it(chat, alpaca_model, tiny_model):
    with pytest.raises(UserError, match="--system: a system message for template alpaca") as caught:
        chat(alpaca_model, "Hello.", system="be brief")
    assert caught.value.exit_code == ExitCode.USAGE
    with_system, _ = chat(tiny_model, "Hello.", template="chatml", system="be brief", max_new=12)
    row = {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Hello."}]}
    assert with_system == chat(tiny_model, json.dumps(row), template="chatml", max_new=12)[0]
    assert with_system != chat(tiny_model, "Hello.", template="chatml", max_new=12)[0]


def test_answers_cut_by_length_are_counted(chat, tiny_model):
    _, err = chat(tiny_model, "Once upon a time\na b c\n", max_new=1)
    assert "2 of 2 answers ended by length (--max-new 1)" in err


def test_escapes_of_the_model_reach_a_file_but_not_a_terminal():
    class Screen(io.StringIO):
        def isatty(self):
            return True

    said = "\x1b[31mred\u202e\x07\n"
    assert console.safe(said, Screen()) == "[31mred\n"
    assert console.safe(said, io.StringIO()) == said


def test_nothing_on_stdin_is_a_data_error_before_anything_loads(chat, tmp_path):
    with pytest.raises(UserError, match="<stdin>: 0 prompts") as caught:
        chat(tmp_path / "no such model", "\n\n")
    assert caught.value.exit_code == ExitCode.DATA


def test_a_prompt_on_the_command_line_is_answered_and_stdin_left_alone(chat, tiny_model):
    out, _ = chat(tiny_model, "{not read", prompt="Once upon a time", json=True)
    row = json.loads(out)
    assert set(row) == {"schema", "prompt", "answer", "adapter", "finish", "tokens"}
    assert row["prompt"] == "Once upon a time" and row["adapter"] is None
    with pytest.raises(UserError, match="-p is empty"):
        chat(tiny_model, prompt=" ")


def test_without_a_run_the_base_is_opened_and_said(chat, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FTKIT_MODEL", str(tiny_model))
    out, err = chat(None, "hello\n")
    assert f"no run here yet, so this is the untuned base {tiny_model}" in err
    assert out == chat(tiny_model, "hello\n")[0]


def test_without_a_run_and_a_model_the_builtin_base_answers(run_here):
    from ftkit.io.base_model import BUILTIN, find_base

    if not (find_base(BUILTIN).folder / "model.safetensors").is_file():
        pytest.skip("builtin:tiny is not built in this checkout")
    result = run_here("chat", "--max-new", 3, stdin="hello\n")
    assert result.exit_code == 0 and result.stdout.strip()
    assert "untuned base builtin:tiny" in result.stderr


def test_a_bad_line_ends_the_stream_after_the_answers_before_it(chat, tiny_model):
    with pytest.raises(UserError, match=r"<stdin>:2:\d+: not JSON") as caught:
        chat(tiny_model, 'hello\n{"prompt": "x",}\n', json=True)
    assert caught.value.exit_code == ExitCode.DATA and '{"prompt": "{..."}' in caught.value.hint
    assert json.loads(chat.stdout)["prompt"] == "hello"


def test_a_terminal_without_a_place_for_answers_is_a_usage_error_and_does_not_hang(monkeypatch, tiny_model):
    from ftkit.commands import chat as command

    class Keyboard(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Keyboard())
    monkeypatch.setattr("sys.stdout", io.StringIO())
    for settings in (ChatSettings(), ChatSettings(json=True)):
        with pytest.raises(UserError, match="-p or lines on stdin") as caught:
            command.run(settings)
        assert caught.value.exit_code == ExitCode.USAGE


def shell(script, tmp_path):
    """Exit status, stdout and stderr of a bash script, in which `chat` is the command."""
    script = f'chat() {{ {shlex.quote(sys.executable)} -m ftkit chat "$@"; }}; set -o pipefail; {script}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    return done.returncode, done.stdout, done.stderr


def test_a_closed_pipe_ends_it_quietly(tiny_model, tmp_path):
    code, out, err = shell(f"yes hello | head -500 | chat {tiny_model} --max-new 2 --json -q | head -1", tmp_path)
    assert code == ExitCode.CLOSED_PIPE
    assert json.loads(out)["prompt"] == "hello"
    assert "error" not in err and "Traceback" not in err


def test_a_full_disk_is_exit_74(tiny_model, capfd):
    from ftkit.cli import main

    arguments = ["chat", str(tiny_model), "--max-new", "2", "-p", "hello"]
    with open("/dev/full", "w") as full, redirect_stdout(full), pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == ExitCode.IO
    err = capfd.readouterr().err
    assert "No space left on device" in err and "Traceback" not in err


def test_a_closed_stdin_has_no_prompts(run_here, tiny_model, monkeypatch):
    assert_refused(run_here("chat", tiny_model, stdin=None), ExitCode.DATA, "<stdin>: 0 prompts")


def test_rows_of_prep_go_through_chat_into_jq(alpaca_model, tmp_path):
    """What a reader of JSON lines gets; Python reads them where jq is not installed."""
    (tmp_path / "rows.csv").write_text("instruction,output\nName a colour.,Blue.\nName a tree.,An oak.\n")
    python = (
        f"{shlex.quote(sys.executable)} -c 'import json, sys; [print(json.loads(x)[\"answer\"]) for x in sys.stdin]'"
    )
    reader = "jq -r .answer" if shutil.which("jq") else python
    prep = f"{shlex.quote(sys.executable)} -m ftkit prep rows.csv --template alpaca -q"
    code, out, err = shell(f"{prep} | chat {alpaca_model} --max-new 5 --json -q | {reader}", tmp_path)
    assert code == 0, err
    answers = direct_answers(alpaca_model, ["Name a colour.", "Name a tree."], max_new=5, template="alpaca")
    assert out == "".join(answer.text.strip() + "\n" for answer in answers)


# at a terminal


class Terminal:
    """The program on a pseudo-terminal: types keys, reads what is shown."""

    def __init__(self, *arguments, cwd, **environment):
        self.shown = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            os.execve(
                sys.executable,
                [sys.executable, "-m", "ftkit", *map(str, arguments)],
                {**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )
        self.resize(24, 80)

    def read_until(self, pattern, seconds=180):
        """What is shown up to and with the pattern; later output stays for the next call."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < end, f"{pattern!r} did not appear in {self.shown!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                self._take(os.read(self.fd, 65536))
        text, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return text

    def _take(self, data):
        if b"\x1b[6n" in data:  # the program asks where the cursor is
            os.write(self.fd, b"\x1b[1;1R")
        self.shown += data.decode(errors="replace")

    def type(self, keys):
        os.write(self.fd, keys.encode())

    def resize(self, rows, columns):
        """As a window that is dragged: the kernel sends SIGWINCH."""
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def is_as_shells_want_it(self):
        """True if it shows what is typed and waits for whole lines."""
        flags = termios.tcgetattr(self.fd)[3]
        return bool(flags & termios.ECHO and flags & termios.ICANON)

    def exit_code(self, seconds=90):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if select.select([self.fd], [], [], 0.05)[0]:
                with suppress(OSError):  # Linux: the other side is closed
                    self._take(os.read(self.fd, 65536))
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
        raise AssertionError(f"still running; it shows {self.shown!r}")


@pytest.fixture
def open_terminal(tmp_path):
    """Start programs on terminals of their own; those that a failed test leaves are ended."""
    opened = []

    def start(*arguments, **environment):
        environment = {"TERM": "xterm", "XDG_STATE_HOME": str(tmp_path / "state"), **environment}
        opened.append(Terminal(*arguments, cwd=tmp_path, **environment))
        return opened[-1]

    yield start
    for program in opened:
        try:
            os.kill(program.pid, 9)
            os.waitpid(program.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(program.fd)


def test_at_a_terminal_a_person_asks_gets_help_resizes_it_stops_an_answer_and_is_ended(
    open_terminal, endless_model, tmp_path
):
    program = open_terminal("chat", endless_model, "--max-new", 5, "--template", "alpaca", TERM="xterm-256color")
    program.read_until("/help lists the commands")
    program.read_until(">")
    program.type("Name a colour.\r")
    speed = r"\d+ tokens/s, first after [\d.]+ m?s, context \d+ of 1,000,000"
    answer = program.read_until(rf"\[5 tokens, {speed}, ended by length \(/set max-new 10\)\]")
    [expected] = direct_answers(endless_model, ["Name a colour."], max_new=5, template="alpaca")
    words = [word for word in expected.text.split() if word.isascii() and word.isprintable()]
    assert all(word in answer for word in words)

    program.type("/help\r")
    program.read_until(r"/retry .*answer the last question again")
    program.type("/hlep\r")
    program.read_until(r"did you mean 'help'")

    program.type("/set max-new 1000000\r")
    program.read_until("max-new 1000000, temperature 0")
    program.type("Tell me everything.\r")
    program.read_until(r"everything\.(?s:.*?)2004l[^\x1b]{2,}")  # line editing is off, the answer has begun
    program.resize(10, 40)
    program.read_until(r"[^\x1b]{200,}")  # the answer goes on
    program.type("\x03")
    program.read_until("stopped by you")

    program.type("half a line\x03")  # Ctrl-C at the prompt leaves the line only
    program.type("/undo\r")
    program.read_until(r"taken back: Tell me everything\.(?s:.*?)2004h")  # line editing is on again
    os.kill(program.pid, signal.SIGTERM)
    assert program.exit_code() == ExitCode.STOPPED and program.is_as_shells_want_it()
    assert "stopped by SIGTERM" in program.shown and "Traceback" not in program.shown

    history = tmp_path / "state" / "ftkit" / "chat_history"
    assert "+Name a colour." in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


@pytest.fixture(scope="session")
def markdown_model(tiny_model, tmp_path_factory):
    """A model that says the same Markdown to whatever it is asked: the next token depends on the last one only."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    from ftkit.core.encoding import Encoder

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


def test_a_dumb_terminal_of_a_c_locale_with_no_place_for_a_history_is_talked_to_in_plain_lines(
    open_terminal, markdown_model, tmp_path
):
    (tmp_path / "state").write_text("in the way")
    c_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    program = open_terminal("chat", markdown_model, "--template", "chatml", TERM="dumb", NO_COLOR="1", **c_locale)
    shown = program.read_until("> ")
    program.type("Grüße – ☃\n")
    shown += program.read_until(r"\[\d tokens?, ")
    assert re.search(r"(?m)^- w\r?$", shown), "Markdown is left alone"
    program.type("/save\n")
    shown += program.read_until("1 row added")
    program.type("\x04")
    assert program.exit_code() == 0
    assert "\x1b" not in shown + program.shown
    assert json.loads((tmp_path / "chat.jsonl").read_text())["messages"][0]["content"] == "Grüße – ☃"


@pytest.mark.parametrize(
    ("name", "is_dumb"),
    [("xterm-256color", False), ("vt100", False), ("linux", False), ("screen", False), ("tmux-256color", False),
     ("dumb", True), ("unknown", True), ("", True), (None, True)],
)  # fmt: skip
def test_a_terminal_is_dumb_where_nothing_is_known_of_it(monkeypatch, name, is_dumb):
    monkeypatch.delenv("TERM", raising=False)
    if name is not None:
        monkeypatch.setenv("TERM", name)
    assert console.is_dumb() is is_dumb


def test_bytes_of_another_locale_are_read_as_the_utf_8_that_they_are_or_refused():
    assert chat_editing.whole_text("plain – ☃", "x") == "plain – ☃"
    assert chat_editing.whole_text("Grüße".encode().decode("ascii", "surrogateescape"), "x") == "Grüße"
    with pytest.raises(UserError, match="this line is not UTF-8") as caught:
        chat_editing.whole_text("caf\udce9", "this line")
    assert caught.value.exit_code == ExitCode.DATA and caught.value.hint


def test_a_question_or_a_system_message_that_is_no_text_is_refused(run_here, tmp_path):
    assert_refused(run_here("chat", tmp_path, "-p", "caf\udce9"), ExitCode.DATA, "-p is not UTF-8")
    result = run_here("chat", tmp_path, "-p", "x", "--system", "caf\udce9")
    assert_refused(result, ExitCode.DATA, "--system is not UTF-8")


# the terminal's commands, without a terminal


@pytest.fixture
def talk(tiny_model, capsys):
    """Type lines to a conversation of the tiny model; returns (what it holds then, stdout, stderr)."""
    from ftkit.commands.chat_session import Session
    from ftkit.core.conversation import Conversation, Speaker
    from ftkit.core.encoding import Encoder
    from ftkit.core.generation import Sampling
    from ftkit.io.trained import load_trained, open_trained

    loaded = load_trained(open_trained(str(tiny_model)), "cpu")
    encoder = Encoder(loaded.tokenizer, load_template("chatml"))
    capsys.readouterr()

    def type_lines(*lines, context=None):
        speaker = Speaker(loaded.model, encoder, encoder.stop_ids, encoder.template.stop, context)
        session = Session(conversation := Conversation(speaker, Sampling(4)), [speaker])
        waiting = iter(lines)

        def read_line():
            line = next(waiting, EOFError)
            if isinstance(line, type):
                raise line
            return line

        chat_terminal.converse(session, read_line)
        return conversation, *capsys.readouterr()

    type_lines.model = loaded.model
    return type_lines


def questions(conversation):
    return [turn["content"] for turn in conversation.turns if turn["role"] == "user"]


def test_undo_retry_and_reset_change_what_the_conversation_holds(talk):
    assert questions(talk("one", "two", "/undo")[0]) == ["one"]
    once = talk("one", "two")[0]
    again, _, err = talk("one", "two", "/retry")
    assert again.turns == once.turns and "the answer will be the same" in err
    assert questions(talk("one", "/reset", "two")[0]) == ["two"]


def test_a_mistake_costs_a_line_and_not_the_conversation(talk):
    conversation, _, err = talk(
        "/undo", "/retry", "/nothing", "/set", "/set max-new 0", "/set temperature hot", "/set x 1", "", "one"
    )
    assert questions(conversation) == ["one"]
    for message in (
        "nothing to take back", "nothing has been answered yet", "no command /nothing", "max-new 0 is out of range",
        "temperature hot is out of range", "no setting 'x'", "max-new 4, temperature 0",
    ):  # fmt: skip
        assert message in err


def test_a_text_may_begin_with_a_slash_and_quit_leaves(talk):
    assert questions(talk("//etc is a folder", "/quit", "never read")[0]) == ["/etc is a folder"]


def test_ctrl_c_at_the_prompt_goes_on_and_ctrl_d_leaves(talk):
    assert questions(talk("one", KeyboardInterrupt, "two", EOFError, "three")[0]) == ["one", "two"]


def test_the_system_message_is_set_shown_and_removed(talk):
    conversation, _, err = talk("/system be brief", "/system", "/system none")
    assert err.count("system message: be brief") == 2 and "system message: none" in err
    assert conversation.system is None


def test_turns_that_no_longer_fit_are_told(talk):
    _, _, err = talk("one two three four", "five six seven eight", "nine ten", context=80)
    assert re.search(r"the oldest (turn is|\d turns are) left out: the context of 80 tokens is full", err)


def test_running_out_of_memory_costs_the_answer_and_not_the_conversation(talk):
    import torch

    passes = []

    def run_out(*_):
        passes.append(1)
        if len(passes) in (6, 7):  # the second token of the second answer, then the first of the third
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = talk.model.model.layers[1].register_forward_pre_hook(run_out)
    try:
        conversation, _, err = talk("one", "two", "three", "two")
    finally:
        hook.remove()
    assert questions(conversation) == ["one", "two"]
    assert conversation.turns == talk("one", "two")[0].turns
    assert err.count("ftkit: error: out of memory: this answer was given up\n  hint: ask again") == 2


def test_a_line_that_is_no_text_costs_a_line(talk):
    conversation, _, err = talk("caf\udce9", "one")
    assert questions(conversation) == ["one"] and "this line is not UTF-8" in err


def test_the_history_is_in_the_state_folder():
    assert str(chat_editing.history_path({"XDG_STATE_HOME": "/s", "HOME": "/h"})) == "/s/ftkit/chat_history"
    assert (
        str(chat_editing.history_path({"XDG_STATE_HOME": "relative", "HOME": "/h"}))
        == "/h/.local/state/ftkit/chat_history"
    )
    assert str(chat_editing.history_path({"HOME": "/h"})) == "/h/.local/state/ftkit/chat_history"


def test_the_first_ctrl_c_asks_the_answer_to_stop_and_a_second_one_interrupts():
    from ftkit.commands.chat_answer import ctrl_c_calls

    calls = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), ctrl_c_calls(lambda: calls.append("stop")) as pressed:
        signal.raise_signal(signal.SIGINT)
        assert calls == ["stop"] and len(pressed) == 1
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
