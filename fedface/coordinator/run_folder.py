"""Which folder a run, a ranking or a comparison has: a new one, or the one to continue."""

from __future__ import annotations

import re
from pathlib import Path

from fedface.errors import RunError
from fedface.experiment import devices_folder

RUNS = Path("runs")  # in the folder where the command was given


def new_folder(name: str, out: Path | None) -> Path:
    """The folder for a new run: `out`, or the first of runs/NAME, runs/NAME-2, ... that does not exist.

    Raises:
        RunError: There are keys and ledgers of an earlier run of this folder, whose run is not there.
    """
    if out is not None:
        folder = _named(out)
        if devices_folder(folder).exists() and not (folder.is_dir() and any(folder.iterdir())):
            raise RunError(
                f"{devices_folder(folder)}: belongs to an earlier run; remove it, or choose another folder"
            )
        return folder
    folder, number = RUNS / name, 1
    while folder.exists() or devices_folder(folder).exists():
        number += 1
        folder = RUNS / f"{name}-{number}"
    return folder


def resume_ranking(name: str, out: Path | None) -> Path:
    """The folder of the ranking to continue: `out`, or the latest unfinished one of this name.

    Raises:
        RunError: There is none.
    """
    return _unfinished(name, out, "metrics.json", "ranking.json")


def resume_run(name: str, out: Path | None) -> Path:
    """The folder of the run to continue: `out`, or the latest unfinished one of this name.

    Raises:
        RunError: There is none.
    """
    if out is not None and (out / "state.json").exists() and (out / "run.json").exists():
        raise RunError(f"{out}: this run is finished; `fedface report {out}` writes its pages anew")
    return _unfinished(name, out, "state.json", "run.json")


def _unfinished(name: str, out: Path | None, started_file: str, done_file: str) -> Path:
    if out is not None:
        if not (out / started_file).exists():
            raise RunError(f"{out}: there is no run to resume here")
        if (out / done_file).exists():
            raise RunError(f"{out}: it is finished and cannot be resumed")
        return _named(out)
    mine = re.compile(re.escape(name) + r"(-\d+)?")
    started = sorted(
        (path.parent for path in RUNS.glob(f"*/{started_file}") if mine.fullmatch(path.parent.name)),
        key=lambda path: path.stat().st_mtime,
    )
    unfinished = [path for path in started if not (path / done_file).exists()]
    if not unfinished:
        raise RunError(f"no unfinished run of {name} in {RUNS}; omit --resume to start one")
    return unfinished[-1]


def resume_comparison(name: str, out: Path | None) -> Path:
    """The folder of the comparison to continue: `out`, or the latest of this name.

    Raises:
        RunError: There is none.
    """
    if out is not None:
        if not (out / "runs").is_dir():
            raise RunError(f"{out}: there is no comparison to resume here")
        return _named(out)
    mine = re.compile(re.escape(name) + r"(-\d+)?")
    started = [path.parent for path in RUNS.glob("*/runs") if mine.fullmatch(path.parent.name)]
    if not started:
        raise RunError(f"no comparison of {name} in {RUNS}; omit --resume to start one")
    return max(started, key=lambda path: path.stat().st_mtime)


def _named(folder: Path) -> Path:
    """An absolute path, because the folder's name is the run's name and "." has none."""
    named = folder if folder.name not in ("", "..") else folder.resolve()
    if not named.name:
        raise RunError(f"{folder}: is the root of a disk; name a folder in it")
    return named
