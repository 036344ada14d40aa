"""Several runs of one question: every combination of what a file's `vary` lists.

Called by `fedface compare`. An axis of `vary` is either a key with values, `promise.epsilon: [1, 3, 10]`, or a
name with named variants, each a set of keys with values:

    vary:
      way:
        full: {training.adapt: {kind: full}}
        lora: {training.adapt: {kind: lora, rank: 4}}
      seed: [0, 1, 2]
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedface.config import section
from fedface.errors import ConfigError
from fedface.experiment import VARY, Experiment, read_one

MOST_RUNS = 1000


@dataclass(frozen=True)
class Variant:
    """One run of a sweep."""

    way: str  # its names on the axes that are neither the promise nor the seed, joined by ", "
    names: tuple[str, ...]  # its name on each axis
    experiment: Experiment

    @property
    def folder(self) -> str:
        """A name for its folder: letters, digits and dashes."""
        word = "_".join(self.names)
        return "".join(letter if letter.isalnum() or letter in "_." else "-" for letter in word) or "only"


@dataclass(frozen=True)
class Sweep:
    """A question and the runs that answer it."""

    question: str
    name: str
    axes: tuple[str, ...]
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class _Step:
    """One value on one axis."""

    name: str
    changes: Mapping[str, str]  # dotted key -> YAML text


def read_sweep(path: Path, *, photos: Path | None = None, changes: Mapping[str, str] | None = None) -> Sweep:
    """Read a file with `vary` as all of its runs; a file without it is one run.

    Args:
        path: The YAML file.
        photos: Replaces the folder of labelled devices and probe.
        changes: Dotted keys with YAML text. `vary.AXIS` replaces an axis: a list picks from its names.

    Raises:
        ConfigError: An axis is no list and no mapping, has no value, or a run's recipe is wrong.
    """
    picks, rest = _picks(changes or {})
    told = section(path, VARY)
    if told is None:
        told = {}
    if not isinstance(told, dict):
        raise ConfigError(f"{path}: {VARY}: expected axes, each with its values, got {json.dumps(told)[:80]}")
    if unknown := sorted(set(picks) - {str(axis) for axis in told}):
        raise ConfigError(f"{path}: {VARY}: has no axis {unknown[0]}; axes: {', '.join(map(str, told))}")
    axes = {str(axis): _steps(path, str(axis), values) for axis, values in told.items()}
    for axis, names in picks.items():
        axes[axis] = _picked(path, axis, axes[axis], names)
    runs = list(itertools.product(*axes.values()))
    if len(runs) > MOST_RUNS:
        raise ConfigError(f"{path}: {VARY}: {len(runs)} combinations; at most {MOST_RUNS} are run")
    ways = [axis for axis, steps in axes.items() if not _is_promise(steps) and axis != "seed"]
    variants = []
    for run in runs:
        merged: dict[str, str] = {}
        for step in run:
            merged |= step.changes
        experiment = read_one(path, photos=photos, changes=merged | rest)
        named = dict(zip(axes, run, strict=True))
        way = ", ".join(named[axis].name for axis in ways) or experiment.name
        variants.append(Variant(way, tuple(step.name for step in run), experiment))
    first = variants[0].experiment
    return Sweep(first.question, first.name, tuple(axes), tuple(variants))


def _steps(path: Path, axis: str, values: Any) -> list[_Step]:
    if isinstance(values, list) and values:
        return [_Step(str(value), {axis: json.dumps(value)}) for value in values]
    if isinstance(values, dict) and values:
        steps = []
        for name, changes in values.items():
            if not isinstance(changes, dict):
                raise ConfigError(
                    f"{path}: {VARY}.{axis}.{name}: expected keys with values, got {json.dumps(changes)[:80]}"
                )
            steps.append(_Step(str(name), {str(key): json.dumps(value) for key, value in changes.items()}))
        return steps
    raise ConfigError(
        f"{path}: {VARY}.{axis}: expected a list of values or named variants, got {json.dumps(values)[:80]}"
    )


def _picks(changes: Mapping[str, str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Changes of the form `vary.AXIS=[names]`, and the others."""
    picks, rest = {}, {}
    for key, text in changes.items():
        if key.startswith(f"{VARY}."):
            words = text.strip().removeprefix("[").removesuffix("]").split(",")
            picks[key.removeprefix(f"{VARY}.")] = [
                word.strip().strip("\"'") for word in words if word.strip()
            ]
        else:
            rest[key] = text
    return picks, rest


def _picked(path: Path, axis: str, steps: list[_Step], names: list[str]) -> list[_Step]:
    known = {step.name: step for step in steps}
    if missing := [name for name in names if name not in known]:
        raise ConfigError(f"{path}: {VARY}.{axis}: has no {missing[0]}; it has {', '.join(known)}")
    if not names:
        raise ConfigError(f"{path}: {VARY}.{axis}: name at least one of {', '.join(known)}")
    return [known[name] for name in names]


def _is_promise(steps: list[_Step]) -> bool:
    return all(key.split(".")[0] == "promise" for step in steps for key in step.changes)
