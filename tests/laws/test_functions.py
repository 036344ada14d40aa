"""A function has at most seven parameters; more should be a type."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAX_PARAMETERS = 7


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The names of its parameters, without self and cls."""
    given = function.args
    named = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    rest = [each.arg for each in (given.vararg, given.kwarg) if each is not None]
    return [name for name in (*named, *rest) if name not in ("self", "cls")]


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether it is a command of the command line, whose parameters are its options."""
    given = function.args
    return any("typer." in ast.unparse(each.annotation) for each in given.args if each.annotation)


def too_many(tree: ast.Module) -> list[str]:
    """The functions of a file with more than seven parameters, commands aside; methods with their class."""
    inside = {
        id(member): f"{node.name}."
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for member in node.body
    }
    return [
        f"{inside.get(id(node), '')}{node.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and len(parameters(node)) > MAX_PARAMETERS
        and not is_command(node)
    ]


def test_no_function_has_more_than_seven_parameters() -> None:
    """The search finds a planted one, and lets a command pass."""
    assert too_many(ast.parse("class A:\n def f(self, a, b, c, d, e, f, g, *h): ...")) == ["A.f"]
    assert not too_many(ast.parse("def f(self, a, b, c, d, e, f, *, g): ..."))
    assert not too_many(ast.parse("def f(a: typer.Option(), b, c, d, e, f, g, h): ..."))
    paths = [
        path for folder in ("fedface", "clients", "server") for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    found = {name for path in paths for name in too_many(ast.parse(path.read_text(encoding="utf-8")))}
    assert found == set()
