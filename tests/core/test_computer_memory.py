"""The computer's own memory: what loading really takes, and what is said of it."""

import gc
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ftkit.core.caching_allocator import MIB
from ftkit.core.computer_memory import LIBRARIES_BYTES, computer_memory, optimizer_bytes, pinned
from ftkit.core.optimizer_memory import optimizer_memory
from ftkit.core.real_steps import status_bytes
from ftkit.io.base_model import find_base, load_weights

ALL_IN_POOL = ("adamw", "adamw-8bit", "lion", "lion-8bit", "sgd")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of 48 MiB in bfloat16."""
    folder = tmp_path_factory.mktemp("weights")
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "vocab_size": 12000}
    LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def private_growth(folder: Path, dtype: torch.dtype) -> tuple[int, int]:
    """(how much private memory the process has more with a loaded model, bytes of its weights)."""
    gc.collect()
    before = status_bytes("RssAnon") or 0
    model = load_weights(find_base(str(folder), None), dtype=dtype, device="cpu")
    weights = sum(each.numel() * each.element_size() for each in model.parameters())
    return (status_bytes("RssAnon") or 0) - before, weights


@pytest.mark.skipif(status_bytes("RssAnon") is None, reason="the system does not tell private memory")
def test_weights_in_the_format_of_their_files_are_views_and_others_are_copies(folder):
    private_growth(folder, torch.bfloat16)  # what a first load brings in besides
    own, _ = private_growth(folder, torch.bfloat16)
    cast, weights = private_growth(folder, torch.float32)
    assert own < 8 * MIB < weights
    assert 0.9 * weights < cast < 1.2 * weights


def need(**changes):
    given = {"weights": 1000, "largest": 100, "is_cast": False, "is_quantised": False, "kept": 0, "states": 20,
             "trained": 10, "is_paged": False}  # fmt: skip
    return computer_memory(**(given | changes)).needed - LIBRARIES_BYTES


def test_loading_or_saving_whichever_is_more():
    assert need() == need(is_cast=True, is_quantised=True) == 100
    assert need(is_cast=True) == 1100
    assert need(states=200) == 210 and need(states=200, is_paged=True) == 410
    assert need(kept=5000) == 5030


@pytest.mark.parametrize("kind", ALL_IN_POOL)
def test_states_are_as_large_as_the_simulation_has_them(kind):
    parameter = torch.zeros(64, 4096)
    states = optimizer_memory(kind, [parameter]).state_bytes
    assert optimizer_bytes(kind, parameter.numel(), 4) == pytest.approx(states, rel=0.02)


def test_pinned_memory_is_a_power_of_two():
    assert [pinned(size) for size in (1, 2, 3, 4096, 4097)] == [1, 2, 4, 4096, 8192]
