"""What tests share: the program as a shell sees it, and small models built on the spot."""

import io
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
SHARED = CHECKOUT.parent / "shared"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@dataclass(frozen=True)
class Result:
    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture(autouse=True, scope="session")
def signals_as_in_a_shell():
    """What starts the tests in the background may ignore these; the program leaves them ignored, as nohup asks."""
    hear_signals()


def hear_signals():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def ftkit(tmp_path):
    """Run the program in a process of its own, in `tmp_path` unless told otherwise."""

    def run(*arguments, stdin="", cwd=tmp_path, env=None, timeout=240):
        done = subprocess.run(
            [sys.executable, "-m", "ftkit", *map(str, arguments)],
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            capture_output=True,
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            timeout=timeout,
        )
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture
def run_here(tmp_path, monkeypatch):
    """The same in this process, where libraries load once; stdin is a pipe with the text `stdin`, or an open file."""

    def run(*arguments, stdin="", cwd=tmp_path, env=None):
        from ftkit.cli import main

        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        with monkeypatch.context() as changed, redirect_stdout(out), redirect_stderr(err):
            changed.chdir(cwd)
            changed.setattr(
                "sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())) if isinstance(stdin, str) else stdin
            )
            for name, value in (env or {}).items():
                changed.setenv(name, value)
            with pytest.raises(SystemExit) as ended:
                main([*map(str, arguments)])
        written = [stream.buffer.getvalue().decode() for stream in (out, err) if not stream.flush()]
        return Result(int(ended.value.code), *written)

    return run


def assert_refused(result, exit_code, *words):
    """What every refusal is: the documented status, one line of error with these words, one hint, nothing else."""
    assert result.exit_code == exit_code, result
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line.startswith("ftkit: error: ") for line in lines].count(True) == 1, result.stderr
    assert lines[-2].startswith("ftkit: error: ") and lines[-1].startswith("  hint: ") and lines[-1].strip() != "hint:"
    assert "Traceback" not in result.stderr and "internal error" not in result.stderr
    for word in words:
        assert str(word) in result.stderr, (word, result.stderr)


@pytest.fixture
def prep(tmp_path, monkeypatch):
    """`ftkit prep ...` in this process, in `tmp_path`: as the `ftkit` fixture, without the time to start Python."""
    from prep_shell import run_prep

    return lambda *arguments, stdin="": run_prep(monkeypatch, tmp_path, arguments, stdin)


@pytest.fixture
def shared():
    """The folder with real models and data beside a checkout; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with a two-layer Llama of random weights (fp32, context 512) and a byte-level BPE tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_tokenizer(folder)
    save_tiny_weights(folder)
    return folder


def save_tiny_tokenizer(folder):
    """512 ids: the bytes, three special tokens (<|endoftext|> ends a text) and merges from a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 512, "special_tokens": SPECIALS, "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(**options)
    text = (CHECKOUT / "templates" / "alpaca.toml").read_text(encoding="utf-8")
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIALS[0], additional_special_tokens=SPECIALS[1:], model_max_length=512
    )
    fast.save_pretrained(folder)


def save_tiny_weights(folder):
    """Random weights, large enough that the likeliest token changes with the context."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
