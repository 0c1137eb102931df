"""When train asks for kernels of a CUDA card, and what it says of them: the card and the libraries are stand-ins."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from ftkit.commands import train
from ftkit.core.liger_kernels import LigerUse
from ftkit.errors import ExitCode, UserError


@dataclass(frozen=True)
class Known:
    """What these steps read of a prepared run."""

    device: str
    examples: tuple = ()
    liger: Any = None
    plan: Any = field(default_factory=lambda: SimpleNamespace(pack=True))
    packing_fault: Any = None


@pytest.fixture
def installed(monkeypatch):
    """Liger's kernels are here; the list of calls that asked for them."""
    calls = []
    monkeypatch.setattr(train, "is_installed", lambda: True)
    monkeypatch.setattr(train, "use_liger", lambda *asked: calls.append(asked) or LigerUse(65, 32))
    return calls


def test_liger_is_for_a_card(installed):
    assert train.take_liger(Known("cpu"), None).liger is None and installed == []
    assert str(train.take_liger(Known("cuda"), None).liger) == "Liger kernels: 65 norms, 32 gated MLPs"


def test_liger_that_is_not_installed_is_not_missed(installed, monkeypatch, capsys):
    monkeypatch.setattr(train, "is_installed", lambda: False)
    assert train.take_liger(Known("cuda"), None).liger is None and capsys.readouterr().err == ""


def test_liger_that_gives_other_numbers_is_said(installed, monkeypatch, capsys):
    monkeypatch.setattr(
        train, "use_liger", lambda *_: LigerUse(fault="the model's logits differ with them (by 3.0e-01)")
    )
    assert str(train.take_liger(Known("cuda"), None).liger) == "no Liger kernels"
    assert "installed and not used: the model's logits differ" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("has_kernel", "checks"), [(True, 1), (False, 0)])
def test_a_run_that_goes_on_asks_its_card_again_how_to_attend_to_packs(has_kernel, checks, monkeypatch):
    """The packs themselves are settled; the card may be another."""
    calls = []
    monkeypatch.setattr(train, "is_used_on", lambda device: has_kernel)
    monkeypatch.setattr(train, "packing_fault", lambda *asked: calls.append(asked))
    prepared, start = Known("cuda"), SimpleNamespace(values={"pack": True})
    assert train.settle_packing(prepared, None, start) is prepared
    assert len(calls) == checks
    monkeypatch.setattr(train, "packing_fault", lambda *_: "it leaks")
    if has_kernel:
        with pytest.raises(UserError, match="on this card it leaks") as refused:
            train.settle_packing(prepared, None, start)
        assert refused.value.exit_code == ExitCode.ENVIRONMENT
