"""Each foreign library is imported by one module or package; banned functions are not used."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOWER = {
    "fedface/transport/wire.py", "fedface/transport/client.py", "fedface/transport/server.py",
    "fedface/transport/executor.py", "fedface/simulation/in_process.py", "clients/app.py", "fedface/server_app.py",
}  # fmt: skip
DOORS = {
    "opacus": {"fedface/training/dp_sgd.py"},
    "tenseal": {"fedface/aggregation/homomorphic.py"},
    "flwr": FLOWER,
    "dp_accounting": {f"fedface/privacy/{name}.py" for name in ("accounting", "mechanism", "releases")},
    "yaml": {"fedface/config.py"},
    "typer": {"fedface/cli/**"},
    "safetensors": {"fedface/models/checkpoint.py"},
    "PIL": {"fedface/photos/image_io.py", "fedface/upsampling/jpeg.py"},
    "pillow_heif": {"fedface/photos/image_io.py"},
    "cv2": {"fedface/photos/detectors.py", "fedface/audits/feature_extractors.py"},
    "fastapi": {"fedface/web/app.py", "fedface/web/server.py"},
    "starlette": {"fedface/web/app.py"},
    "uvicorn": {"fedface/web/server.py"},
    "psutil": {
        "fedface/privacy/participation_conditions.py", "fedface/reports/run_record.py",
        "fedface/transport/worker.py",
    },
    "dlib": {"fedface/photos/detectors.py"},
    "_dlib_pybind11": {"fedface/photos/detectors.py"},
    "face_recognition_models": {"fedface/photos/detectors.py"},
}  # fmt: skip
FREE = {
    "cryptography", "jaxtyping", "jinja2", "markupsafe", "matplotlib", "numpy", "rich", "scipy", "skimage", "torch",
    "ray", "segno",
}  # fmt: skip
OURS = {"fedface", "clients", "server"}
BANNED = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "shelve",
    "marshal",
    "joblib",
    "torchvision",
    "requests",
}
BANNED_CALLS = {
    "torch.load",
    "torch.manual_seed",
    "np.random.seed",
    "numpy.random.seed",
    "random.seed",
    "eval",
    "exec",
}


def trees() -> dict[str, ast.Module]:
    """Every file of the library and its two apps, by path from the root."""
    paths = [path for part in sorted(OURS) for path in sorted((ROOT / part).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


TREES = trees()


def foreign(tree: ast.Module) -> set[str]:
    """Top-level names of imported third-party modules, also inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found - OURS


def through(path: str, doors: set[str]) -> bool:
    """Whether a file is one of these modules, or in one of these packages."""
    return any(path == door or (door.endswith("/**") and path.startswith(door[:-2])) for door in doors)


def users(library: str) -> set[str]:
    """The files that import a library."""
    return {path for path, tree in TREES.items() if library in foreign(tree)}


@pytest.mark.parametrize("library", sorted(DOORS))
def test_a_library_is_imported_only_where_allowed(library: str) -> None:
    """Elsewhere, call a function of that module."""
    assert not [path for path in users(library) if not through(path, DOORS[library])]


@pytest.mark.parametrize(
    "library",
    ["opacus", "tenseal", "flwr", "dp_accounting", "yaml", "typer", "safetensors", "PIL", "fastapi", "uvicorn"],
)  # fmt: skip
def test_every_allowed_import_is_used(library: str) -> None:
    """An unused exception is removed."""
    assert users(library)


def test_no_other_library_is_imported() -> None:
    """A new dependency must be listed here."""
    known = set(DOORS) | FREE | set(sys.stdlib_module_names)
    assert {name for tree in TREES.values() for name in foreign(tree)} - known == set()


def test_nothing_unpickles_or_downloads() -> None:
    """Unpickling executes code."""
    assert not [path for path, tree in TREES.items() if (foreign(tree)) & BANNED]


def calls(tree: ast.Module) -> set[str]:
    """The dotted names of everything that is called."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_nothing_seeds_globally_or_evaluates_text() -> None:
    """Randomness is an argument with a name; text is never executed. The search finds a planted call."""
    assert calls(ast.parse("torch.manual_seed(3)")) & BANNED_CALLS
    assert {path: found for path, tree in TREES.items() if (found := calls(tree) & BANNED_CALLS)} == {}


def test_nothing_samples_from_a_global_generator() -> None:
    """torch.rand, randn, randint and randperm get a generator wherever one can be passed."""
    silent = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {
                "torch.rand", "torch.randn", "torch.randint", "torch.randperm", "torch.multinomial",
            }:  # fmt: skip
                if "generator" not in {keyword.arg for keyword in node.keywords}:
                    silent.append(f"{path}:{node.lineno}")
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(
                ("np.random.rand", "random.random")
            ):
                silent.append(f"{path}:{node.lineno}")
    assert silent == []


def test_ruff_has_the_same_rules() -> None:
    """Its banned-api lists each library."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        rules = tomllib.load(file)["tool"]["ruff"]["lint"]
    banned = set(rules["flake8-tidy-imports"]["banned-api"])
    assert {"opacus", "tenseal", "flwr", "dp_accounting", "yaml", "typer", "safetensors", "PIL"} <= banned
    assert {"fastapi", "starlette", "uvicorn"} <= banned
    let_through = {path for path, codes in rules["per-file-ignores"].items() if "TID251" in codes}
    doors = {path for library in banned & set(DOORS) for path in DOORS[library]}
    assert {path for path in let_through if path.startswith("fedface/")} <= doors


@pytest.mark.parametrize("name", ["safe_pickle", "torch_archive", "foreign_checkpoint"])
def test_the_pickle_reader_cannot_execute(name: str) -> None:
    """No import by name and no attribute by name, so it cannot call what a file names."""
    tree = TREES[f"fedface/importing/{name}.py"]
    ways = {
        "getattr", "setattr", "delattr", "__import__", "import_module", "eval", "exec", "compile", "globals", "vars",
        "__dict__", "__globals__", "__builtins__", "find_class", "Unpickler", "allow_pickle", "modules",
    }  # fmt: skip
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    named |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    named |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg}
    assert named & ways == set()
    imported = {
        alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert imported <= {"io", "math", "mmap", "pickletools", "struct", "zipfile", "numpy", "torch"}
