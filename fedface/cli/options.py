"""Options and small parsers that several commands share. Nothing here imports torch: `--help` must be quick."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from fedface.errors import ConfigError

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of everything random except privacy noise.")]
DetectorOption = Annotated[
    Path | None, typer.Option(help="A YuNet .onnx face detector; default: the built-in one.")
]
PhotosOption = Annotated[
    Path | None, typer.Option(help="Folder of labelled photos, for experiments that use one.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Change one key, such as privacy.epsilon=3; repeatable.")
]
RankOption = Annotated[
    list[str] | None, typer.Option(help="Rank checkpoints, or `base`, instead of training; repeatable.")
]
CheckpointOption = Annotated[
    Path | None, typer.Option(help="A checkpoint (.safetensors); default: the bundled one.")
]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0: any free one.")]
OpenBrowserOption = Annotated[
    bool, typer.Option("--open/--no-open", help="Open the page in this computer's browser.")
]
METHOD_NAMES = (
    "pulse", "pulse-encoder-init", "hmc", "guided-flow", "style-encoder", "super-resolution", "bicubic", "nearest",
)  # fmt: skip
MethodOption = Annotated[
    list[str] | None, typer.Option(help=f"{', '.join(METHOD_NAMES)}, or all; repeatable.")
]
Downscale = Literal["bicubic-pulse", "bicubic", "area"]
DownscaleOption = Annotated[Downscale, typer.Option(help="How the face is shrunk.")]
FactorOption = Annotated[int, typer.Option(min=1, help="By how much the face is shrunk.")]


def command_group(summary: str) -> typer.Typer:
    """An empty group of commands."""
    return typer.Typer(help=summary, no_args_is_help=True, rich_markup_mode=None)


def example(command: str) -> str:
    """The epilog of a command's `--help`: one example, on lines of its own."""
    return f"\b\nExample:\n  {command}"


def parse_changes(settings: list[str] | None) -> dict[str, str]:
    """The values of `--set` by key.

    Raises:
        ConfigError: A setting is not KEY=VALUE.
    """
    changes = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set expects KEY=VALUE such as privacy.epsilon=3, got {setting}")
        changes[key] = value
    return changes


def command_line(
    command: str,
    experiment: Path,
    photos: Path | None,
    changes: dict[str, str],
    arguments: Sequence[str] = (),
) -> str:
    """The shell command that repeats this call."""
    texts = [
        "fedface",
        command,
        public_path(experiment),
        *(public_path(Path(argument)) for argument in arguments),
    ]
    texts += ["--photos", public_path(photos)] if photos else []
    for key, value in changes.items():
        texts += ["--set", f"{key}={public_path(Path(value)) if key == 'base' else value}"]
    return shlex.join(texts)


def public_path(path: Path) -> str:
    """A path for a record that others may read: below the current folder, or its last part alone."""
    return (
        str(path.absolute().relative_to(Path.cwd()))
        if path.absolute().is_relative_to(Path.cwd())
        else path.name
    )


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """The run that an operator names to `fedface server run`, `publish` and `invite`."""

    experiment: Path
    changes: dict[str, str]
    candidates: tuple[str, ...]  # absolute paths, or "base"; empty: a run that trains
    photos: Path | None = None


def run_request(
    experiment: Path, set: list[str] | None, rank: list[str] | None, photos: Path | None = None
) -> RunRequest:
    """The run of these options; Flower runs it in another folder, so paths become absolute."""
    return RunRequest(
        experiment=experiment,
        changes=parse_changes(set),
        candidates=tuple(
            name if name == "base" else str(Path(name).expanduser().absolute()) for name in rank or ()
        ),
        photos=None if photos is None else photos.expanduser().absolute(),
    )


def shell_command(folder: Path, run: RunRequest) -> str:
    """The shell command that repeats a run of a server, for its record."""
    words = ["fedface", "server", "run", public_path(folder), public_path(run.experiment)]
    for key, value in run.changes.items():
        words += ["--set", f"{key}={public_path(Path(value)) if key == 'base' else value}"]
    for candidate in run.candidates:
        words += ["--rank", candidate if candidate == "base" else public_path(Path(candidate))]
    return shlex.join(words)
