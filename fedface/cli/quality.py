"""The command that measures how good a checkpoint's pictures are, for everybody and by tone group."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fedface.audits.feature_extractors import (
    ColourFeatures,
    FeatureSource,
    OnnxFeatures,
    TorchScriptFeatures,
)
from fedface.audits.sample_quality import GroupQuality, InsufficientSamples, Quality, tone_groups
from fedface.audits.sample_quality import quality as measure_quality
from fedface.cli.console import JsonOption, console, progress_bars
from fedface.errors import ConfigError
from fedface.models.checkpoint import load_gan, load_model, weights_hash
from fedface.photos.labelled_faces import read_face_folder
from fedface.randomness import Streams
from fedface.synthetic.faces import render_people

Three = tuple[float, float, float]


def evaluate(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A checkpoint of any family; the embedded generator otherwise.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Labelled faces to compare with; drawn faces otherwise.")
    ] = None,
    light_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Of drawn faces: how many have light skin.")
    ] = 0.5,
    count: Annotated[int, typer.Option(min=40, max=100_000, help="Samples, and drawn faces.")] = 1000,
    network: Annotated[
        Path | None,
        typer.Option(help="An .onnx file or a TorchScript file, which is code, for the features."),
    ] = None,
    network_size: Annotated[int, typer.Option(min=1, help="Pixels that it expects.")] = 299,
    network_mean: Annotated[Three, typer.Option(help="What is subtracted from [0, 1].")] = (0.5, 0.5, 0.5),
    network_std: Annotated[Three, typer.Option(help="What it is divided by.")] = (0.5, 0.5, 0.5),
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json_out: JsonOption = False,
) -> None:
    """Measure a checkpoint's samples: kernel and Frechet distance, precision, recall, by tone group."""
    model = load_gan() if checkpoint is None else load_model(checkpoint)
    generator = model.generator
    streams = Streams(seed).child("quality")
    source = _source(network, network_size, network_mean, network_std)
    with progress_bars() as bars:
        bars.stage("faces", 3)
        real = render_people(count, light_fraction, model.size, streams) if reference is None else read_face_folder(
            reference, size=model.size
        ).images  # fmt: skip
        if len(real) < 40:
            raise ConfigError(f"{reference}: wanted at least 40 faces to compare with, got {len(real)}")
        bars.advance(1)
        made = generator.sample(count, streams.generator("samples"))
        bars.advance(2)
        found = measure_quality(
            real, tone_groups(real), made, tone_groups(made), source, streams.numpy("quality")
        )
    name = weights_hash(*model.modules())
    if json_out:
        print(json.dumps({"weights": name, **asdict(found)}, indent=1))
        return
    _print(found, name)


def _source(network: Path | None, size: int, mean: Three, std: Three) -> FeatureSource:
    if network is None:
        return ColourFeatures()
    kind = OnnxFeatures if network.suffix == ".onnx" else TorchScriptFeatures
    try:
        return kind(path=network, size=size, mean=mean, std=std)
    except ValueError as error:
        # The fields are called as the options are, without their first word.
        raise ConfigError(f"--network-{error}") from error


def _print(found: Quality, name: str) -> None:
    table = Table(box=None)
    heads = (
        "group",
        "real",
        "made",
        "kernel distance",
        "Frechet",
        "floor",
        "precision",
        "recall",
        "coverage",
    )
    for heading in heads:
        table.add_column(heading)
    _row(table, "everybody", found.overall)
    for group, figures in found.groups.items():
        if isinstance(figures, InsufficientSamples):
            table.add_row(group, str(figures.real), str(figures.made), str(figures))
        else:
            _row(table, group, figures)
    console.print(table)
    console.print(f"features: {found.identity}", highlight=False)
    console.print(
        "Figures of other features, such as published FID and KID, cannot be compared with these.",
        highlight=False,
    )
    console.print(
        f"weights {name}; intervals hold 95 %; floor: two halves of the real faces", highlight=False
    )


def _row(table: Table, group: str, figures: GroupQuality) -> None:
    near = figures.neighbours
    shares = (near.precision, near.recall, near.coverage)
    table.add_row(
        group,
        str(figures.real),
        str(figures.made),
        f"{figures.kernel.estimate:.4f} [{figures.kernel.low:.4f}, {figures.kernel.high:.4f}]",
        f"{figures.frechet.plain:.3f}",
        f"{figures.frechet.floor:.3f}",
        *(f"{share.estimate:.2f} [{share.low:.2f}, {share.high:.2f}]" for share in shares),
    )
