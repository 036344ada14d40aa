"""Several runs of one question: all combinations of the axes under `vary` in a file.

An axis of `vary` is either a key with values, `privacy.epsilon: [1, 3, 10]`, or a
name with named variants, each a set of keys with values:

    vary:
      method:
        full: {training.adapt: {kind: full}}
        lora: {training.adapt: {kind: lora, rank: 4}}
      seed: [0, 1, 2]
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedface.config import section, value_of
from fedface.errors import ConfigError
from fedface.experiment import NO_DP_LABEL, VARY, Experiment, from_here, read_one
from fedface.privacy.privacy_target import PrivacyTarget

MAX_RUNS = 1000


@dataclass(frozen=True)
class Variant:
    """One run of a sweep."""

    method: str  # its names on the axes that set neither privacy nor the seed, joined by ", "
    names: tuple[str, ...]  # its name on each axis
    experiment: Experiment

    @property
    def folder(self) -> str:
        """A name for its folder: letters, digits, dots, dashes and underscores."""
        return "_".join(self.names) or "only"


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
        ConfigError: An axis is neither a list nor a mapping, has no value, or a run's experiment is wrong.
    """
    picks, rest = _picks(from_here(changes or {}))
    given = section(path, VARY)
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: {VARY}: expected axes, each with its values, got {_shown(given)}")
    varied = [key for axis, values in given.items() for key in _keys_of(axis, values)]
    for key in rest:
        if any(f"{inner}.".startswith(f"{key}.") for inner in varied):
            raise ConfigError(f"{path}: --set {key} would override what {VARY} sets; narrow the axis instead")
    if unknown := sorted(set(picks) - set(given)):
        raise ConfigError(f"{path}: {VARY}: has no axis {unknown[0]}; axes: {', '.join(given)}")
    axes = {axis: _steps(path, axis, values) for axis, values in given.items()}
    for axis, names in picks.items():
        axes[axis] = _picked(path, axis, axes[axis], names)
    runs = list(itertools.product(*axes.values()))
    if len(runs) > MAX_RUNS:
        raise ConfigError(f"{path}: {VARY}: {len(runs)} combinations; at most {MAX_RUNS} are run")
    methods = [axis for axis, steps in axes.items() if not _is_privacy(steps) and axis != "seed"]
    variants = []
    for run in runs:
        merged: dict[str, str] = {}
        for step in run:
            merged |= step.changes
        experiment = read_one(path, photos=photos, changes=merged | rest)
        named = dict(zip(axes, run, strict=True))
        method = ", ".join(named[axis].name for axis in methods) or experiment.name
        variants.append(Variant(method, tuple(step.name for step in run), experiment))
    _check_apart(path, variants)
    first = variants[0].experiment
    return Sweep(first.question, first.name, tuple(axes), tuple(variants))


def _steps(path: Path, axis: str, values: Any) -> list[_Step]:
    if isinstance(values, list) and values:
        return [_Step(_name(path, axis, value), {axis: _text(path, axis, value)}) for value in values]
    if isinstance(values, dict) and values:
        steps = []
        for name, changes in values.items():
            if not isinstance(changes, dict):
                raise ConfigError(
                    f"{path}: {VARY}.{axis}.{name}: expected keys with values, got {_shown(changes)}"
                )
            texts = {key: _text(path, axis, value) for key, value in changes.items()}
            steps.append(_Step(_name(path, axis, name), texts))
        return steps
    raise ConfigError(
        f"{path}: {VARY}.{axis}: expected a list of values or named variants, got {_shown(values)}"
    )


def _name(path: Path, axis: str, value: Any) -> str:
    """The name of one value, which becomes a part of a folder's name."""
    name = str(value)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]{0,39}", name):
        raise ConfigError(
            f"{path}: {VARY}.{axis}: names are letters, digits, '.' and '-', 40 at most, got {name!r:.80}; "
            "give values with other characters a name of their own"
        )
    return name


def _text(path: Path, axis: str, value: Any) -> str:
    """A value as YAML text."""
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {VARY}.{axis}: expected plain values, got {_shown(value)}") from error


def _shown(value: Any) -> str:
    return f"{value!r:.80}"


def _keys_of(axis: Any, values: Any) -> list[str]:
    """The keys that an axis sets."""
    if isinstance(values, dict):
        return [str(key) for changes in values.values() if isinstance(changes, dict) for key in changes]
    return [str(axis)]


def _check_apart(path: Path, variants: list[Variant]) -> None:
    """Raise ConfigError unless runs are distinguishable in a table and have the same devices."""
    devices = variants[0].experiment.devices
    seen: dict[tuple[str, str, int], Variant] = {}
    for variant in variants:
        if variant.experiment.devices != devices:
            raise ConfigError(f"{path}: {VARY}: devices must be the same in all runs that are compared")
        key = (variant.method, level_of(variant.experiment), variant.experiment.seed)
        if key in seen:
            raise ConfigError(
                f"{path}: {VARY}: the runs {', '.join(seen[key].names)} and "
                f"{', '.join(variant.names)} have the same method, "
                "epsilon and seed; they could not be distinguished in a table"
            )
        seen[key] = variant


def level_of(experiment: Experiment) -> str:
    """The target epsilon as a short text, or "∞" without differential privacy."""
    match experiment.privacy:
        case PrivacyTarget(epsilon=epsilon):
            return f"{epsilon:g}"
        case _:
            return NO_DP_LABEL


def _picks(changes: Mapping[str, str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Changes of the form `vary.AXIS=[names]`, and the others."""
    picks, rest = {}, {}
    for key, text in changes.items():
        if key.startswith(f"{VARY}."):
            names = value_of(key, text)
            picks[key.removeprefix(f"{VARY}.")] = [
                str(name) for name in (names if isinstance(names, list) else [names])
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


def _is_privacy(steps: list[_Step]) -> bool:
    return all(key.split(".")[0] == "privacy" for step in steps for key in step.changes)
