"""Many examples in a few arrays: 5 bytes a token, where lists of Python's own numbers take about 50.

An example is made of them when it is asked for, so a step has its own rows in memory as lists, and no others.
"""

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, overload

from ftkit.core.encoding import Example


class Examples(Sequence[Example]):
    """Examples that are made when they are asked for."""

    def example(self, at: int) -> Example:
        """The one at a place from 0 on."""
        raise NotImplementedError

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...
    def __getitem__(self, at: int | slice) -> Example | list[Example]:
        places = range(len(self))[at]
        return [self.example(place) for place in places] if isinstance(places, range) else self.example(places)


class ExampleStore(Examples):
    """Examples one behind the other.

    ids: int32, counted: a byte each, of all tokens; ends: int64, where each example ends; weights: float64. Any arrays of
    these types will do, those of a file that is mapped into memory too.
    """

    def __init__(self, examples: Iterable[Example] = ()) -> None:
        self.ids: Any = array("i")
        self.counted: Any = array("b")
        self.ends: Any = array("q")
        self.weights: Any = array("d")
        for example in examples:
            self.append(example)

    @classmethod
    def of(cls, ids: Any, counted: Any, ends: Any, weights: Any) -> "ExampleStore":
        """The examples in these arrays."""
        store = cls()
        store.ids, store.counted, store.ends, store.weights = ids, counted, ends, weights
        return store

    def append(self, example: Example) -> None:
        """One more, behind the others."""
        self.ids.extend(example.ids)
        self.counted.extend(example.counted)
        self.ends.append(len(self.ids))
        self.weights.append(example.weight)

    def __len__(self) -> int:
        return len(self.ends)

    def example(self, at: int) -> Example:
        """Its tokens as lists."""
        start, end = int(self.ends[at - 1]) if at else 0, int(self.ends[at])
        counted = list(map(bool, self.counted[start:end].tolist()))
        return Example(self.ids[start:end].tolist(), counted, float(self.weights[at]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class Chosen(Examples):
    """Some of the examples of another sequence, which stay where they are. places: of each in it."""

    def __init__(self, examples: Sequence[Example], places: Iterable[int]) -> None:
        self.examples, self.places = examples, array("q", places)

    def __len__(self) -> int:
        return len(self.places)

    def example(self, at: int) -> Example:
        """The one that the place stands for."""
        return self.examples[self.places[at]]
