"""The architecture, read from the imports: arrows point down, nothing is circular, heavy libraries wait."""

import ast
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import CHECKOUT

SOURCE = CHECKOUT / "src" / "ftkit"
BELOW = {
    "entry": {"cli"},
    "cli": {"commands", "core", "io", "console", "errors", "libraries", "stopping", "package"},
    "commands": {"commands", "core", "io", "console", "errors", "faults", "libraries", "stopping", "package"},
    "core": {"core", "io", "errors", "faults", "libraries"},
    "io": {"io", "console", "errors", "faults", "libraries", "package"},
    "stopping": {"errors"},
    "faults": set(),
    "libraries": {"postponed_compiler"},
    "postponed_compiler": set(),
    "console": set(),
    "errors": set(),
    "package": set(),
}
"""What each layer may import. `io` may not use core, `core` may not speak to the user."""
RECORDS = {"records", "column_names", "template", "plain_template", "nested"}
"""Modules of io that hold the shape of records and templates and what is true of them: core may use all of them."""
LIGHT = (
    "errors",
    "console",
    "cli",
    "libraries",
    "postponed_compiler",
    "stopping",
    "core.options",
    "core.prep_settings",
    "core.model_settings",
    "core.estimate_settings",
    "core.train_settings",
    "core.eval_settings",
    "core.merge_settings",
    "core.chat_settings",
    "core.configuration",
    "core.byte_sizes",
    "core.durations",
    "core.methods",
    "io.settings_files",
)
"""Loaded for --help."""
LIGHT_LIBRARIES = {"typer", "ftkit"}


@dataclass(frozen=True)
class Import:
    """`from module import name` (name is None for `import module`), at the top of a file or inside a function."""

    importer: str
    module: str
    name: str | None
    line: int
    is_lazy: bool

    def __str__(self):
        return f"{self.importer}:{self.line} imports {self.module} {self.name or ''}".strip()


def imports_of(path):
    """Every import of a source file."""
    name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(name, alias.name, None, node.lineno, node in lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: imports are absolute"
            found += [Import(name, str(node.module), alias.name, node.lineno, node in lazy) for alias in node.names]
    return found


MODULES = {".".join(p.relative_to(SOURCE).with_suffix("").parts): p for p in sorted(SOURCE.rglob("*.py"))}
IMPORTS = [found for path in MODULES.values() for found in imports_of(path)]


def target(found):
    """The module of ours that an import loads (`core.loss`; `__init__` for the package); None for a library."""
    parts = found.module.split(".")
    if parts[0] != "ftkit":
        return None
    inner = ".".join(parts[1:])
    whole = ".".join(filter(None, (inner, found.name)))
    return whole if whole in MODULES else inner if inner in MODULES else "__init__"


def layer(module):
    """The layer of a module."""
    special = {"__init__": "package", "__main__": "entry"}
    return special.get(module, module.split(".")[0])


OURS = [(found, target(found)) for found in IMPORTS if target(found) is not None]


def test_the_reader_of_imports_sees_them():
    seen = {(found.importer, module, found.is_lazy) for found, module in OURS}
    assert ("cli", "commands.train", True) in seen and ("commands.train", "core.train_settings", False) in seen
    assert ("cli", "console", False) in seen and ("io.adapter_folder", "__init__", False) in seen
    assert any(found.module == "rich.console" and found.is_lazy for found in IMPORTS)


def test_arrows_point_down():
    wrong = [str(found) for found, module in OURS if layer(module) not in BELOW[layer(found.importer)]]
    assert not wrong, "\n".join(wrong)


def test_core_takes_only_types_and_records_from_io():
    wrong = [
        str(found)
        for found, module in OURS
        if layer(found.importer) == "core" and layer(module) == "io" and module.split(".")[1] not in RECORDS
        if not (found.name and found.name[0].isupper())
    ]
    assert not wrong, "\n".join(wrong)


def test_commands_import_their_own_parts_but_not_each_other():
    wrong = [
        str(found)
        for found, module in OURS
        if found.importer.startswith("commands.") and module.startswith("commands.")
        if not module.startswith(found.importer.split("_")[0] + "_")
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_is_its_own_ancestor():
    graph = {name: set() for name in MODULES}
    for found, module in OURS:
        if module != found.importer:
            graph[found.importer].add(module)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' <- '.join(error.args[1])}")


def test_only_the_console_knows_rich():
    users = {found.importer for found in IMPORTS if found.module.split(".")[0] == "rich"}
    assert users == {"console"}


def test_nothing_but_the_console_and_the_commands_output_prints():
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id
            assert called != "print", f"{name}:{node.lineno}: print"


def test_packages_are_empty_and_the_top_one_holds_the_version():
    for name, path in MODULES.items():
        if path.name == "__init__.py":
            body = ast.parse(path.read_text(encoding="utf-8")).body
            assert len(body) <= (2 if name == "__init__" else 0), name


@pytest.mark.parametrize("module", LIGHT)
def test_what_help_needs_imports_only_the_standard_library_and_typer(module):
    import sys

    tops = {found.module.split(".")[0] for found in IMPORTS if found.importer == module and not found.is_lazy}
    assert tops <= LIGHT_LIBRARIES | set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", LIGHT)
def test_what_help_needs_imports_of_ours_only_what_is_as_light(module):
    ours = {target for found, target in OURS if found.importer == module and not found.is_lazy}
    assert ours <= {*LIGHT, "__init__"}


def test_there_is_no_drawer_for_everything():
    assert not [name for name in MODULES if name.split(".")[-1] in ("utils", "util", "helpers", "common", "misc")]
