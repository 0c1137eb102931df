"""Run training steps on the meta device and replay every allocation through the caching allocator's model.

No GPU and no weights are needed: tensors on the meta device have shapes and dtypes but no data. A
TorchDispatchMode sees each operator of forward, backward (with the recomputation of checkpointing) and each
new storage is a malloc, its end of life a free. They are recorded as events (`ftkit.core.allocation_events`), which are
then replayed. What a CUDA device does differently is in
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
from ftkit.core.allocation_events import (
    ALLOCATE,
    BLOCK,
    ENTER,
    FREE,
    LOADED,
    NUMBERED,
    RECORDED,
    RETAG,
    Event,
    Replay,
    replay,
    stretched,
)
from ftkit.core.caching_allocator import CachingAllocator
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


@dataclass(frozen=True)
class Recording:
    """The events of loading a model and of two optimizer steps, and its (trained, all) parameters."""

    events: list[Event]
    trained_parameters: int
    total_parameters: int

    def on(self, device: SimulatedDevice) -> MemoryEstimate:
        """The peaks on a device with its capacity. OutOfMemoryError where it has one and the run does not fit."""
        allocator = CachingAllocator(
            capacity_bytes=device.capacity_bytes, expandable_segments=device.expandable_segments
        )
        return self.estimate(replay(self.events, allocator))

    def estimate(self, found: Replay) -> MemoryEstimate:
        """The answer of a replay."""
        return MemoryEstimate(
            trained_parameters=self.trained_parameters,
            total_parameters=self.total_parameters,
            loaded_bytes=found.loaded_bytes,
            allocated_bytes=found.peak_bytes,
            reserved_bytes=found.allocator.peak_reserved_bytes,
            parts=found.parts,
            phases=found.phases,
            peak_phase=found.phase,
            peak_module=found.module,
            peak_operator=found.operator,
            retries=found.allocator.retries,
        )


def simulate(
    build: Callable[[], nn.Module],
    step: Callable[[nn.Module], Tensor | tuple[Tensor, Any]],
    optimizer_kind: str,
    *,
    device: SimulatedDevice = SimulatedDevice(),
    **options: Any,
) -> MemoryEstimate:
    """The peak memory of loading a model and of two optimizer steps. As `record`, then on the device.

    Raises OutOfMemoryError where the device has a capacity and the run does not fit.
    """
    recording = record(build, step, optimizer_kind, kernels=device.kernels, **options)
    assert recording is not None
    return recording.on(device)


def record(
    build: Callable[[], nn.Module],
    step: Callable[[nn.Module], Tensor | tuple[Tensor, Any]],
    optimizer_kind: str,
    *,
    kernels: CudaKernels = CudaKernels(),
    micro_steps: int = 1,
    is_padded: bool = False,
    load_dtype: torch.dtype | None = None,
    keeps_into_next: bool = False,
    evaluates: bool = False,
    blocks: int | None = None,
) -> Recording | None:
    """The events of loading a model and of two optimizer steps.

    build() gives the model, on meta, as training has it after the adapter was attached. step(model) runs one
    forward pass and gives the scalar loss, or the loss and whatever else the caller keeps until the optimizer
    step is over. micro_steps: forward and backward passes per optimizer step; more than one keep their
    gradients. is_padded: the answer to "does this batch hold padding", which decides for a mask.
    load_dtype: the dtype of the checkpoint, if the model is quantised or cast after loading. keeps_into_next: what the
    caller keeps ends only when the next forward pass has given its own. evaluates: after the steps, step(model) runs
    once more without gradients. blocks: build() gives RECORDED blocks of a model that has so many; None is the answer where
    they turn out not to be alike.

    Raises NotImplementedError or RuntimeError from an operator that the meta device does not know.
    """
    look_past_libraries()
    with quiet():
        model = build()
    model.train()
    tracker = AllocationTracker(is_padded=is_padded, has_alike_blocks=blocks is not None)
    replay_loading(tracker, model, load_dtype)
    tracker.note(LOADED)
    for _ in range(2):  # the handles of the main thread and of autograd's device thread
        tracker.hold(kernels.workspace_bytes, Part.WORKSPACE)
    gc.collect()  # a cycle left by the builder must not end within the simulation
    with quiet(), cuda_choices(kernels), tracker.follow(model), tracker:
        run_steps(tracker, model, step, optimizer_kind, micro_steps, keeps_into_next=keeps_into_next)
        if evaluates:
            evaluate(tracker, model, step)
    trained, total = count_parameters(model)
    if blocks is None:
        return Recording(tracker.events, trained, total)
    events = stretched(tracker.events, blocks)
    if events is None:
        return None
    inner = next(module for name, module in model.named_modules() if name.endswith(".layers.2"))
    of_block = count_parameters(inner)
    added = blocks - RECORDED
    return Recording(events, trained + added * of_block[0], total + added * of_block[1])


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
            for size in optimizer.shared:
                tracker.hold(size, Part.OPTIMIZER)
            for each, sizes in zip(parameters, optimizer.per_tensor, strict=True):
                tracker.enter_block_of(each)
                for size in sizes:
                    tracker.hold(size, Part.OPTIMIZER)
            tracker.leave_blocks()
        tracker.scratch(optimizer.scratch, parameters)
        if not keeps_into_next:
            del kept
        for each in parameters if micro_steps == 1 else ():
            tracker.enter_block_of(each)
            each.grad = None
        tracker.leave_blocks()
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def evaluate(tracker: "AllocationTracker", model: nn.Module, step: Callable[[nn.Module], Any]) -> None:
    """One pass over held-out rows between two optimizer steps: no gradients are left, none are made."""
    for each in trainable_parameters(model):
        tracker.enter_block_of(each)
        each.grad = None
    tracker.leave_blocks()
    model.eval()
    tracker.enter(Phase.EVALUATION)
    step(model)
    model.train()


# ---------------------------------------------------------------- the tracker
class AllocationTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator; notes each new storage on meta, and its end when Python lets it go.

    has_alike_blocks: also notes which of the model's blocks an event belongs to.
    """

    def __init__(self, *, is_padded: bool = False, has_alike_blocks: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.is_padded = is_padded
        self.has_alike_blocks = has_alike_blocks
        self.phase = Phase.LOAD
        self._count = 0
        self._live: dict[int, int] = {}
        self._ends: dict[int, weakref.ref[Any]] = {}
        self._operators: dict[Any, str] = {}
        self._operator = ""
        self._places = ModulePlaces(self)
        self._block_of: dict[int, int] = {}

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

    def note(self, *event: Any) -> None:
        """Add an event."""
        self.events.append(event)

    def enter(self, phase: Phase) -> None:
        """Begin a phase of the step."""
        self.leave_blocks()
        self.phase = phase
        if phase in (Phase.FORWARD, Phase.EVALUATION):
            self._places.forget()
        self.note(ENTER, phase)

    def read_blocks(self, model: nn.Module) -> None:
        """Learn which parameters and modules belong to which block."""
        if self.has_alike_blocks:
            for name, each in (*model.named_modules(), *model.named_parameters()):
                if found := NUMBERED.search(name):
                    self._block_of[id(each)] = int(found[2])

    def enter_block(self, number: int | None) -> None:
        """What follows belongs to this block."""
        if self.has_alike_blocks:
            self.note(BLOCK, number)

    def enter_block_of(self, each: nn.Module | nn.Parameter) -> None:
        """What follows belongs to the block of this module or parameter, or to none."""
        self.enter_block(self._block_of.get(id(each)))

    def leave_blocks(self) -> None:
        """What follows belongs to no block."""
        self.enter_block(None)

    def track(self, tensor: Tensor, part: Part) -> None:
        """Allocate the tensor's storage, unless it is known already."""
        if tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self._live:
            return
        self._live[place] = self._allocate(storage.nbytes(), part)
        self._ends[place] = weakref.ref(storage, lambda _: self._end(place))

    def retag(self, tensor: Tensor | None, part: Part) -> None:
        """Count a live storage under another part."""
        key = None if tensor is None else self._live.get(tensor.untyped_storage()._cdata)
        if key:
            self.note(RETAG, key, part)

    def hold(self, size_bytes: int, part: Part) -> int:
        """Allocate bytes that belong to no tensor; they stay until `release` of the key."""
        return self._allocate(size_bytes, part)

    def release(self, key: int) -> None:
        """Free what `hold` allocated."""
        if key:
            self.note(FREE, key)

    def scratch(self, sizes: Sequence[int], parameters: Sequence[nn.Parameter] = ()) -> None:
        """Allocate all of these bytes at once and free them again. parameters: what each is for, if there are as many."""
        owners = parameters if len(parameters) == len(sizes) else ()
        keys = []
        for number, size in enumerate(sizes):
            if owners:
                self.enter_block_of(owners[number])
            keys.append(self.hold(size, Part.TEMPORARIES))
        if owners:
            self.leave_blocks()
        for number, key in enumerate(keys):
            if owners:
                self.enter_block_of(owners[number])
            self.release(key)
        if owners:
            self.leave_blocks()

    def _allocate(self, size_bytes: int, part: Part) -> int:
        """The key of an allocation; 0 for no bytes, as a tensor without elements owns no memory."""
        if size_bytes == 0:
            return 0
        self._count += 1
        is_inside = self.phase not in (Phase.LOAD, Phase.OPTIMIZER)
        module = self._places.name_now(self.phase) if is_inside else ""
        self.events.append((ALLOCATE, self._count, size_bytes, part, module, self._operator))
        return self._count

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

    def _end(self, place: int) -> None:
        del self._ends[place]
        self.release(self._live.pop(place))


class ModulePlaces:
    """Which module runs now, also in backward: autograd's nodes carry the number of their creation in forward."""

    def __init__(self, tracker: AllocationTracker) -> None:
        self._tracker = weakref.proxy(tracker)
        self._blocks: dict[int, int] = {}
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
        if self._tracker.has_alike_blocks:
            numbers = {each: NUMBERED.search(name) for each, name in self._names.items()}
            self._blocks = {each: int(n[2]) for each, n in numbers.items() if n and self._names[each].endswith(n[0])}
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
        if id(module) in self._blocks:
            self._tracker.enter_block(self._blocks[id(module)])
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
        if id(module) in self._blocks and self._tracker.phase is not Phase.BACKWARD:
            self._end_block(self._blocks[id(module)], out[0] if isinstance(out, tuple) else out)

    def _end_block(self, number: int, out: Tensor) -> None:
        """A block has run forward; its backward pass begins where the gradient of what it gave is known."""
        if number == RECORDED - 1:
            self._tracker.leave_blocks()
        if out.requires_grad:
            out.register_hook(lambda _: self._tracker.enter_block(number))  # type: ignore[no-untyped-call]

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
    tracker.read_blocks(model)
    itemsize = load_dtype.itemsize if load_dtype is not None else 0
    cast: list[tuple[nn.Parameter, int]] = []
    for module in model.modules():
        tracker.enter_block_of(module)
        for parameter in module._parameters.values():
            if parameter is None or parameter.requires_grad:
                continue
            if is_quantised(parameter):
                load_quantised(tracker, parameter, itemsize or 2)
            elif itemsize == 2 and parameter.dtype == torch.float32:
                cast.append((parameter, tracker.hold(parameter.numel() * itemsize, Part.FROZEN)))
            else:
                tracker.track(parameter, Part.FROZEN)
    tracker.leave_blocks()
    for parameter, first_copy in cast:
        tracker.enter_block_of(parameter)
        tracker.track(parameter, Part.FROZEN)
        tracker.release(first_copy)
    tracker.leave_blocks()
    for parameter in model.parameters():
        tracker.enter_block_of(parameter)
        tracker.track(parameter, Part.TRAINED if parameter.requires_grad else Part.FROZEN)
    tracker.leave_blocks()
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
    tracker.release(copy)


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
