"""The computer's own memory and disk that a run on a CUDA card takes. No library is loaded.

How weights are loaded (transformers 5.23, `core_model_loading.py`): files are mapped, and each tensor is a view of its file
until something is done to it. Measured on a CPU with a 0.94 GiB model in three files: in the files' own format loading took
2 MiB of private memory, in another one (bf16 to fp16, to fp32) all of the model in the new format, to the MiB. Only then it
goes to the card. A base that is quantised while it is loaded goes there tensor by tensor. Pages of mapped files are the
system's to take back, so they are not counted.
"""

from dataclasses import dataclass

from ftkit.core.caching_allocator import GIB

LIBRARIES_BYTES = 5 * GIB // 2
"""Of the process itself. 0.4 GiB were measured for all libraries without CUDA's; 2 GiB more for those are an assumption."""
STATE_ITEMS = {
    "adamw": (2, None),
    "adamw-8bit": (2, 1),
    "paged-adamw": (2, 4),
    "paged-adamw-8bit": (2, 1),
    "adafactor": (0, None),
    "lion": (1, 4),
    "lion-8bit": (1, 1),
    "paged-lion-8bit": (1, 1),
    "sgd": (1, None),
}
"""Optimizer -> means of each trained element (Adafactor: of rows and columns, nothing in comparison), and the bytes of one;
None: those of the element itself."""


@dataclass(frozen=True)
class ComputerMemory:
    """Bytes of the computer's memory. process: libraries and rows, assumed. loading: at its highest while weights are loaded.

    waiting: what training keeps outside of the card: offloaded activations, paged optimizer states if the card is full.
    saving: copies of trained weights and of the optimizer's states while a checkpoint is written.
    """

    process: int
    loading: int
    waiting: int
    saving: int

    @property
    def needed(self) -> int:
        """The most at once: loading comes first, then training and its checkpoints."""
        return self.process + max(self.loading, self.waiting + self.saving)


def computer_memory(
    *,
    weights: int,
    largest: int,
    is_cast: bool,
    is_quantised: bool,
    kept: int,
    states: int,
    trained: int,
    is_paged: bool,
) -> ComputerMemory:
    """weights: bytes of the base in the run's format; largest: of its largest tensor. is_cast: its files have another format.

    kept: bytes of offloaded activations. states, trained: bytes of the optimizer's states and of trained weights.
    """
    loading = weights + largest if is_cast and not is_quantised else largest
    return ComputerMemory(LIBRARIES_BYTES, loading, kept + (states if is_paged else 0), trained + states)


def optimizer_bytes(kind: str, trained: int, itemsize: int) -> int:
    """Bytes of an optimizer's states for so many trained elements, wherever they are; scales of 8-bit means left out."""
    means, own = STATE_ITEMS[kind]
    return trained * means * (own or itemsize)


def pinned(size: int) -> int:
    """What PyTorch pins for so many bytes: the next power of two."""
    return 1 << max(0, size - 1).bit_length()
