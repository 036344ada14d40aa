"""Files are written through fedface/atomic_io.py alone, so that no file of another program is ever overwritten."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOOR = "fedface/atomic_io.py"
# Each writes what no user names, or checks by itself whose file it is.
EXCEPTIONS = {
    "fedface/privacy/hash_chain.py": "an SQLite file that is known by its application id, and the head beside it",
    "fedface/photos/photo_index.py": "an SQLite file that is known by its application id",
    "fedface/photos/sandboxed_decoder.py": "a pipe",
    "fedface/cli/child_processes.py": "the output of a program, in the folder of a device's state or of a server",
    "fedface/cli/console.py": "standard output after its reader has closed it",
    "fedface/aggregation/homomorphic.py": "a file in memory",
    "fedface/platforms.py": "an empty file, by which Windows locks a folder",
}
WRITING_FLAGS = {"O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC", "O_APPEND"}
WRITERS = {
    "write_text", "write_bytes", "touch", "rename", "renames", "link", "symlink", "hardlink_to", "symlink_to",
    "copyfile", "copy", "copy2", "copytree", "move", "rmtree", "mkstemp", "NamedTemporaryFile", "TemporaryFile",
    "savez", "savetxt", "tofile", "save_file", "savefig",
}  # fmt: skip
OF_FILES = {"os", "shutil", "tempfile", "path", "np", "numpy", "sqlite3"}


def writes(tree: ast.Module) -> set[int]:
    """The lines that open a file for writing, rename or link one, or open a database."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in WRITING_FLAGS:
            found.add(node.lineno)
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        last = name.rpartition(".")[2]
        if last in ("open", "fdopen"):
            modes = [part.value for part in [*node.args, *(k.value for k in node.keywords)]
                     if isinstance(part, ast.Constant) and isinstance(part.value, str)]  # fmt: skip
            if any(set(mode) & set("wax+") and set(mode) <= set("rwaxbt+") for mode in modes):
                found.add(node.lineno)
        if name in ("os.replace", "sqlite3.connect", "shutil.copy", "shutil.move") or (
            last in WRITERS - {"copy", "move", "link", "savefig"}
        ):
            found.add(node.lineno)
        if last == "savefig" and ast.unparse(node.args[0]) != "target":  # `target` is a buffer
            found.add(node.lineno)
    return found


@pytest.mark.parametrize(
    "line",
    [
        'open("a", "w")', 'path.open(mode="xb")', 'os.open(path, os.O_RDWR)', "path.write_text(words)",
        "os.replace(a, b)", "sqlite3.connect(path)", "shutil.copyfile(a, b)", 'os.fdopen(1, "wb")', "path.rename(b)",
        "figure.savefig(path)",
    ],
)  # fmt: skip
def test_the_search_finds_a_planted_line(line: str) -> None:
    assert writes(ast.parse(line)) == {1}
    assert (
        writes(ast.parse('path.open("rb"); open(a); text.replace("a", "w"); os.open(path, os.O_RDONLY)'))
        == set()
    )


def test_only_the_door_opens_files_for_writing() -> None:
    """An exception that no longer writes is a mistake in this file."""
    paths = [
        path for part in ("fedface", "clients", "server") for path in sorted((ROOT / part).rglob("*.py"))
    ]
    found = {
        path.relative_to(ROOT).as_posix(): sorted(lines)
        for path in paths
        if (lines := writes(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert DOOR in found
    assert set(found) - {DOOR} == set(EXCEPTIONS)
