"""Imports go down the floors of the house, never up, never in a circle, never relative, never hidden."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "fedface"
FLOORS = {
    "fedface": 0, "errors": 1, "tensor_types": 1, "randomness": 1, "config": 1, "codec": 1, "validation": 1,
    "privacy_units": 1, "atomic_io": 1,
    "models": 2, "upsampling": 2, "importing": 2,
    "privacy": 3, "photos": 3, "synthetic": 3,
    "aggregation": 4, "training": 4,
    "audits": 5,
    "experiment": 6, "sweep": 6, "reports": 6, "messages": 6,
    "inference": 7, "device": 7, "simulation": 8, "transport": 8, "coordinator": 8, "web": 8,
    "cli": 9,
}  # fmt: skip
STRANGERS = [
    ("privacy", "photos"),
    ("aggregation", "training"),
    ("models", "photos"),
    ("web", "coordinator"),
    ("device", "coordinator"),
    ("device", "simulation"),
]  # neither knows the other
STANDS_ON = {
    ("upsampling", "models"),
    ("sweep", "experiment"),
    ("importing", "models"),
    ("synthetic", "photos"),
}  # the pairs on a floor with a direction


def room(module: str) -> str:
    """`fedface.photos.scan` -> "photos"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def imports_of(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    """Every import, also inside functions."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def named(tree: ast.Module, modules: set[str]) -> set[str]:
    """The modules of ours that a file imports; `from fedface.photos import scan` names fedface.photos.scan."""
    found = set()
    for node in imports_of(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            found |= submodules or {node.module}
    return {name for name in found if name.split(".")[0] == "fedface"}


def read_house() -> tuple[dict[str, ast.Module], dict[str, set[str]]]:
    """Every file's tree by module name, and what each imports of ours."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("fedface", *path.relative_to(PACKAGE).with_suffix("").parts)
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return trees, {name: named(tree, set(trees)) for name, tree in trees.items()}


TREES, IMPORTS = read_house()


def test_every_room_has_a_floor() -> None:
    """A new room is a decision: give it a place in FLOORS and in docs."""
    assert {room(module) for module in TREES} <= set(FLOORS)
    assert len(TREES) > 40


def test_imports_go_down() -> None:
    """A room imports lower floors, itself, and on its own floor only what it stands on."""
    wrong = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if room(module) != room(other)
        and FLOORS[room(other)] >= FLOORS[room(module)]
        and FLOORS[room(module)] > 1
        and (room(module), room(other)) not in STANDS_ON
        and not {room(module), room(other)} <= {"experiment", "reports"}
    ]
    assert wrong == []


def test_the_ground_floor_stands_on_itself_alone() -> None:
    """errors, shapes, randomness and config know no other room."""
    for module, others in IMPORTS.items():
        if FLOORS[room(module)] <= 1:
            assert {FLOORS[room(other)] for other in others} <= {1}, module


def test_strangers_do_not_know_each_other() -> None:
    """Photos know no models and no privacy; training knows no aggregation, and the other way round."""
    for one, other in STRANGERS:
        for module, others in IMPORTS.items():
            known = {room(name) for name in others}
            assert not (room(module) == one and other in known), module
            assert not (room(module) == other and one in known), module


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle in a graph, or nothing."""
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


def test_no_import_goes_in_a_circle() -> None:
    """Between files, not only between rooms; and the search finds a planted circle."""
    assert circle(IMPORTS) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c"]


def test_no_import_is_relative_or_hidden() -> None:
    """Neither `from . import x` nor `if TYPE_CHECKING:`."""
    for module, tree in TREES.items():
        assert not any(isinstance(node, ast.ImportFrom) and node.level for node in imports_of(tree)), module
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert "TYPE_CHECKING" not in names, module


def test_nothing_private_crosses_between_files() -> None:
    """What begins with an underscore stays in its file."""
    for module, tree in TREES.items():
        for node in imports_of(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedface"):
                assert not [alias.name for alias in node.names if alias.name.startswith("_")], module


@pytest.mark.parametrize("word", ["utils", "helpers", "common", "manager", "misc"])
def test_no_room_has_a_name_that_says_nothing(word: str) -> None:
    """Names are nouns of the domain."""
    assert not [module for module in TREES if word in module.split(".")]


def test_the_whole_library_says_what_each_file_is_for() -> None:
    """A file opens with a docstring."""
    assert not [module for module, tree in TREES.items() if not ast.get_docstring(tree)]
