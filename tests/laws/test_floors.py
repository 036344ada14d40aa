"""Imports follow the layers of docs/architecture.md: never up, never in a cycle, never relative, never hidden."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "fedface"
LAYERS = {
    "fedface": 0,
    "errors": 1, "tensor_types": 1, "randomness": 1, "config": 1, "codec": 1, "validation": 1, "privacy_units": 1,
    "measurements": 1, "number_format": 1,
    "atomic_io": 1, "platforms": 1, "text": 1, "sandbox": 1,
    "models": 2, "upsampling": 2, "importing": 2,
    "privacy": 3, "photos": 3, "synthetic": 3,
    "aggregation": 4, "training": 4,
    "audits": 5,
    "messages": 6, "experiment": 6, "sweep": 6, "reports": 6,
    "device": 7, "inference": 7, "public_data": 7,
    "transport": 8, "coordinator": 8, "web": 8,
    "simulation": 9, "server_app": 9,
    "cli": 10,
}  # fmt: skip
WITHIN_A_LAYER = {
    ("upsampling", "models"),
    ("importing", "models"),
    ("synthetic", "photos"),
    ("sweep", "experiment"),
    ("reports", "experiment"),
    ("server_app", "simulation"),
}  # the only imports between packages of one layer
INDEPENDENT = [
    ("privacy", "photos"),
    ("aggregation", "training"),
    ("models", "photos"),
    ("messages", "reports"),
    ("device", "reports"),
    ("device", "experiment"),
    ("coordinator", "device"),
    ("coordinator", "transport"),
    ("coordinator", "simulation"),
    ("web", "coordinator"),
    ("web", "device"),
    ("inference", "device"),
]  # pairs that do not import each other, in either direction
DEVICE_ROOTS = (
    "fedface.device.client",
    "fedface.device.device",
    "fedface.transport.client",
    "fedface.transport.executor",
    "fedface.transport.worker",
)
NOT_ON_A_DEVICE = {
    "experiment", "sweep", "reports", "inference", "web", "public_data", "coordinator", "simulation",
    "server_app", "cli", "importing",
}  # fmt: skip
# fastapi is missing here because Flower's client of the SuperNode loads it.
FOREIGN_NOT_ON_A_DEVICE = {"ray", "matplotlib", "uvicorn", "jinja2"}


def package_of(module: str) -> str:
    """The package, or the root module: `fedface.photos.scan` -> "photos"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def imports_of(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    """Every import, also inside functions."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def named(tree: ast.Module, modules: set[str]) -> set[str]:
    """The modules of fedface that a file imports; `from fedface.photos import scan` names fedface.photos.scan."""
    found = set()
    for node in imports_of(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            found |= submodules or {node.module}
    return {name for name in found if name.split(".")[0] == "fedface"}


def read_modules() -> tuple[dict[str, ast.Module], dict[str, set[str]]]:
    """Every module's syntax tree by name, and its imports of fedface."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("fedface", *path.relative_to(PACKAGE).with_suffix("").parts)
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return trees, {name: named(tree, set(trees)) for name, tree in trees.items()}


TREES, IMPORTS = read_modules()


def test_every_package_has_a_layer() -> None:
    """A new package needs a place in LAYERS and in docs/architecture.md."""
    assert {package_of(module) for module in TREES} <= set(LAYERS)


def test_imports_go_down() -> None:
    """A package imports lower layers and itself; within its own layer only what WITHIN_A_LAYER names."""
    wrong = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if (own := package_of(module)) != (its := package_of(other))
        and LAYERS[its] >= LAYERS[own]
        and LAYERS[own] > 1
        and (own, its) not in WITHIN_A_LAYER
    ]
    assert wrong == []


def test_every_import_within_a_layer_is_used() -> None:
    """An unused exception is removed."""
    used = {(package_of(module), package_of(other)) for module, others in IMPORTS.items() for other in others}
    assert set(WITHIN_A_LAYER) <= used


def test_the_lowest_layer_imports_only_itself() -> None:
    """errors, tensor_types, randomness, config and the like import no package."""
    for module, others in IMPORTS.items():
        if LAYERS[package_of(module)] <= 1:
            assert {LAYERS[package_of(other)] for other in others} <= {1}, module


@pytest.mark.parametrize(("one", "other"), INDEPENDENT)
def test_independent_packages_do_not_import_each_other(one: str, other: str) -> None:
    """In particular, device and coordinator share only messages."""
    arrows = {
        f"{module} imports {name}"
        for module, others in IMPORTS.items()
        for name in others
        if {package_of(module), package_of(name)} == {one, other}
    }
    assert arrows == set()


def reached(roots: Iterable[str]) -> set[str]:
    """Every module of ours that these import, directly or through others, themselves included."""
    found: set[str] = set()
    left = list(roots)
    while left:
        if (module := left.pop()) not in found:
            found.add(module)
            left += IMPORTS.get(module, set())
    return found


def test_a_device_imports_nothing_of_the_server() -> None:
    """Read from the source, function-level imports included."""
    assert {package_of(module) for module in reached(DEVICE_ROOTS)} & NOT_ON_A_DEVICE == set()


def test_the_architecture_page_lists_what_a_device_imports() -> None:
    """The packages, root modules aside, on one indented line."""
    page = (PACKAGE.parent / "docs/architecture.md").read_text(encoding="utf-8")
    packages = sorted(
        {package_of(module) for module in reached(DEVICE_ROOTS) if LAYERS[package_of(module)] > 1}
    )
    assert f"\n    {' '.join(packages)}\n" in page


def test_a_device_process_loads_nothing_of_the_server() -> None:
    """Measured in a fresh interpreter: no package of the server, and no Ray, web server or plotting library."""
    program = f"import sys\nfor name in {DEVICE_ROOTS!r}: __import__(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert {package_of(name) for name in loaded if name.startswith("fedface.")} & NOT_ON_A_DEVICE == set()
    assert {name.split(".")[0] for name in loaded} & FOREIGN_NOT_ON_A_DEVICE == set()


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """One cycle in a graph, or nothing."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return []
        for after in sorted(graph.get(node, ())):
            if found := walk(after, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := walk(node, []))), [])


def test_no_import_goes_in_a_cycle() -> None:
    """Between files, not only between packages; and the search finds a planted cycle."""
    assert cycle(IMPORTS) == []
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c"]


def test_no_import_is_relative_or_hidden() -> None:
    """Neither `from . import x` nor `if TYPE_CHECKING:`."""
    for module, tree in TREES.items():
        assert not any(isinstance(node, ast.ImportFrom) and node.level for node in imports_of(tree)), module
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert "TYPE_CHECKING" not in names, module


def test_private_names_stay_in_their_file() -> None:
    """Names that begin with an underscore."""
    for module, tree in TREES.items():
        for node in imports_of(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedface"):
                assert not [alias.name for alias in node.names if alias.name.startswith("_")], module


@pytest.mark.parametrize("word", ["utils", "helpers", "common", "manager", "misc"])
def test_no_package_has_a_meaningless_name(word: str) -> None:
    """Names are nouns of the domain."""
    assert not [module for module in TREES if word in module.split(".")]


def test_every_module_has_a_docstring() -> None:
    """If it defines something."""
    assert not [module for module, tree in TREES.items() if tree.body and not ast.get_docstring(tree)]
