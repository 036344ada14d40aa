"""The run config of a Flower run: which experiment, with which changes, and the run's folder.

Server and simulated devices read it independently and find the same folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fedface.config import local_path
from fedface.errors import ConfigError
from fedface.experiment import Experiment, for_ranking, ranking_name, read_experiment

DEFAULT_RUNS = Path("~/fedface-runs")  # default folder of runs


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A validated run config."""

    experiment: Experiment
    folder: Path  # of this run
    candidates: tuple[str, ...] = ()  # checkpoints to rank; empty: a run that trains
    command: str  # that repeats the run


def read_run_config(config: Mapping[str, object], home: Path) -> RunConfig:
    """Read a run config: `experiment` (within the app, or absolute), `folder`, `photos`, `changes`, `candidates`.

    With `candidates`, checkpoints or the word "base" separated by semicolons, the run ranks models. `command` is
    for the record.

    Raises:
        ConfigError: An entry is missing or wrong, or the experiment cannot be read.
    """
    texts = {}
    for key in ("experiment", "folder", "photos", "changes", "candidates", "command"):
        if not isinstance(value := config.get(key, ""), str):
            raise ConfigError(f"--run-config {key}: expected a text, got {value!r}")
        texts[key] = value
    entries = f"experiment='{texts['experiment']}'"
    if texts["candidates"]:
        entries += f" candidates='{texts['candidates']}'"
    command = texts.pop("command") or f'flwr run . --run-config "{entries}"'
    candidates = tuple(name.strip() for name in texts.pop("candidates").split(";") if name.strip())
    runs = local_path(Path(texts["folder"]) if texts["folder"] else DEFAULT_RUNS, Path())
    return run_config(_experiment(home=home, **texts), runs, candidates, command)


def run_config(
    experiment: Experiment, runs: Path, candidates: tuple[str, ...], command: str = ""
) -> RunConfig:
    """A run of an experiment, in the first of NAME, NAME-2, ... in `runs` that holds no finished run.

    So an interrupted run continues. With candidates it is a ranking, NAME-ranking.

    Raises:
        ConfigError: A ranking needs a privacy target.
    """
    name, done = experiment.name, "run.json"
    if candidates:
        experiment = for_ranking(experiment)
        name, done = ranking_name(experiment), "ranking.json"
    first = run = runs / name
    number = 1
    while (run / done).exists():
        number += 1
        run = first.with_name(f"{first.name}-{number}")
    return RunConfig(experiment=experiment, folder=run, candidates=candidates, command=command)


@cache
def _experiment(*, home: Path, experiment: str, folder: str, photos: str, changes: str) -> Experiment:
    if not experiment:
        raise ConfigError("--run-config experiment: expected the path of a YAML file, got nothing")
    for key, value in (("folder", folder), ("photos", photos)):
        if value and not Path(value).is_absolute():
            raise ConfigError(f"--run-config {key}: expected an absolute path, got {value}")
    try:
        parsed = json.loads(changes or "{}")
    except ValueError as error:
        raise ConfigError(f"--run-config changes: not valid JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise ConfigError('--run-config changes: expected keys and values such as {"training.rounds": 2}')
    by_key = {key: value if isinstance(value, str) else json.dumps(value) for key, value in parsed.items()}
    return read_experiment(home / experiment, photos=Path(photos) if photos else None, changes=by_key)
