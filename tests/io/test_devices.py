"""Where to compute, and in which format."""

from pathlib import Path

import pytest
import torch

from ftkit.errors import ExitCode, UserError
from ftkit.io.devices import NARROW, cpu_computes_bf16, dtype_name, pick_device, pick_dtype

ABSENT = [
    name
    for name, is_here in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
    if not is_here
]


@pytest.mark.parametrize("name", ABSENT)
def test_a_device_that_is_not_here_is_refused_never_replaced(name):
    with pytest.raises(UserError, match=f"--device {name}: none is here") as caught:
        pick_device(name)
    assert caught.value.exit_code == ExitCode.ENVIRONMENT and "cpu" in caught.value.hint


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch):
    present = {"cuda": True, "mps": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: present["mps"])
    assert pick_device("auto") == "cuda"
    present["cuda"] = False
    assert pick_device("auto") == "mps"
    present["mps"] = False
    assert pick_device("auto") == pick_device("cpu") == "cpu"


@pytest.mark.parametrize(
    ("device", "gpu_has_bf16", "expected"),
    [("cuda", True, torch.bfloat16), ("cuda", False, torch.float16), ("mps", False, torch.bfloat16)],
)
def test_a_frozen_base_is_bf16_where_the_gpu_computes_in_it(device, gpu_has_bf16, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: gpu_has_bf16)
    assert pick_dtype("auto", device, trains_weights=False, width=4096) == expected


def test_a_frozen_base_on_the_cpu_is_bf16_where_the_cpu_computes_in_it():
    assert pick_dtype("auto", "cpu", trains_weights=False, width=4096) == (
        torch.bfloat16 if cpu_computes_bf16() else torch.float32
    )


def test_a_narrow_base_on_the_cpu_is_float32_and_on_a_gpu_like_others(monkeypatch):
    monkeypatch.setattr("ftkit.io.devices.cpu_computes_bf16", lambda: True)
    assert pick_dtype("auto", "cpu", trains_weights=False, width=NARROW) == torch.float32
    assert pick_dtype("auto", "cpu", trains_weights=False, width=NARROW + 1) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert pick_dtype("auto", "cuda", trains_weights=False, width=NARROW) == torch.bfloat16


def test_the_cpu_is_asked_what_it_can():
    info = Path("/proc/cpuinfo")
    if not info.exists():
        pytest.skip("no /proc/cpuinfo here")
    flags = set(info.read_text().split())
    assert cpu_computes_bf16() == bool(flags & {"avx512_bf16", "amx_bf16", "amx_tile"})


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_weights_that_are_trained_are_float32(device):
    assert pick_dtype("auto", device, trains_weights=True, width=4096) == torch.float32


def test_a_format_that_is_asked_for_is_taken():
    assert pick_dtype("fp16", "cpu", trains_weights=False, width=4096) == torch.float16
    assert pick_dtype("fp32", "cpu", trains_weights=False, width=4096) == torch.float32
    assert pick_dtype("bf16", "cpu", trains_weights=True, width=4096) == torch.bfloat16


def test_float16_weights_cannot_be_trained():
    with pytest.raises(UserError, match="fp16") as caught:
        pick_dtype("fp16", "cpu", trains_weights=True, width=4096)
    assert caught.value.exit_code == ExitCode.USAGE


def test_bf16_on_a_gpu_without_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    with pytest.raises(UserError, match="bf16") as caught:
        pick_dtype("bf16", "cuda", trains_weights=False, width=4096)
    assert caught.value.exit_code == ExitCode.ENVIRONMENT


def test_names_of_formats():
    assert [dtype_name(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)] == ["bf16", "fp16", "fp32"]
