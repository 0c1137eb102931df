"""PyTorch's compiler (`torch._dynamo`), loaded when something compiles and not before: it takes a second and a half.

transformers marks functions for it while it is imported, and optimizers tell it at each step where to stop. Neither means
anything as long as nothing is compiled. A stand-in takes such calls; whatever else is asked of it, it loads the compiler
and hands over what it was told.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, spec_from_loader
from types import ModuleType
from typing import Any

NAME = "torch._dynamo"
ALONE = f"{NAME}._trace_wrapped_higher_order_op"
"""The one part that transformers imports, which needs nothing of the rest."""


def postpone_compiler() -> None:
    """Put the stand-in where `import torch._dynamo` finds it, unless the compiler is loaded already."""
    import torch  # noqa: F401  # find_spec would load it

    spec = find_spec(NAME) if NAME not in sys.modules else None
    if spec is None or not spec.submodule_search_locations:
        return
    stand_in = PostponedCompiler(NAME)
    stand_in.__path__ = list(spec.submodule_search_locations)
    sys.modules[NAME] = stand_in
    sys.meta_path.insert(0, PartsFinder())


class PostponedCompiler(ModuleType):
    """What the compiler is until it is needed."""

    def __init__(self, name: str) -> None:
        super().__init__(name, __doc__)
        self.marked: list[tuple[str, Callable[..., Any]]] = []

    def disable(self, fn: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
        """Functions that must not be compiled: as they are, nothing is."""
        return (lambda function: function) if fn is None else fn

    def graph_break(self, *_: Any, **__: Any) -> None:
        """Where a compiled part would end."""

    def assume_constant_result(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """A decorator that the compiler is told of later."""
        self.marked.append(("assume_constant_result", fn))
        return fn

    def allow_in_graph(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Likewise."""
        self.marked.append(("allow_in_graph", fn))
        return fn

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(load_compiler(), name)


def load_compiler() -> ModuleType:
    """The compiler itself; a stand-in's marks are handed over."""
    stand_in = sys.modules.get(NAME)
    if not isinstance(stand_in, PostponedCompiler):
        return import_module(NAME)
    del sys.modules[NAME]
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, PartsFinder)]
    compiler = import_module(NAME)
    for mark, function in stand_in.marked:
        getattr(compiler, mark)(function)
    return compiler


class PartsFinder(MetaPathFinder):
    """Who imports a part of the compiler gets all of it first, as its parts import each other in that order."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """None for whatever is not the compiler's."""
        if not name.startswith(f"{NAME}.") or name == ALONE:
            return None
        load_compiler()
        return spec_from_loader(name, LoadedAlready()) if name in sys.modules else PathFinder.find_spec(name, path)


class LoadedAlready(Loader):
    """Of a part that came with the whole."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module that is there."""
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """It has run."""
