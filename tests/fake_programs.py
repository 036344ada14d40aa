"""Programs of the system for tests of services: each notes its arguments and succeeds, or fails with a sentence."""

from __future__ import annotations

from pathlib import Path

SCRIPT = """#!/bin/sh
printf '%s\\n' "NAME $*" >> "CALLS"
END
"""


def fake_programs(folder: Path, *names: str, fails: bool = False) -> Path:
    """A folder for the search path with such programs; they add a line for each call to the file `calls` in it."""
    folder.mkdir(exist_ok=True)
    end = "echo no bus >&2; exit 1" if fails else "exit 0"
    for name in names:
        script = SCRIPT.replace("NAME", name).replace("CALLS", str(folder / "calls")).replace("END", end)
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return folder
