"""The command `fedface upsample`: a photo, or a folder of photos, to contact sheets of generated faces."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated

import typer

from fedface.cli.console import print_json, progress_bars, say
from fedface.cli.options import (
    CheckpointOption,
    DetectorOption,
    DownscaleOption,
    FactorOption,
    JsonOption,
    MethodOption,
    SeedOption,
)
from fedface.errors import LibraryError


def upsample(
    photo: Annotated[
        Path, typer.Argument(help="A photo with a face, a small square face, or a folder of photos.")
    ],
    method: MethodOption = None,
    faces: Annotated[int, typer.Option(min=1, max=16, help="Generated faces per method.")] = 6,
    factor: FactorOption = 4,
    downscale: DownscaleOption = "bicubic-pulse",
    max_faces: Annotated[
        int, typer.Option(min=1, help="Upsample at most this many faces per photo, the largest first.")
    ] = 1,
    no_detect: Annotated[
        bool, typer.Option("--no-detect", help="Skip face detection; use the centre square.")
    ] = False,
    checkpoint: CheckpointOption = None,
    detector: DetectorOption = None,
    seed: SeedOption = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="A PNG, or a folder for many photos; default: PHOTO-faces.png or faces/."),
    ] = None,
    json_out: JsonOption = False,
) -> None:
    """Generate faces that match a photo's low-resolution pixels.

    The face is found, shrunk, and upsampled by each method; one contact sheet per face shows all results.
    """
    from fedface.cli.upsample_job import (
        SheetJob,
        available_cores,
        choose_methods,
        generator_tones,
        make_degradation,
        upsample_folder,
        upsample_photo,
    )
    from fedface.codec import encode
    from fedface.inference.contact_sheet import NO_FACE, MethodRunner
    from fedface.inference.pipeline import SheetSettings
    from fedface.models.checkpoint import load_model, weights_hash
    from fedface.photos.detectors import load_detector
    from fedface.upsampling.methods import pair_with_models, with_workers

    if not photo.exists():
        raise LibraryError(f"there is no photo or folder {photo}")
    given = None if checkpoint is None else load_model(checkpoint)
    methods = choose_methods(method, given)
    size, pairs = pair_with_models([with_workers(each, available_cores()) for each in methods], given)
    degradation = make_degradation(downscale, factor, size)
    settings = {
        "methods": [encode(each) for each in methods],
        "weights": ["" if model is None else weights_hash(*model.modules()) for _, model in pairs],
        "downscale": encode(degradation), "faces": faces, "max_faces": max_faces, "no_detect": no_detect,
        "seed": seed, "detector": str(detector or ""),
    }  # fmt: skip
    with progress_bars() as bars:
        bars.stage("preparing", 0)

        def progress(done: int, of: int) -> None:
            bars.advance(round(1000 * done / max(1, of)))

        job = SheetJob(
            settings=SheetSettings(
                degradation=degradation, size=size, faces=faces, max_faces=max_faces,
                detect="at the whole" if no_detect else "for faces",
            ),
            runner=MethodRunner(pairs, degradation, size=size, seed=seed, progress=progress),
            detector=cache(lambda: load_detector(detector)),
            tones=generator_tones(pairs),
            bars=bars,
            # With --json, standard output holds JSON alone.
            describe=bars.message if json_out else say,
        )  # fmt: skip
        if photo.is_dir():
            found = upsample_folder(job, photo, out or Path("faces"), settings)
        else:
            found = upsample_photo(job, photo, out)
    if json_out:
        print_json(found)
        return
    say(NO_FACE)
