"""What a simulated run allocates and frees, in order: a list of events, and its replay through the allocator's model.

A model's blocks are alike, so that the events of a few of them tell those of many (`stretched`): a run of 6 blocks is
recorded, the events of an inner block are repeated. It is done only where two inner blocks really had the same events, each
seen from its own place, in every pass over the blocks; the result is then the list that the long model would have given.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ftkit.core.caching_allocator import Block, CachingAllocator
from ftkit.core.memory_estimate import Part, Phase

RECORDED = 6
"""Blocks of a model that stands for a longer one: two at each end as they are, and two alike in between."""
ENDS = 2
Event = tuple[Any, ...]
ALLOCATE, FREE, RETAG, ENTER, BLOCK, LOADED = range(6)
"""(ALLOCATE, key, bytes, part, module, operator), (FREE, key), (RETAG, key, part), (ENTER, phase), (BLOCK, number or None:
what follows belongs to that block of the model, or to none), (LOADED,). Keys are numbers, one for each allocation."""
NUMBERED = re.compile(r"(\.layers\.)(\d+)(?=\.|$)")


# ---------------------------------------------------------------- replay
@dataclass
class Replay:
    """The peaks of a list of events. phases: the highest allocated bytes of each; parts, module, operator: at the peak."""

    allocator: CachingAllocator
    loaded_bytes: int = 0
    peak_bytes: int = 0
    phase: Phase = Phase.LOAD
    module: str = ""
    operator: str = ""
    parts: dict[Part, int] = field(default_factory=dict)
    phases: dict[Phase, int] = field(default_factory=dict)


def replay(events: Iterable[Event], allocator: CachingAllocator) -> Replay:
    """Malloc and free as the events say. OutOfMemoryError where the allocator has a capacity and it is too small."""
    found, phase = Replay(allocator), Phase.LOAD
    live: dict[int, tuple[Block, Part]] = {}
    by_part = dict.fromkeys(Part, 0)
    highest = 0  # of this phase
    for event in events:
        kind = event[0]
        if kind == ALLOCATE:
            _, key, size, part, module, operator = event
            block = allocator.malloc(size)
            assert block is not None
            live[key] = block, part
            by_part[part] += block.size_bytes
            now = allocator.allocated_bytes
            if now > highest:
                highest = now
                if now > found.peak_bytes:
                    found.peak_bytes, found.phase = now, phase
                    found.module, found.operator, found.parts = module, operator, by_part.copy()
        elif kind == FREE:
            block, part = live.pop(event[1])
            by_part[part] -= block.size_bytes
            allocator.free(block)
        elif kind == RETAG:
            block, part = live[event[1]]
            by_part[part] -= block.size_bytes
            by_part[event[2]] += block.size_bytes
            live[event[1]] = block, event[2]
        elif kind == ENTER:
            found.phases[phase] = max(highest, found.phases.get(phase, 0))
            phase, highest = event[1], allocator.allocated_bytes
        elif kind == LOADED:
            found.loaded_bytes = allocator.allocated_bytes
    found.phases[phase] = max(highest, found.phases.get(phase, 0))
    found.parts = {part: size for part, size in found.parts.items() if size}
    return found


# ---------------------------------------------------------------- more blocks
@dataclass
class Group:
    """Events in a row that belong to one block, or (None) to no block, and the keys allocated in them."""

    block: int | None
    events: list[Event] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)


def stretched(events: list[Event], blocks: int) -> list[Event] | None:
    """The events of a model of so many blocks from those of RECORDED; None where the blocks are not alike."""
    sweeps = sweeps_of(events)
    if sweeps is None or not ends_clean(events):
        return None
    births = {key: (number, group.block, place) for number, sweep in enumerate(sweeps) for group in sweep
              for place, key in enumerate(group.keys)}  # fmt: skip
    for sweep in sweeps:
        if len(sweep) > 1 and not alike(sweep, births):
            return None
    try:
        return list(repeated(sweeps, births, blocks))
    except KeyError:  # something outside of the blocks ends what an inner one began
        return None


def ends_clean(events: list[Event]) -> bool:
    """No tensor of a pass is left: one that waits for Python's collector of cycles ends sooner in a longer run."""
    parts: dict[int, Part] = {}
    for event in events:
        if event[0] == ALLOCATE:
            parts[event[1]] = event[3]
        elif event[0] == FREE:
            del parts[event[1]]
        elif event[0] == RETAG:
            parts[event[1]] = event[2]
    return not {Part.ACTIVATIONS, Part.LOGITS, Part.TEMPORARIES} & set(parts.values())


def sweeps_of(events: list[Event]) -> list[list[Group]] | None:
    """The events cut into passes over all blocks, up or down, and single groups of no block; None if a pass is incomplete."""
    sweeps: list[list[Group]] = [[Group(None)]]
    for event in events:
        last = sweeps[-1][-1]
        if event[0] == BLOCK:
            if event[1] is None or last.block is None:
                sweeps.append([Group(event[1])])
            elif event[1] != last.block:
                sweeps[-1].append(Group(event[1]))
            continue
        last.events.append(event)
        if event[0] == ALLOCATE:
            last.keys.append(event[1])
    up = list(range(RECORDED))
    for sweep in sweeps:
        numbers = [group.block for group in sweep]
        if numbers not in ([None], up, up[::-1]):
            return None
    return sweeps


Births = dict[int, tuple[int, int | None, int]]


def alike(sweep: list[Group], births: Births) -> bool:
    """The two inner blocks had the same events, each seen from its own place."""
    first, second = (
        [seen_from(event, group.block, births) for event in group.events]
        for group in sweep
        if group.block in (ENDS, ENDS + 1)
    )
    return first == second


def seen_from(event: Event, block: int | None, births: Births) -> Event:
    """An event with keys and names of modules as distances from this block."""
    if event[0] in (ENTER, LOADED):
        return event
    assert block is not None
    sweep, born, place = births[event[1]]
    key = (sweep, None if born is None else born - block, place)
    if event[0] != ALLOCATE:
        return (event[0], key, *event[2:])
    return (ALLOCATE, key, event[2], event[3], moved(event[4], -block), event[5])


def moved(module: str, distance: int) -> str:
    """`model.layers.3.mlp` by some blocks."""
    return NUMBERED.sub(lambda found: f"{found[1]}{int(found[2]) + distance}", module) if module else module


def repeated(sweeps: list[list[Group]], births: Births, blocks: int) -> Iterator[Event]:
    """The events with the first inner block's as often as it takes. KeyError if a key has no block in the long model."""
    added = blocks - RECORDED
    keys: dict[tuple[int, int | None], list[int]] = {}  # (sweep, block of the long model) -> its allocations
    count = 0
    for number, sweep in enumerate(sweeps):
        for group, distance in in_long_model(sweep, added):
            place = None if group.block is None else group.block + distance
            own = keys[number, place] = list(range(count, count + len(group.keys)))
            count += len(own)
            for event in group.events:
                if event[0] in (ENTER, LOADED):
                    yield event
                    continue
                born_in, born, ordinal = births[event[1]]
                if born is not None:
                    born = long_number(born, group.block, distance, added)
                key = keys[born_in, born][ordinal]
                if event[0] == ALLOCATE:
                    yield (ALLOCATE, key, event[2], event[3], moved(event[4], distance), event[5])
                else:
                    yield (event[0], key, *event[2:])


def in_long_model(sweep: list[Group], added: int) -> Iterator[tuple[Group, int]]:
    """The groups of a pass over the long model, each with its distance from the recorded one."""
    is_down = sweep[0].block == RECORDED - 1
    for group in sweep:
        if group.block is None or group.block < ENDS:
            yield group, 0
        elif group.block >= RECORDED - ENDS:
            yield group, added
        elif group.block == ENDS:
            distances = range(added + RECORDED - 2 * ENDS)
            yield from ((group, distance) for distance in (reversed(distances) if is_down else distances))


def long_number(born: int, block: int | None, distance: int, added: int) -> int:
    """Where in the long model the block is that a group at `block` (+ distance) refers to as `born`.

    The blocks at the ends are known by their number from there, inner ones only by their distance from the one that asks.
    """
    if block is not None and ENDS <= block < RECORDED - ENDS:
        return born + distance
    if born < ENDS:
        return born
    if born >= RECORDED - ENDS:
        return born + added
    if block is None:
        raise KeyError(born)
    return born + distance
