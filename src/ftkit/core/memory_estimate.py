"""What an estimate of a run's memory says, whichever way it was found. Loads no library."""

from dataclasses import dataclass
from enum import StrEnum


class Part(StrEnum):
    """What a byte is for; the parts of an estimate add up to the allocated bytes at the peak."""

    FROZEN = "frozen weights"
    QUANTISATION = "quantisation constants"
    TRAINED = "trained weights"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    ACTIVATIONS = "activations"
    LOGITS = "logits and loss"
    TEMPORARIES = "temporaries"
    WORKSPACE = "cuBLAS workspace"


class Phase(StrEnum):
    """When something happens."""

    LOAD = "load"
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"
    EVALUATION = "evaluation"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device, as torch.cuda.max_memory_allocated() and max_memory_reserved() would give them.

    parts: allocated bytes at the peak instant, with the allocator's rounding; they add up to allocated_bytes.
    phases: the highest allocated bytes of each phase. peak_module: where in the model the peak is, as a
    dotted name, or empty. loaded_bytes: allocated once model and adapter are on the device.
    retries: how often the cache had to be given back to stay within the card's capacity. ignores_packs: the model takes
    no packs, so the rows are padded. expected_error: of
    allocated_bytes, as a share, where they come from a formula; None for a simulation.
    """

    trained_parameters: int
    total_parameters: int
    loaded_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    parts: dict[Part, int]
    phases: dict[Phase, int]
    peak_phase: Phase
    peak_module: str
    peak_operator: str
    retries: int = 0
    ignores_packs: bool = False
    expected_error: float | None = None
