"""What the config of a Flower run asks for: which experiment, with which changes, and where its folder is.

Called by transport/flower.py (pretended devices) and server/app.py, which agree on the folder without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fedface.errors import ConfigError
from fedface.experiment import Experiment, for_ranking, read_experiment

DEFAULT_RUNS = Path.home() / "fedface-runs"  # where runs go that were not told where


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the config of a Flower run asks for."""

    experiment: Experiment
    folder: Path  # of this run
    candidates: tuple[str, ...] = ()  # of a tournament; none: a run that trains


def devices_folder(run: Path) -> Path:
    """Where pretended devices keep their ledgers and keys, within a run's folder."""
    return run / "devices"


def read_run_config(config: Mapping[str, object], home: Path) -> RunConfig:
    """Read a run's config: `experiment` (within the app, or absolute), `folder`, `photos`, `changes`, `candidates`.

    With `candidates`, files of weights or the word "base" separated by semicolons, it is a tournament. The folder is
    the first of NAME, NAME-2, ... in `folder` that holds no finished run: server and pretended devices agree on it
    without a word, and a run that was cut short goes on.

    Raises:
        ConfigError: An entry is missing or wrong, or the experiment cannot be read.
    """
    words = {}
    for key in ("experiment", "folder", "photos", "changes", "candidates"):
        if not isinstance(value := config.get(key, ""), str):
            raise ConfigError(f"--run-config {key}: wanted a text, got {value!r}")
        words[key] = value
    candidates = tuple(word.strip() for word in words.pop("candidates").split(";") if word.strip())
    folder, experiment = words["folder"], _experiment(home=home, **words)
    name, done = experiment.name, "run.json"
    if candidates:
        experiment = for_ranking(experiment)
        name, done = f"{name}-tournament", "tournament.json"
    first = run = (Path(folder) if folder else DEFAULT_RUNS) / name
    number = 1
    while (run / done).exists():
        number += 1
        run = first.with_name(f"{first.name}-{number}")
    return RunConfig(experiment=experiment, folder=run, candidates=candidates)


@cache
def _experiment(*, home: Path, experiment: str, folder: str, photos: str, changes: str) -> Experiment:
    if not experiment:
        raise ConfigError("--run-config experiment: wanted the path of a YAML file, got nothing")
    for key, value in (("folder", folder), ("photos", photos)):
        if value and not Path(value).is_absolute():
            raise ConfigError(f"--run-config {key}: wanted an absolute path, got {value}")
    try:
        wanted = json.loads(changes or "{}")
    except ValueError as error:
        raise ConfigError(f"--run-config changes: not valid JSON ({error})") from error
    if not isinstance(wanted, dict):
        raise ConfigError('--run-config changes: wanted keys and values such as {"training.rounds": 2}')
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in wanted.items()}
    return read_experiment(home / experiment, photos=Path(photos) if photos else None, changes=texts)
