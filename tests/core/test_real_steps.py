"""Real steps on a card: its counters are put in, there is none here."""

import torch

from ftkit.core.real_steps import measured_on_cuda


def test_outside_of_the_pool_is_all_else_that_the_card_has_in_use(monkeypatch):
    """The context is there before the steps, so what they take from the driver does not hold it."""
    counters = {
        "mem_get_info": (600, 1000),
        "memory_reserved": 250,
        "max_memory_reserved": 300,
        "max_memory_allocated": 200,
    }
    for name, value in (counters | dict.fromkeys(("empty_cache", "reset_peak_memory_stats", "synchronize"))).items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    found = measured_on_cuda(lambda: None)
    assert (found.allocated_bytes, found.reserved_bytes, found.outside_bytes) == (200, 300, 400 - 250)
