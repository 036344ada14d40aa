"""What is installed and what is sent: the wheel contains only fedface/, and the server bundle never does."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from pathlib import Path

from setuptools import find_packages

ROOT = Path(__file__).resolve().parents[2]
with (ROOT / "pyproject.toml").open("rb") as _file:
    PROJECT = tomllib.load(_file)


def test_the_wheel_holds_fedface_alone() -> None:
    """Neither tests nor the two apps become importable by an installation."""
    found = find_packages(str(ROOT), **PROJECT["tool"]["setuptools"]["packages"]["find"])
    rooms = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for path in ROOT.glob("fedface/**/__init__.py")
    }
    assert set(found) == rooms
    assert {name.split(".")[0] for name in found} == {"fedface"}


def test_every_folder_with_code_is_a_package() -> None:
    """A folder without __init__.py would be missing from the wheel."""
    folders = {path.parent for path in (ROOT / "fedface").rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_what_is_read_at_run_time_is_in_the_wheel() -> None:
    """Every file of fedface/ that is not Python is listed in package-data: checkpoint, template, py.typed."""
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["fedface"]
    package = ROOT / "fedface"
    others = [
        path.relative_to(package).as_posix()
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and "__pycache__" not in path.parts
    ]
    assert "models/weights/gan32.safetensors" in others
    missing = [name for name in others if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    assert missing == []


def test_the_command_is_installed() -> None:
    """`fedface` calls fedface.cli.main."""
    from fedface import cli

    assert PROJECT["project"]["scripts"] == {"fedface": "fedface.cli:main"}
    assert callable(cli.main)


def test_the_servers_bundle_does_not_contain_fedface() -> None:
    """A device runs the fedface that its owner installed, never one that the server sent."""
    app = PROJECT["tool"]["flwr"]["app"]
    assert not [pattern for pattern in app["fab-include"] if pattern.startswith(("fedface", "*", "/", "."))]
    for path in ("clients/app.py", "server/app.py", app["config"]["experiment"]):
        assert any(fnmatch.fnmatch(path, pattern) for pattern in app["fab-include"]), path
        assert (ROOT / path).is_file()


def test_every_foreign_library_is_declared() -> None:
    """Everything that fedface imports is a dependency of the project."""
    project = PROJECT["project"]
    extras = (project["optional-dependencies"][extra] for extra in ("reports", "web", "yunet"))
    declared = {
        re.split(r"[\[=<>]", name)[0].strip().lower().replace("-", "_")
        for name in [*project["dependencies"], *(name for extra in extras for name in extra)]
    }
    for expected in (
        "cryptography", "dlib_bin", "dp_accounting", "fastapi", "flwr", "jaxtyping", "jinja2", "matplotlib", "numpy",
        "opacus", "pillow", "pillow_heif", "pyyaml", "rich", "safetensors", "scikit_image", "scipy", "tenseal", "torch",
        "typer", "uvicorn", "opencv_python_headless",
    ):  # fmt: skip
        assert expected in declared
