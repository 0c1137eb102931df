"""What each of several cards holds, against the worked examples of the ZeRO paper."""

import pytest

from ftkit.core.memory_estimate import Part
from ftkit.core.several_gpus import Sharing

PAPER = {
    ("7.5B", 1): (120, 120, 120),
    ("7.5B", 4): (52.5, 41.3, 30),
    ("7.5B", 16): (35.6, 21.6, 7.5),
    ("7.5B", 64): (31.4, 16.6, 1.88),
    ("7.5B", 256): (30.4, 15.4, 0.47),
    ("7.5B", 1024): (30.1, 15.1, 0.12),
    ("128B", 4): (896, 704, 512),
    ("128B", 16): (608, 368, 128),
    ("128B", 64): (536, 284, 32),
}
"""arXiv:1910.02054, table 1: GB of model states on a card for stages 1, 2, 3, by model and number of cards (figure 1 is
7.5B on 64). Mixed-precision Adam: 2 bytes of weights, 2 of gradients, 12 of states."""
PARAMETERS = {"7.5B": 7.5, "128B": 128.0}


@pytest.mark.parametrize(("model", "cards"), PAPER)
def test_the_states_are_shared_as_in_the_papers_table(model, cards):
    size = PARAMETERS[model]
    parts = {Part.TRAINED: 2 * size, Part.GRADIENTS: 2 * size, Part.OPTIMIZER: 12 * size, Part.FROZEN: 0.0,
             Part.QUANTISATION: 0.0, Part.TEMPORARIES: 0.0}  # fmt: skip
    for way, published in zip(("zero1", "zero2", "zero3"), PAPER[model, cards], strict=True):
        held = sum(Sharing(cards, way).shared(parts, block=0, outer=0).values())
        digits = 2 if published < 5 and cards > 1 else 1 if published < 60 else 0
        assert held == pytest.approx(published, abs=0.51 * 10**-digits)


def test_every_card_has_its_own_activations_and_ddp_its_buckets():
    parts = dict.fromkeys(Part, 8.0)
    for way in ("ddp", "zero1", "zero2", "zero3", "fsdp"):
        held = Sharing(4, way).shared(parts, block=3, outer=1)
        assert held[Part.ACTIVATIONS] == held[Part.LOGITS] == 8
        assert held[Part.TEMPORARIES] == (8 + 2 * 3 + 1 if way in ("zero3", "fsdp") else 8)
    assert Sharing(4, "ddp").shared(parts, 0, 0)[Part.GRADIENTS] == 16
