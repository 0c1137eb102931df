"""Run training steps on the meta device and replay every allocation through the caching allocator's model.

No GPU and no weights are needed: tensors on the meta device have shapes and dtypes but no data. A
TorchDispatchMode sees each operator of forward, backward (with the recomputation of checkpointing) and each
new storage is a malloc, its end of life a free. What a CUDA device does differently is in
`ftkit.core.cuda_operators` and `ftkit.core.optimizer_memory`; the order of addresses, splits and holes in
`ftkit.core.caching_allocator`. There is no fitted constant.
"""

import gc
import logging
import warnings
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from ftkit.core.adapters import count_parameters, trainable_parameters
from ftkit.core.caching_allocator import Block, CachingAllocator
from ftkit.core.cuda_operators import SCRATCH, STAND_INS, CudaKernels, cuda_choices
from ftkit.core.memory_estimate import MemoryEstimate, Part, Phase
from ftkit.core.meta_kernels import run_on_meta
from ftkit.core.optimizer_memory import optimizer_memory


@dataclass(frozen=True)
class SimulatedDevice:
    """The card and the allocator's settings: the kernels it has, what the driver can give (None: no limit)."""

    kernels: CudaKernels = field(default_factory=CudaKernels)
    capacity_bytes: int | None = None
    expandable_segments: bool = False


def simulate(
    build: Callable[[], nn.Module],
    step: Callable[[nn.Module], Tensor | tuple[Tensor, Any]],
    optimizer_kind: str,
    *,
    device: SimulatedDevice = SimulatedDevice(),
    micro_steps: int = 1,
    is_padded: bool = False,
    load_dtype: torch.dtype | None = None,
    keeps_into_next: bool = False,
    evaluates: bool = False,
) -> MemoryEstimate:
    """The peak memory of loading a model and of two optimizer steps.

    build() gives the model, on meta, as training has it after the adapter was attached. step(model) runs one
    forward pass and gives the scalar loss, or the loss and whatever else the caller keeps until the optimizer
    step is over. micro_steps: forward and backward passes per optimizer step; more than one keep their
    gradients. is_padded: the answer to "does this batch hold padding", which decides for a mask.
    load_dtype: the dtype of the checkpoint, if the model is quantised or cast after loading. keeps_into_next: what the
    caller keeps ends only when the next forward pass has given its own. evaluates: after the steps, step(model) runs
    once more without gradients.

    Raises OutOfMemoryError where the device has a capacity and the run does not fit; NotImplementedError or
    RuntimeError from an operator that the meta device does not know.
    """
    look_past_libraries()
    with quiet():
        model = build()
    model.train()
    tracker = AllocationTracker(CachingAllocator(
        capacity_bytes=device.capacity_bytes, expandable_segments=device.expandable_segments
    ), is_padded=is_padded)  # fmt: skip
    replay_loading(tracker, model, load_dtype)
    loaded_bytes = tracker.allocator.allocated_bytes
    for _ in range(2):  # the handles of the main thread and of autograd's device thread
        tracker.hold(device.kernels.workspace_bytes, Part.WORKSPACE)
    gc.collect()  # a cycle left by the builder must not end within the simulation
    with quiet(), cuda_choices(device.kernels), tracker.follow(model), tracker:
        run_steps(tracker, model, step, optimizer_kind, micro_steps, keeps_into_next=keeps_into_next)
        if evaluates:
            evaluate(tracker, model, step)
    trained, total = count_parameters(model)
    peak = tracker.peak
    return MemoryEstimate(
        trained_parameters=trained,
        total_parameters=total,
        loaded_bytes=loaded_bytes,
        allocated_bytes=peak.allocated_bytes,
        reserved_bytes=tracker.allocator.peak_reserved_bytes,
        parts=peak.parts,
        phases=dict(tracker.phase_peaks),
        peak_phase=peak.phase,
        peak_module=peak.module,
        peak_operator=peak.operator,
        retries=tracker.allocator.retries,
    )


@cache
def look_past_libraries() -> None:
    """What is loaded by now will stay: the collector need not look through it at each of our calls (a third of a second)."""
    gc.collect()
    gc.freeze()


def run_steps(
    tracker: "AllocationTracker",
    model: nn.Module,
    step: Callable[[nn.Module], Tensor | tuple[Tensor, Any]],
    optimizer_kind: str,
    micro_steps: int,
    *,
    keeps_into_next: bool = False,
) -> None:
    """Two optimizer steps: the second one finds the optimizer's states already there.

    With several micro-steps it also finds gradients, as every micro-step but the first does: one pass each is enough.
    """
    parameters = trainable_parameters(model)
    hooks = [
        each.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda p: tracker.retag(p.grad, Part.GRADIENTS)
        )
        for each in parameters
    ]
    optimizer = optimizer_memory(optimizer_kind, parameters)
    for number in range(2):
        tracker.enter(Phase.FORWARD)
        result = step(model)
        loss, kept = result if isinstance(result, tuple) else (result, None)
        tracker.enter(Phase.BACKWARD)
        loss.backward()  # type: ignore[no-untyped-call]
        del loss, result
        tracker.enter(Phase.OPTIMIZER)
        if number == 0:
            for size in optimizer.shared + [size for sizes in optimizer.per_tensor for size in sizes]:
                tracker.hold(size, Part.OPTIMIZER)
        tracker.scratch(optimizer.scratch)
        if not keeps_into_next:
            del kept
        for each in parameters if micro_steps == 1 else ():
            each.grad = None
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def evaluate(tracker: "AllocationTracker", model: nn.Module, step: Callable[[nn.Module], Any]) -> None:
    """One pass over held-out rows between two optimizer steps: no gradients are left, none are made."""
    for each in trainable_parameters(model):
        each.grad = None
    model.eval()
    tracker.enter(Phase.EVALUATION)
    step(model)
    model.train()


# ---------------------------------------------------------------- the tracker
@dataclass
class Peak:
    """The instant of the highest allocated bytes so far."""

    allocated_bytes: int = 0
    parts: dict[Part, int] = field(default_factory=dict)
    phase: Phase = Phase.LOAD
    module: str = ""
    operator: str = ""


class AllocationTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator; mallocs each new storage on meta and frees it when Python lets it go."""

    def __init__(self, allocator: CachingAllocator, *, is_padded: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allocator = allocator
        self.is_padded = is_padded
        self.peak = Peak()
        self.phase_peaks: dict[Phase, int] = {}
        self.phase = Phase.LOAD
        self._live: dict[int, tuple[Block | None, Part]] = {}
        self._ends: dict[int, weakref.ref[Any]] = {}
        self._operators: dict[Any, str] = {}
        self._bytes_by_part = dict.fromkeys(Part, 0)
        self._operator = ""
        self._places = ModulePlaces()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and account for what it allocates."""
        kwargs = kwargs or {}
        name = self._operators.get(func)
        if name is None:
            name = self._operators[func] = str(func)
        self._operator = name
        is_on_meta = bool(args) and isinstance(args[0], Tensor) and args[0].device.type == "meta"
        if is_on_meta and name == "aten._local_scalar_dense.default":
            return self._answer(args[0].dtype)
        if is_on_meta and name == "aten.equal.default":
            return True
        replacement = STAND_INS.get(name) if is_on_meta else None
        if replacement is not None:
            with self:
                out = replacement(*args, **kwargs)
        else:
            out = run_on_meta(func, args, kwargs)
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, Tensor):
                self.track(each, self._part_now())
        if name in SCRATCH:
            self.scratch(SCRATCH[name](args))
        return out

    def enter(self, phase: Phase) -> None:
        """Begin a phase of the step."""
        self.phase = phase
        if phase in (Phase.FORWARD, Phase.EVALUATION):
            self._places.forget()
        self._mark()

    def track(self, tensor: Tensor, part: Part) -> None:
        """Allocate the tensor's storage, unless it is known already."""
        if tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        block = self.allocator.malloc(storage.nbytes())
        self._live[key] = (block, part)
        self._ends[key] = weakref.ref(storage, lambda _: self._end(key))
        self._count(block, part, +1)

    def retag(self, tensor: Tensor | None, part: Part) -> None:
        """Count a live storage under another part."""
        if tensor is None or tensor.untyped_storage()._cdata not in self._live:
            return
        key = tensor.untyped_storage()._cdata
        block, old = self._live[key]
        self._live[key] = (block, part)
        self._count(block, old, -1)
        self._count(block, part, +1)

    def hold(self, size_bytes: int, part: Part) -> Block | None:
        """Allocate bytes that belong to no tensor; they stay until `release`."""
        block = self.allocator.malloc(size_bytes)
        self._count(block, part, +1)
        return block

    def release(self, block: Block | None, part: Part) -> None:
        """Free what `hold` allocated."""
        self._count(block, part, -1)
        self.allocator.free(block)

    def scratch(self, sizes: Sequence[int]) -> None:
        """Allocate all of these bytes at once and free them again."""
        for block in [self.hold(size, Part.TEMPORARIES) for size in sizes]:
            self.release(block, Part.TEMPORARIES)

    @contextmanager
    def follow(self, model: nn.Module) -> Iterator[None]:
        """Within the block, know which module is running."""
        self._places.read(model)
        before = module_hooks.register_module_forward_pre_hook(self._places.begin)
        after = module_hooks.register_module_forward_hook(self._places.end, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _answer(self, dtype: torch.dtype) -> bool:
        """`.item()` of a truth value asks "is there no padding"; of a number, nobody can answer it without data."""
        if dtype != torch.bool:
            raise NotImplementedError("its memory depends on values in the data")
        return not self.is_padded

    def _part_now(self) -> Part:
        if self.phase is Phase.LOAD:
            return Part.FROZEN
        if self.phase in (Phase.FORWARD, Phase.EVALUATION):
            return Part.LOGITS if self._places.is_past_head else Part.ACTIVATIONS
        if self.phase is Phase.BACKWARD:
            if self._places.is_in_head_backward:
                return Part.LOGITS
            return Part.ACTIVATIONS if self._places.is_in_forward else Part.TEMPORARIES
        return Part.TEMPORARIES

    def _end(self, key: int) -> None:
        block, part = self._live.pop(key)
        del self._ends[key]
        self._count(block, part, -1)
        self.allocator.free(block)

    def _count(self, block: Block | None, part: Part, sign: int) -> None:
        if block is None:
            return
        self._bytes_by_part[part] += sign * block.size_bytes
        if sign > 0:
            self._mark()

    def _mark(self) -> None:
        now = self.allocator.allocated_bytes
        self.phase_peaks[self.phase] = max(now, self.phase_peaks.get(self.phase, 0))
        if now > self.peak.allocated_bytes:
            parts = {part: size for part, size in self._bytes_by_part.items() if size}
            where = "" if self.phase in (Phase.LOAD, Phase.OPTIMIZER) else self._places.name_now(self.phase)
            self.peak = Peak(now, parts, self.phase, where, self._operator)


class ModulePlaces:
    """Which module runs now, also in backward: autograd's nodes carry the number of their creation in forward."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._head: int | None = None
        self._body: int | None = None
        self._stack: list[str] = []
        self._starts: list[int] = []  # sequence numbers at which ...
        self._owners: list[str] = []  # ... this module began to run
        self._open_bodies = 0
        self.is_past_head = False

    def read(self, model: nn.Module) -> None:
        """Learn the modules' names, which one makes the logits, and which the hidden states in front of it."""
        self._names = {id(module): name for name, module in model.named_modules()}
        get_head, get_body = (getattr(model, name, None) for name in ("get_output_embeddings", "get_decoder"))
        self._head = id(get_head()) if get_head is not None else None
        self._body = id(get_body()) if get_body is not None else None

    def forget(self) -> None:
        """A new forward pass begins."""
        self._stack, self._starts, self._owners = [], [], []
        self._open_bodies, self.is_past_head = 0, False

    @property
    def is_in_forward(self) -> bool:
        """A module is running forward (in backward: being recomputed)."""
        return bool(self._stack)

    @property
    def is_in_head_backward(self) -> bool:
        """The gradient has not reached the body's hidden states yet."""
        return self._open_bodies > 0

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Hook before each module's forward."""
        name = self._names.get(id(module), "")
        self._stack.append(name)
        self._note(name)
        if id(module) == self._head:
            self.is_past_head = True

    def end(self, module: nn.Module, args: Any, out: Any) -> None:
        """Hook after each module's forward, also where it was cut short."""
        if self._stack:
            self._stack.pop()
        hidden = out[0] if id(module) == self._body and out is not None else None
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            self._open_bodies += 1
            hidden.register_hook(self._close_body)  # type: ignore[no-untyped-call]
        self._note(self._stack[-1] if self._stack else "")

    def name_now(self, phase: Phase) -> str:
        """The innermost module that runs, or that made the autograd node that runs."""
        if self._stack or phase is not Phase.BACKWARD:
            return self._stack[-1] if self._stack else ""
        node = torch._C._current_autograd_node()
        if node is None or not self._starts:
            return ""
        place = bisect_right(self._starts, node._sequence_nr()) - 1
        return self._owners[place] if 0 <= place < len(self._owners) - 1 else ""

    def _close_body(self, gradient: Tensor) -> None:
        self._open_bodies -= 1

    def _note(self, name: str) -> None:
        self._starts.append(torch._C._autograd._get_sequence_nr())
        self._owners.append(name)


# ---------------------------------------------------------------- loading
def replay_loading(tracker: AllocationTracker, model: nn.Module, load_dtype: torch.dtype | None) -> None:
    """Allocate the weights in the order of loading, because it leaves holes in the allocator's segments.

    A quantised weight is on the device in the checkpoint's dtype while it is quantised. A frozen weight that
    is float32 although the checkpoint is 16-bit was cast after loading: its first copy ends last.
    """
    itemsize = load_dtype.itemsize if load_dtype is not None else 0
    cast: list[tuple[nn.Parameter, Block | None]] = []
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None or parameter.requires_grad:
                continue
            if is_quantised(parameter):
                load_quantised(tracker, parameter, itemsize or 2)
            elif itemsize == 2 and parameter.dtype == torch.float32:
                cast.append((parameter, tracker.hold(parameter.numel() * itemsize, Part.FROZEN)))
            else:
                tracker.track(parameter, Part.FROZEN)
    for parameter, first_copy in cast:
        tracker.track(parameter, Part.FROZEN)
        tracker.release(first_copy, Part.FROZEN)
    for parameter in model.parameters():
        tracker.track(parameter, Part.TRAINED if parameter.requires_grad else Part.FROZEN)
    for buffer in model.buffers():
        tracker.track(buffer, Part.FROZEN)


def is_quantised(parameter: Tensor) -> bool:
    """A packed weight of bitsandbytes."""
    return type(parameter).__name__ in ("Params4bit", "Int8Params")


def load_quantised(tracker: AllocationTracker, parameter: Any, itemsize: int) -> None:
    """The checkpoint's copy, then the packed weight and its constants, then the copy's end."""
    values = parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)
    copy = tracker.hold(values * itemsize, Part.FROZEN)
    tracker.track(parameter, Part.FROZEN)
    for constant in quantisation_constants(parameter):
        tracker.track(constant, Part.QUANTISATION)
    tracker.release(copy, Part.FROZEN)


def quantisation_constants(parameter: Any) -> list[Tensor]:
    """Scales and code tables of a packed weight: bitsandbytes' QuantState (4-bit) or row scales (8-bit)."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return [scales for scales in (getattr(parameter, "SCB", None),) if scales is not None]
    constants = [state.absmax, state.code, state.offset]
    if state.state2 is not None:
        constants += [state.state2.absmax, state.state2.code]
    return [each for each in constants if each is not None]


@contextmanager
def quiet() -> Iterator[None]:
    """What libraries remark on casts and on the meta device, layer by layer, is not the user's business."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
