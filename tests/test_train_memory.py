"""What train says of a run's memory before it loads anything. The card is put in: there is none here."""

import contextlib
import json
from dataclasses import replace

import pytest
from train_shell import QUICK, run_train, write_rows

from ftkit.commands import train_memory
from ftkit.commands.train_memory import compare, foretell
from ftkit.commands.train_plan import prepare
from ftkit.core.gpus import Gpu
from ftkit.core.train_settings import TrainSettings
from ftkit.errors import ExitCode, UserError

MIB = 2**20
ROOMY = {"max_length": 512, "micro_tokens": "16384", "batch": 64}
"""Options with which a run takes a few hundred MiB."""


@pytest.fixture
def on_card(tiny_model, tmp_path, monkeypatch):
    """A prepared run, as it would be on a card with so many MiB free."""

    def make(mib, **options):
        monkeypatch.setattr(train_memory, "present_gpu", lambda: Gpu("a card", int(mib * MIB), (8, 0), context_bytes=0))
        with contextlib.chdir(tmp_path):
            settings = TrainSettings(data=write_rows(tmp_path / "train.jsonl"), model=str(tiny_model), **options)
            return replace(prepare(settings), device="cuda")

    return make


def test_a_run_that_fits_says_what_it_takes(on_card, capsys):
    _, estimate = foretell(on_card(4000))
    assert 0 < estimate.allocated_bytes <= estimate.reserved_bytes < 4000 * MIB
    assert "foretold for a card" in capsys.readouterr().err


def test_a_run_that_does_not_fit_is_exit_5_before_anything_is_loaded(on_card):
    with pytest.raises(UserError, match=r"needs 0\.\d\d GiB of a card, which has 0\.01 GiB free") as caught:
        foretell(on_card(10))
    assert caught.value.exit_code == ExitCode.MEMORY and "--force" in caught.value.hint


def test_a_run_that_is_tight_is_warned_of_and_goes_on(on_card, capsys):
    """Without the margin, or with a cache that is given back: then the tensors fit, and the card is too small for the cache."""
    _, roomy = foretell(on_card(40000, gradient_checkpointing="off", **ROOMY))
    reserved, allocated = roomy.reserved_bytes / MIB, roomy.allocated_bytes / MIB
    capsys.readouterr()
    for mib, words in ((reserved + 1, "1 MiB are left, 300 should be"), (reserved - 1, "gives back its cache")):
        foretell(on_card(mib, gradient_checkpointing="off", **ROOMY))
        assert f"tight: the run {'needs' if mib > reserved else 'would take'}" in (said := capsys.readouterr().err)
        assert words in said
    with pytest.raises(UserError, match="needs"):
        foretell(on_card(allocated - 1, gradient_checkpointing="off", **ROOMY))


def test_checkpointing_goes_on_by_itself_where_the_run_fits_only_with_it(on_card, capsys):
    needs = {way: foretell(on_card(40000, gradient_checkpointing=way, **ROOMY))[1] for way in ("on", "off")}
    with_it, without = (needs[way].reserved_bytes / MIB for way in ("on", "off"))
    assert with_it < without
    between = (with_it + without) / 2 + Gpu("a card", 0, (8, 0), context_bytes=0).margin_bytes / MIB
    capsys.readouterr()
    prepared, estimate = foretell(on_card(between, **ROOMY))
    assert prepared.settings.gradient_checkpointing == "on"
    assert estimate.reserved_bytes == needs["on"].reserved_bytes
    assert "gradient checkpointing is on: without it" in capsys.readouterr().err
    prepared, _ = foretell(on_card(40000, **ROOMY))
    assert prepared.settings.gradient_checkpointing == "auto"
    capsys.readouterr()
    prepared, _ = foretell(on_card(between, gradient_checkpointing="off", **ROOMY))
    assert prepared.settings.gradient_checkpointing == "off" and "the memory is tight" in capsys.readouterr().err


def test_force_tries_it_all_the_same(on_card):
    assert foretell(on_card(10, force=True))[1].reserved_bytes > 0


def test_on_a_processor_only_a_dry_run_takes_the_time(tiny_model, tmp_path):
    write_rows(tmp_path / "train.jsonl")
    dry = run_train("train.jsonl", "--model", tiny_model, *QUICK, "--dry-run", "--json", cwd=tmp_path)
    assert json.loads(dry.stdout)["predicted_peak_bytes"] > 100_000 and "foretold for this processor" in dry.stderr
    assert "foretold" not in run_train("train.jsonl", "--model", tiny_model, *QUICK, cwd=tmp_path).stderr


@pytest.mark.parametrize(("share", "is_said"), [(1.0, False), (1.02, False), (1.05, True), (0.9, True)])
def test_a_peak_that_is_not_the_foretold_one_is_said(share, is_said, on_card, capsys):
    prepared = on_card(4000)
    _, estimate = foretell(prepared)
    capsys.readouterr()
    compare(prepared, estimate, {"measured_peak_bytes": share * estimate.allocated_bytes})
    assert ("were foretold" in capsys.readouterr().err) == is_said
