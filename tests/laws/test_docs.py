"""What the documentation names exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from typer.main import get_command

from fedface.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs").glob("*.md"),
    ROOT / "server/README.md",
    ROOT / "clients/README.md",
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_picture_of_a_page_exists(page: Path) -> None:
    """Relative links name files of the repository."""
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_heading_that_a_link_names_exists(page: Path) -> None:
    """On its own page or another, by GitHub's anchors: letters, digits and hyphens of the heading, in lower case."""
    links = re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for target, anchor in links:
        text = (page.parent / target if target else page).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.+)$", text, re.M)
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in anchors, (target, anchor)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    """The file, and the function where one is named."""
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text(encoding="utf-8"))
    missing = [
        (file, test)
        for file, test in named
        if not (ROOT / file).is_file()
        or (test and f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8"))
    ]
    assert missing == []


def test_every_threat_names_its_test() -> None:
    """Or "none", where nothing prevents it."""
    table = (ROOT / "docs/threats.md").read_text(encoding="utf-8").split("\n\n")[2]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]
    assert len(rows) > 20 and [row for row in rows if len(row) != 4] == []
    assert [row[:2] for row in rows if not re.match(r"none$|`tests/", row[3])] == []


def shown_commands(text: str) -> list[str]:
    """Every `fedface ...` line of code: inline code, and lines of code blocks with continued lines joined."""
    text = text.replace("\\\n", " ")
    inline = re.findall(r"`(?:\.venv/bin/)?(fedface [^`\n]+)`", text)
    blocks = re.findall(r"^(?:    |\$ )?(?:\.venv/bin/)?(fedface .*)$", text, re.M)
    return [line for line in inline + blocks if not line.startswith("fedface: ")]


def check_command(line: str) -> None:
    """Raises unless a command line has an existing command and only its options; values are not checked."""
    words = shlex.split(line, comments=True)[1:]
    command: click.Command = get_command(app)
    while isinstance(command, click.Group) and words and words[0].islower() and words[0][0] != "-":
        assert words[0] in command.commands, line
        command = command.commands[words.pop(0)]
    options = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)} | {
        "--help"
    }
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in options]
    assert unknown == [], line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_that_a_page_shows_exists(page: Path) -> None:
    """With all its options."""
    for line in shown_commands(page.read_text(encoding="utf-8")):
        check_command(line)


def all_commands() -> dict[str, click.Command]:
    """Every command of the command line by its words."""
    found: dict[str, click.Command] = {}

    def walk(group: click.Group, words: tuple[str, ...]) -> None:
        for name, command in group.commands.items():
            if isinstance(command, click.Group):
                walk(command, (*words, name))
            else:
                found[" ".join((*words, name))] = command

    root = get_command(app)
    assert isinstance(root, click.Group)
    walk(root, ())
    return found


@pytest.mark.parametrize("name", all_commands())
def test_every_command_shows_one_example_in_its_help(name: str) -> None:
    """The example is a command line of that command; every argument and option is explained."""
    command = all_commands()[name]
    assert command.epilog is not None and command.epilog.count("fedface ") == 1
    example = command.epilog.splitlines()[-1].strip()
    assert example.startswith(f"fedface {name}")
    check_command(example)
    assert command.help and not [param.name for param in command.params if not getattr(param, "help", None)]


def test_help_loads_no_large_library() -> None:
    """Declaring all commands and printing each one's help imports neither torch nor what builds on it."""
    script = """
import sys
import click
from typer.main import get_command
from fedface.cli import app

def walk(command, context):
    command.get_help(context)
    for inner in getattr(command, "commands", {}).values():
        walk(inner, click.Context(inner, parent=context))

command = get_command(app)
walk(command, click.Context(command))
print(*{name.split(".")[0] for name in sys.modules})
"""
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    heavy = {
        "torch",
        "flwr",
        "opacus",
        "numpy",
        "scipy",
        "matplotlib",
        "fastapi",
        "tenseal",
        "dp_accounting",
        "PIL",
    }
    assert not heavy & set(run.stdout.split())


def test_the_architecture_page_names_every_module() -> None:
    """Each by its file's name, in the table of layers."""
    picture = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    modules = [path for path in (ROOT / "fedface").rglob("*.py") if path.stem not in ("__init__", "__main__")]
    missing = [str(path.relative_to(ROOT)) for path in modules if not re.search(rf"\b{path.stem}\b", picture)]
    assert missing == []
