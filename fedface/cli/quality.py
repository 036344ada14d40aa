"""The command `fedface evaluate`: sample quality of a checkpoint, overall and by tone group."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedface.cli.console import print_json, progress_bars
from fedface.cli.options import JsonOption, SeedOption
from fedface.errors import ConfigError

RGB = tuple[float, float, float]
MIN_FACES = 40


def evaluate(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A checkpoint of any family; default: the bundled generator.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Labelled faces to compare with; default: synthetic faces.")
    ] = None,
    light_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Fraction of synthetic faces with light skin.")
    ] = 0.5,
    count: Annotated[
        int, typer.Option(min=MIN_FACES, max=100_000, help="Samples, and synthetic faces.")
    ] = 1000,
    network: Annotated[
        Path | None,
        typer.Option(help="Feature network: .onnx, or TorchScript (which can run code; trust its author)."),
    ] = None,
    network_size: Annotated[int, typer.Option(min=1, help="Input size of the network in pixels.")] = 299,
    network_mean: Annotated[RGB, typer.Option(help="Mean that is subtracted from [0, 1].")] = (0.5, 0.5, 0.5),
    network_std: Annotated[RGB, typer.Option(help="Standard deviation to divide by.")] = (0.5, 0.5, 0.5),
    seed: SeedOption = 0,
    json_out: JsonOption = False,
) -> None:
    """Measure the sample quality of a checkpoint, by tone group.

    Kernel and Fréchet distance, precision, recall and coverage, each with its interval.
    """
    from fedface.audits.feature_extractors import ColourFeatures, OnnxFeatures, TorchScriptFeatures
    from fedface.audits.sample_quality import quality, tone_groups
    from fedface.cli.tables import print_quality
    from fedface.models.checkpoint import load_gan, load_model, weights_hash
    from fedface.photos.labelled_faces import read_face_folder
    from fedface.randomness import Streams
    from fedface.synthetic.faces import render_people

    model = load_gan() if checkpoint is None else load_model(checkpoint)
    generator = model.generator
    streams = Streams(seed).child("quality")
    features: ColourFeatures | OnnxFeatures | TorchScriptFeatures = ColourFeatures()
    if network is not None:
        kind = OnnxFeatures if network.suffix == ".onnx" else TorchScriptFeatures
        try:
            features = kind(path=network, size=network_size, mean=network_mean, std=network_std)
        except ValueError as error:
            # The error begins with the field's name, which is the option's name without "network".
            raise ConfigError(f"--network-{error}") from error
    with progress_bars() as bars:
        bars.stage("faces", 3)
        real = (
            render_people(count, light_fraction, model.size, streams)
            if reference is None
            else read_face_folder(reference, size=model.size).images
        )
        if len(real) < MIN_FACES:
            raise ConfigError(
                f"{reference}: expected at least {MIN_FACES} faces to compare with, got {len(real)}"
            )
        bars.advance(1)
        generated = generator.sample(count, streams.generator("samples"))
        bars.advance(2)
        found = quality(
            real, tone_groups(real), generated, tone_groups(generated), features, streams.numpy("quality")
        )
    name = weights_hash(*model.modules())
    if json_out:
        print_json({"weights": name, **asdict(found)})
        return
    print_quality(found, name)
