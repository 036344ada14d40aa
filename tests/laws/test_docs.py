"""What the pages say exists."""

from __future__ import annotations

import re
from pathlib import Path

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
def test_every_link_and_picture_of_a_page_leads_somewhere(page: Path) -> None:
    """Relative links name files of the repository."""
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_that_a_page_shows_exists(page: Path) -> None:
    """`fedface WORD [WORD]` in code is a command with that name."""
    commands = get_command(app)
    text = page.read_text(encoding="utf-8")
    code = re.findall(r"`([^`\n]+)`", text) + re.findall(
        r"^(?:    |\$ |\.venv/bin/)?(fedface .*)$", text, re.M
    )
    for line in code:
        for words in re.findall(r"(?:^|/)fedface ([a-z][a-z-]*(?: [a-z][a-z-]*)?)", line):
            group, _, command = words.partition(" ")
            inner = commands.commands.get(group)  # type: ignore[attr-defined]
            assert inner is not None, f"fedface {group}"
            assert not command or not hasattr(inner, "commands") or command in inner.commands, (
                f"fedface {words}"
            )


def test_the_architecture_page_names_every_room() -> None:
    """Each module of the library stands in the picture, by its file's name."""
    picture = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    modules = [path for path in (ROOT / "fedface").rglob("*.py") if path.stem not in ("__init__", "__main__")]
    missing = [str(path.relative_to(ROOT)) for path in modules if not re.search(rf"\b{path.stem}\b", picture)]
    assert missing == []
