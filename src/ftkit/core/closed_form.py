"""The memory of `ftkit train` as a formula of the model's sizes: no torch, a tenth of a millisecond.

Sums what is alive at the instants that can be the highest of a step: at the loss, in the backward pass of the output
head, of the final norm and of the last block (with checkpointing: recomputed), at the end of the backward pass, and at
the optimizer's step. What a block keeps was read off the simulation's list of live tensors; there is no fitted number.

Letters: T positions of a micro-batch, N of them counted (here: all), h hidden, f MLP, Q and K widths of all query and
of all key heads, V vocabulary, a bytes of an activation, P trained elements of a block.
"""

from dataclasses import dataclass

from ftkit.core import several_gpus
from ftkit.core.batch_sizes import CHUNK_LOGITS, SMALLEST_CHUNK
from ftkit.core.caching_allocator import KIB, MIB, round_up
from ftkit.core.gpus import Gpu
from ftkit.core.memory_estimate import MemoryEstimate, Part, Phase
from ftkit.core.model_settings import ModelSettings
from ftkit.core.model_sizes import ModelSizes
from ftkit.core.planned_run import PlannedRun
from ftkit.core.several_gpus import Sharing
from ftkit.core.targets_by_name import HEAD, LAYERS, named_targets
from ftkit.errors import ExitCode, UserError

EXPECTED_ERROR = 0.03
"""Of the allocated bytes, against the simulation over the grid of tests/core/test_closed_form.py."""
RESERVED = 1.05
"""Reserved over allocated bytes: what the allocator's holes add; 1.01 to 1.2 in the simulations, most for small models."""
WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4}
ALONE = Sharing(1, "ddp")
ITEM_NF4 = 0.5 + 1 / 64 + 4 / 64 / 256
"""Bytes of a weight in NF4 with double quantisation: arXiv:2305.14314, section 3."""


@dataclass(frozen=True)
class Shape:
    """One run on one kind of card, with the sums that several instants share; all sizes in bytes."""

    model: ModelSizes
    run: PlannedRun
    rank: int
    dropout: float
    targets: frozenset[str]
    has_flash: bool
    workspace: int

    @property
    def a(self) -> int:
        """Bytes of one activation, and of one frozen weight that is not quantised."""
        return WIDTH[self.run.dtype]

    @property
    def is_full(self) -> bool:
        """Every weight is trained."""
        return self.run.method == "full"

    # ------------------------------------------------------------ weights
    @property
    def trained(self) -> int:
        """Trained elements."""
        if self.is_full:
            return self.model.parameters
        head = self.rank * (self.model.hidden + self.model.vocabulary) if HEAD in self.targets else 0
        return self.model.layers * self.adapter_of_block + head

    @property
    def adapter_of_block(self) -> int:
        """Elements of the adapters in one block."""
        linear = self.model.linear
        return sum(self.rank * sum(linear[name]) for name in self.targets if name in linear)

    @property
    def trained_item(self) -> int:
        """Bytes of a trained element and of its gradient: adapters are float32."""
        return self.a if self.is_full else 4

    @property
    def frozen(self) -> tuple[float, float]:
        """(frozen weights, constants of their quantisation)."""
        if self.is_full:
            return 0, 0
        model, method = self.model, self.run.method
        linear = model.layers * sum(inputs * outputs for inputs, outputs in model.linear.values())
        others = (model.parameters - linear) * self.a
        if method == "qlora":
            layers = model.layers * len(LAYERS)
            return others + linear / 2, linear * (ITEM_NF4 - 0.5) + layers * 3 * 512
        if method == "int8":
            rows = model.layers * sum(outputs for _, outputs in model.linear.values())
            return others + linear, 4 * rows
        return others + linear * self.a, 0

    @property
    def optimizer(self) -> float:
        """What the optimizer keeps."""
        per_element = {
            "adamw": 2 * self.trained_item,
            "sgd": self.trained_item,
            "adamw-8bit": 2 + 8 / 256,
            "paged-adamw-8bit": 8 / 256,
        }[self.run.optimizer]
        return self.trained * per_element

    @property
    def gradients(self) -> int:
        """Of all trained elements."""
        return self.trained * self.trained_item

    # ------------------------------------------------------------ what a block keeps for its backward pass
    @property
    def uses_flash(self) -> bool:
        """FlashAttention-2 for 16-bit numbers; else the memory-efficient kernel, which copies keys for every head."""
        return self.has_flash and self.a == 2 and self.model.head <= 256

    @property
    def kept_keys(self) -> int:
        """Width of the keys that are kept."""
        is_copied = not self.uses_flash and self.model.key_heads != self.model.heads
        return self.model.query if is_copied else self.model.key

    def keeps_input(self, *names: str) -> bool:
        """One of these layers keeps its input: it is trained (dropout keeps its own copy), or bitsandbytes' 8-bit layer."""
        is_trained = self.dropout == 0 and any(name in self.targets for name in names)
        return self.is_full or self.run.method == "int8" or is_trained

    @property
    def kept_by_norms(self) -> float:
        """A position: float32 copies of both norms' inputs, for trained norms also what they scale."""
        heads = self.model.query + self.model.key if self.model.norms_heads else 0
        return (2 * self.model.hidden + heads) * (4 + (self.a if self.is_full else 0))

    @property
    def kept_by_attention(self) -> float:
        """A position: inputs of the projections, queries, keys, values, what attention gives, its sums.

        Where a pack is not attended to in one call, joining its rows copies what attention gives; else that is the next
        projection's input itself.
        """
        model, a = self.model, self.a
        inputs = a * model.hidden * self.keeps_input("q_proj", "k_proj", "v_proj")
        out = a * model.query * (self.run.pack and not self.uses_flash and self.keeps_input("o_proj"))
        return inputs + a * (2 * model.query + 2 * self.kept_keys) + 4 * model.heads + out

    @property
    def kept_by_mlp(self) -> float:
        """A position: the input, the gate before and after its activation, the other half, their product."""
        model, a = self.model, self.a
        return (
            a * model.hidden * self.keeps_input("gate_proj", "up_proj")
            + 3 * a * model.mlp
            + a * model.mlp * self.keeps_input("down_proj")
        )

    @property
    def kept_by_adapters(self) -> float:
        """A position: what lies between the two small matrices; with dropout each input anew, and its mask."""
        if self.is_full:
            return 0
        inside = self.a * self.rank * len(self.targets & set(LAYERS))
        if self.dropout == 0:
            return inside
        inputs = sum(self.model.linear[name][0] for name in self.targets & set(LAYERS))
        return inside + (self.a + 1) * inputs

    @property
    def block(self) -> float:
        """All that a block keeps; adapters in the format of their input are kept too."""
        positions = self.run.positions
        kept = self.kept_by_norms + self.kept_by_attention + self.kept_by_mlp + self.kept_by_adapters
        cast = self.a * self.adapter_of_block if self.a < 4 and not self.is_full else 0
        return positions * kept + cast

    @property
    def kept_by_all_blocks(self) -> float:
        """What the blocks keep while the loss is computed: everything, or with checkpointing the input of each.

        The first block's norm keeps no copy of its input where nothing below it is trained. bitsandbytes' 8-bit layers
        keep their inputs from checkpointing, which does not see them.
        """
        positions, model, a = self.run.positions, self.model, self.a
        if not self.run.checkpointing:
            below = 0 if self.is_full else positions * 4 * model.hidden
            return model.layers * self.block - below
        inputs = positions * a * model.hidden
        if self.run.method == "int8":
            inputs += positions * a * (2 * model.hidden + model.query + model.mlp)
        return model.layers * inputs

    # ------------------------------------------------------------ instants
    @property
    def base(self) -> dict[Part, float]:
        """What is there all the time."""
        weights, constants = self.frozen
        return {
            Part.FROZEN: weights,
            Part.QUANTISATION: constants,
            Part.TRAINED: self.trained * self.trained_item,
            Part.OPTIMIZER: self.optimizer,
            Part.WORKSPACE: self.workspace,
            Part.GRADIENTS: self.gradients if self.run.micro_steps > 1 else 0,
        }

    @property
    def head_learns(self) -> bool:
        """The output head is trained, itself or by an adapter."""
        return self.is_full or HEAD in self.targets

    @property
    def chunk(self) -> int:
        """Positions whose logits are there at once."""
        return min(self.run.positions, max(SMALLEST_CHUNK, CHUNK_LOGITS // self.model.vocabulary))

    @property
    def is_chunked(self) -> bool:
        """The counted positions are more than a chunk."""
        return self.run.positions > self.chunk

    @property
    def final(self) -> float:
        """Kept behind the last block: the norm's float32 input, the hidden states, and for a frozen head their gradient."""
        positions, h, a = self.run.positions, self.model.hidden, self.a
        norm = 4 * h + (a * h if self.is_full else 0)
        return positions * (norm + a * h + (a * h if self.is_chunked and not self.head_learns else 0))

    def instants(self) -> list[tuple[Phase, dict[Part, float]]]:
        """What is alive on top of the base at each instant that can be the highest."""
        positions, model, a = self.run.positions, self.model, self.a
        logits = self.chunk * model.vocabulary
        kept = self.kept_by_all_blocks
        weight = model.vocabulary * model.hidden * a
        head_gradient = weight if self.is_full else 0
        found: list[tuple[Phase, dict[Part, float]]] = []
        taken = 12 if self.is_chunked and not self.head_learns else 8
        found.append((Phase.FORWARD, {Part.ACTIVATIONS: kept, Part.LOGITS: self.final + taken * logits}))
        in_head = self.final + 12 * logits + (a * positions * model.hidden if self.head_learns else 0)
        if self.is_full and self.is_chunked:  # the sum of the chunks' gradients, the next one's, and their sum
            in_head = max(in_head + weight, self.final + a * positions * model.hidden + 3 * weight)
        found.append((Phase.BACKWARD, {Part.ACTIVATIONS: kept, Part.LOGITS: in_head}))
        in_norm = positions * ((20 if a == 2 else 16) + 4 + a) * model.hidden
        is_kept = self.run.micro_steps == 1 or model.is_tied  # a tied one waits for the embedding's share
        gradient_of_head = {Part.GRADIENTS: head_gradient if is_kept else 0}
        found.append((Phase.BACKWARD, {Part.ACTIVATIONS: kept, Part.TEMPORARIES: in_norm, **gradient_of_head}))
        recomputed = self.block if self.run.checkpointing else 0
        found += [
            (Phase.BACKWARD, {Part.ACTIVATIONS: kept + recomputed + freed, Part.TEMPORARIES: extra, **gradient_of_head})
            for freed, extra in self.backward_of_block()
        ]
        found += self.end_of_step()
        return found

    def backward_of_block(self) -> list[tuple[float, float]]:
        """(what is given back already, what comes on top) at the high points of the last block's backward pass."""
        positions, model, a, method = self.run.positions, self.model, self.a, self.run.method
        unpacked = {"qlora": a, "int8": a}.get(method, 0)
        incoming = 2 * a * model.hidden * positions
        product = a * model.mlp * positions
        down = -product if self.keeps_input("down_proj") and method != "int8" else 0
        weight = unpacked * model.mlp * model.hidden
        dw = a * model.mlp * model.hidden if self.is_full else 0
        high: list[tuple[float, float]] = [(down, incoming + max(2 * product + weight, 3 * product) + dw)]
        if method == "int8" and self.run.checkpointing:
            high.append((0, incoming + 6 * model.mlp * positions))
        after_mlp = -positions * (self.kept_by_mlp + 4 * model.hidden)
        q, k = model.query, model.key
        scratch = positions * (4 * round_up(model.head, 32) * model.heads + 4 * model.heads) if a == 2 else 0
        if self.uses_flash and k != q:
            scratch += positions * 2 * a * q
        high.append((after_mlp, incoming + scratch + positions * a * (2 * q + 2 * self.kept_keys)))
        return high

    @property
    def weights(self) -> tuple[float, float]:
        """(bytes of one block's weights, of embedding and output head), frozen and trained ones."""
        model = self.model
        outer = model.vocabulary * model.hidden * (1 if model.is_tied else 2) * self.a
        frozen, constants = self.frozen
        whole = frozen + constants + self.trained * self.trained_item
        return (whole - outer) / model.layers, outer

    def end_of_step(self) -> list[tuple[Phase, dict[Part, float]]]:
        """The last gradients, and the optimizer's step, where all of them are there."""
        gradients = 0 if self.run.micro_steps > 1 else self.gradients
        last: float = 0
        if self.is_full:  # the embedding's gradient; a tied one is the sum of two
            weight = self.a * self.model.vocabulary * self.model.hidden
            copies = (2 if self.model.is_tied else 0) + (1 if self.run.micro_steps > 1 else 0)
            last = copies * weight + self.run.positions * 2 * self.a * self.model.hidden
        elif self.run.checkpointing:
            last = self.block
        return [
            (Phase.BACKWARD, {Part.GRADIENTS: gradients, Part.TEMPORARIES: last}),
            (Phase.OPTIMIZER, {Part.GRADIENTS: gradients}),
        ]


def check_rank(rank: int, targets: frozenset[str], model: ModelSizes) -> None:
    """A rank above a layer's width is no low-rank update: exit 2, as in training."""
    shapes = model.linear | {HEAD: (model.hidden, model.vocabulary)}
    for name in sorted(targets):
        narrow = min(shapes[name])
        if rank > narrow:
            raise UserError(
                f"--r {rank} is more than {name} is wide ({narrow})", ExitCode.USAGE, hint=f"--r {narrow} or less"
            )


def closed_form(
    settings: ModelSettings, run: PlannedRun, model: ModelSizes, gpu: Gpu | None, sharing: Sharing = ALONE
) -> MemoryEstimate:
    """The peak of training as a formula, within EXPECTED_ERROR of the simulation; reserved bytes are a rough multiple.

    sharing: what one of several cards holds, which no simulation checks.

    Exit 6 where rows are longer than the model's attention window, which the formula does not describe.
    """
    if model.window is not None and run.tokens > model.window:
        raise UserError(
            f"the closed form does not describe attention windows ({model.window} tokens, rows have {run.tokens})",
            ExitCode.ENVIRONMENT,
            hint="without --fast the model's own code is simulated",
        )
    targets = frozenset() if run.method == "full" else named_targets(settings.targets, is_tied=model.is_tied)
    check_rank(settings.r, targets, model)
    shape = Shape(
        model=model,
        run=run,
        rank=settings.r,
        dropout=settings.dropout,
        targets=targets,
        has_flash=gpu is None or gpu.has_flash_attention,
        workspace=2 * (32 * MIB if gpu is not None and gpu.has_large_workspace else 8320 * KIB),
    )
    base, (block, outer) = shape.base, shape.weights
    instants = [
        (phase, sharing.shared({part: base.get(part, 0) + more.get(part, 0) for part in Part}, block, outer))
        for phase, more in shape.instants()
    ]
    phase, parts = max(instants, key=lambda instant: sum(instant[1].values()))
    sizes = {part: int(size) for part, size in parts.items() if size >= 1}
    allocated = sum(sizes.values())
    return MemoryEstimate(
        trained_parameters=shape.trained,
        total_parameters=model.parameters + (0 if shape.is_full else shape.trained),
        loaded_bytes=int(base[Part.FROZEN] + base[Part.QUANTISATION] + base[Part.TRAINED]),
        allocated_bytes=allocated,
        reserved_bytes=int(allocated * (RESERVED if sharing.cards == 1 else several_gpus.RESERVED)),
        parts=sizes,
        phases={each: int(max(sum(p.values()) for name, p in instants if name is each)) for each, _ in instants},
        peak_phase=phase,
        peak_module="",
        peak_operator="",
        expected_error=EXPECTED_ERROR if sharing.cards == 1 else several_gpus.EXPECTED_ERROR,
    )
