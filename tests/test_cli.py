"""The command line itself: help, layers of settings, every way to end, and that nothing heavy loads before it must."""

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields

import pytest
from conftest import assert_refused

import ftkit
from ftkit import cli, console
from ftkit.core.options import flag_of
from ftkit.errors import ExitCode, UserError

HEAVY = ["torch", "transformers", "peft", "datasets", "bitsandbytes", "rich", "jinja2", "numpy", "yaml", "tokenizers"]


def loaded_by(*arguments, then=""):
    """Which of the heavy libraries a process has loaded after running a command line."""
    code = (
        "import sys, io\nfrom ftkit.cli import main\nsys.stdout = io.StringIO()\n"
        f"try: main({list(arguments)!r})\nexcept SystemExit as ended: assert not ended.code, ended.code\n{then}"
        f"sys.__stdout__.write(' '.join(name for name in {HEAVY} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


# help


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command_lists_every_option_and_an_example(run_here, command):
    result = run_here(command, "--help", env={"COLUMNS": "120"})
    assert result.exit_code == 0 and result.stderr == ""
    kind, example = cli.settings_of(command), cli.COMMANDS[command][2]
    listed = set(re.findall(r"(?<![\w-])--[a-z0-9-]+", result.stdout))
    for field in fields(kind):
        argument = field.name in ("inputs", "data", "runs") or (command == "merge" and field.name == "run")
        assert argument or flag_of(field.name) in listed, field.name
    assert {"--config", "--print-config", "--quiet", "--verbose", "--debug", "--help"} <= listed
    assert example in " ".join(result.stdout.split())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_is_what_typer_itself_would_print(run_here, command, capsys):
    cli.typer_command(*cli.COMMANDS)(args=[command, "--help"], prog_name="ftkit", standalone_mode=False)
    assert (
        run_here(command, "--help").stdout == run_here(command, "--quiet", "--help").stdout == capsys.readouterr().out
    )


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_loads_no_heavy_library(command):
    assert loaded_by(command, "--help") == []


@pytest.mark.parametrize("command", [["train", "--help"], ["train", "--lr", "1e-4", "--print-config"]])
def test_options_are_read_without_the_library_that_would_convert_them(command):
    assert loaded_by(*command, then="assert 'pydantic' not in sys.modules\n") == []


@pytest.mark.parametrize(
    ("typed", "error"),
    [
        ("--seed x", "--seed = 'x' should be a whole number"),
        ("--min-chars 1.5", "--min-chars = '1.5' should be a whole number"),
        ("--near x", "--near = 'x' should be a number"),
        ("--dedupe fuzzy", "--dedupe = 'fuzzy' is not one of exact, near, none"),
        ("--seed", "Option '--seed' requires an argument."),
        ("--shuffle=1", "Option '--shuffle' does not take a value."),
        ("--shufle", "No such option: --shufle (Possible options: --sample, --shuffle)"),
    ],
)
def test_an_option_that_cannot_be_read_is_named(run_here, typed, error):
    result = run_here("prep", "x.csv", *typed.split())
    assert (result.exit_code, result.stdout) == (ExitCode.USAGE, "")
    assert result.stderr.startswith(f"ftkit: error: {error}\n  hint: "), result.stderr


def test_numbers_flags_lists_and_what_stands_behind_two_dashes_are_read(run_here):
    result = run_here(
        "prep", "a.csv", "--seed", "7", "--shuffle", "--map=a=b", "--map", "c=d", "--print-config", "--", "-b"
    )
    for line in ('inputs = ["a.csv", "-b"]', "seed = 7", "shuffle = true", 'map = ["a=b", "c=d"]'):
        assert f"{line}  # command line\n" in result.stdout


def test_neither_do_the_list_of_commands_the_version_and_the_settings():
    assert loaded_by("--help") == loaded_by("--version") == loaded_by("train", "--print-config") == []


def test_the_probe_for_heavy_libraries_sees_one_that_is_loaded():
    assert loaded_by("--version", then="import jinja2\n") == ["jinja2"]


def test_without_arguments_the_commands_are_listed(ftkit):
    result = ftkit()
    assert result.exit_code == 0 and result.stderr == ""
    assert all(f"\n  {command} " in result.stdout for command in cli.COMMANDS)


def test_the_version_is_the_packages(run_here):
    assert run_here("--version").stdout == f"ftkit {ftkit.__version__}\n"


def test_the_console_script_and_the_module_are_one_program(ftkit):
    script = subprocess.run([f"{sys.prefix}/bin/ftkit", "train", "--help"], capture_output=True, text=True, check=True)
    assert script.stdout == ftkit("train", "--help").stdout


# usage errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["trian", "Did you mean 'train'"]),
        (["train", "--modle", "x"], ["--modle", "--model"]),
        (["train", "--r", "many"], ["--r"]),
        (["train", "--r"], ["--r"]),
        (["train", "--schedule", "linaer"], ["'linaer'", "'linear'"]),
        (["train", "a.jsonl", "b.jsonl"], ["b.jsonl"]),
        (["train", "--r", "0"], ["--r 0 is out of range"]),
        (["train", "--lora", "--qlora"], ["--lora and --qlora contradict"]),
        (["--nosuch"], ["--nosuch"]),
        (["train", "--config", "nosuch.toml"], ["nosuch.toml: no such file"]),
    ],
)
def test_a_mistyped_command_line_is_one_line_and_what_to_type(run_here, arguments, words):
    assert_refused(run_here(*arguments), ExitCode.USAGE, *words)


# settings from four places


def printed(result):
    """The settings that --print-config shows, and where each is from."""
    assert result.exit_code == 0, result.stderr
    sources = dict(re.findall(r"^(\w+) = .*  # (.*)$", result.stdout, re.M))
    [table] = tomllib.loads(result.stdout).values()
    return table, sources


def test_flags_beat_the_environment_beats_config_beats_the_project_file_beats_defaults(run_here, tmp_path):
    (tmp_path / "ftkit.toml").write_text("[train]\nr = 1\nalpha = 1\nbatch = 1\nseed = 1\n")
    (tmp_path / "x.yaml").write_text("train:\n  r: 2\n  alpha: 2\n  batch: 2\n  lr: 2e-4\n")
    result = run_here(
        "train", "--r", "4", "--config", "x.yaml", "--print-config", env={"FTKIT_R": "3", "FTKIT_ALPHA": "3"}
    )
    table, sources = printed(result)
    names = ("r", "alpha", "batch", "lr", "seed", "epochs")
    assert [table[name] for name in names] == [4, 3.0, 2, 2e-4, 1, 3.0]
    places = ["command line", "environment", "x.yaml", "x.yaml", "ftkit.toml", "default"]
    assert [sources[name] for name in names] == places


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_printed_settings_are_toml_that_config_takes_again(run_here, tmp_path, command):
    first = run_here(command, "--print-config")
    (tmp_path / "again.toml").write_text(first.stdout)
    second = run_here(command, "--config", "again.toml", "--print-config")
    assert printed(second)[0] == printed(first)[0]
    assert set(printed(second)[1].values()) <= {"again.toml"}


def test_a_method_flag_beats_the_method_of_a_file(run_here, tmp_path):
    (tmp_path / "ftkit.toml").write_text("[train]\nqlora = true\n")
    table, _ = printed(run_here("train", "--full", "--print-config"))
    assert (table["full"], table["qlora"]) == (True, False)
    assert printed(run_here("train", "--print-config"))[0]["qlora"] is True


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.toml", "[train]\nlearning = 1\n", "x.toml:2: unknown setting 'learning'"),
        ("x.yaml", "train:\n  learning: 1\n", "x.yaml:2: unknown setting 'learning'"),
        ("x.toml", "[train]\n\nr = 'x'\n", "x.toml:3: r = 'x' should be a whole number"),
        ("x.yaml", "train:\n\n  r: [1]\n", "x.yaml:3: r = [1] should be a whole number"),
        ("x.toml", "[train]\nr = 8.5\n", "x.toml:2: r = 8.5 should be a whole number"),
        ("x.toml", "[train]\nschedule = 'x'\n", "x.toml:2: schedule = 'x' is not one of linear, cosine, constant"),
        ("x.toml", "[tain]\n", "x.toml:1: unknown table [tain]"),
    ],
)
def test_a_mistake_in_a_settings_file_has_file_and_line(run_here, tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    result = run_here("train", "--config", name)
    assert result.exit_code == ExitCode.USAGE and result.stdout == ""
    assert result.stderr.startswith(f"ftkit: error: {words}")


def test_a_mistake_in_the_environment_names_the_variable(run_here):
    result = run_here("train", env={"FTKIT_R": "eight"})
    assert result.exit_code == ExitCode.USAGE and "FTKIT_R: r = 'eight'" in result.stderr


# how much is said


def test_quiet_verbose_and_normal(run_here):
    for flags, level in (("-q", console.QUIET), ("--quiet", console.QUIET), ("-v", console.VERBOSE), (None, 1)):
        run_here("train", *([flags] if flags else []), "--print-config")
        assert console.level() == level


def test_quiet_leaves_warnings_and_errors(capsys):
    for level, expected in ((console.QUIET, 2), (console.NORMAL, 3), (console.VERBOSE, 4)):
        console.set_level(level)
        for say in (console.error, console.warn, console.info, console.detail):
            say("words")
        assert len(capsys.readouterr().err.splitlines()) == expected
    console.set_level(console.NORMAL)


def coloured(monkeypatch, **environment):
    """What a terminal would get from a marked line."""
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    console.marked([("context", False), ("answer", True)])
    return terminal.getvalue()


def test_no_color_means_no_colour(monkeypatch):
    assert "\x1b[1;32m" in coloured(monkeypatch)
    for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert not re.search(r"\x1b\[[\d;]*3\dm", coloured(monkeypatch, **environment))


# ways to end


def guarded(work, capsys, *, debug=False):
    status = cli.guard(work, debug=debug)
    return status, capsys.readouterr().err


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("a mistake", ExitCode.DATA, hint="mend it"), 3, "ftkit: error: a mistake\n  hint: mend it\n"),
        (OSError(28, "No space left on device", "x.jsonl"), 74, "ftkit: error: x.jsonl: No space left on device\n"),
        (PermissionError(13, "Permission denied", "runs"), 74, "ftkit: error: runs: Permission denied\n"),
        (MemoryError(), 5, "ftkit: error: out of memory\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), 5, "ftkit: error: out of memory\n"),
        (KeyboardInterrupt(), 130, "ftkit: error: interrupted\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_every_ending_has_its_status_and_words(capsys, error, status, words):
    assert (found := guarded(raising(error), capsys))[0] == status
    assert found[1].startswith(words) and (words or not found[1])


def test_memory_that_a_gpu_lacks_is_known_by_the_name_of_torchs_error(capsys):
    class OutOfMemoryError(RuntimeError):
        pass

    assert guarded(raising(OutOfMemoryError("CUDA out of memory.")), capsys)[0] == ExitCode.MEMORY


def test_an_error_of_ours_is_one_line_and_a_file_with_the_traceback(capsys):
    status, said = guarded(raising(ZeroDivisionError("division by zero")), capsys)
    assert status == ExitCode.BUG
    assert said.startswith("ftkit: error: internal error: ZeroDivisionError: division by zero\n")
    assert len(said.splitlines()) == 2 and "Traceback" not in said
    path = re.search(r"the traceback is in (\S+),", said)[1]
    with open(path) as file:
        assert "Traceback (most recent call last)" in (text := file.read()) and "in work" in text
    os.unlink(path)


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), UserError("x", ExitCode.DATA), OSError(5, "x")])
def test_debug_shows_the_traceback_and_keeps_the_status(capsys, error):
    status, said = guarded(raising(error), capsys, debug=True)
    assert said.startswith("Traceback (most recent call last)") and "ftkit: error: " in said
    assert status == guarded(raising(error), capsys)[0]


def test_output_that_cannot_be_written_is_74_and_quiet_at_exit(tmp_path):
    for arguments in (["--version"], ["train", "--help"], ["train", "--print-config"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "ftkit", *arguments], stdout=full, stderr=subprocess.PIPE, cwd=tmp_path
            )
        assert done.returncode == ExitCode.IO
        assert done.stderr.decode() == "ftkit: error: No space left on device\n"


def shell(line, folder):
    """Run a line of shell in which `ftkit` is this checkout's; (exit status, stdout, stderr)."""
    program = f'ftkit() {{ "{sys.executable}" -m ftkit "$@"; }}\n'
    done = subprocess.run(["bash", "-c", program + line], capture_output=True, text=True, cwd=folder)
    return done.returncode, done.stdout, done.stderr


def test_a_reader_that_goes_away_ends_help_quietly(tmp_path):
    assert shell("ftkit train --help | true; exit ${PIPESTATUS[0]}", tmp_path) == (ExitCode.CLOSED_PIPE, "", "")


def test_closed_streams_are_an_exit_status_and_no_crash(tmp_path):
    assert shell("ftkit --version >&-", tmp_path) == (
        74,
        "",
        "ftkit: error: stdout is closed\n  hint: ftkit writes its results there\n",
    )
    assert shell("ftkit --version 2>&-", tmp_path) == (0, f"ftkit {ftkit.__version__}\n", "")
    assert shell("ftkit nosuch 2>&-", tmp_path)[:2] == (2, "")


def test_bitsandbytes_is_loaded_without_the_compiler_which_stays_as_it_was():
    code = (
        "import sys, torch; before = torch.compile; from ftkit.libraries import import_bitsandbytes as load; load();"
        " print('bitsandbytes' in sys.modules, 'torch._inductor.compile_fx' in sys.modules, torch.compile is before)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout == "True False True\n", result.stderr
