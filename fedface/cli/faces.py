"""Commands about photos and faces: upsample one, scan a library, draw a sheet, measure detectors."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from fedface.cli.terminal import DetectorOption, JsonOption, cell, console, progress_bars
from fedface.errors import ConfigError
from fedface.models.weights import load_base, load_model
from fedface.photos.detection_rates import measure_detection
from fedface.photos.detectors import EmbeddedDetector, HogDetector, YuNetDetector
from fedface.photos.drawn import ToneMix, sample_faces
from fedface.photos.drawn import draw as draw_faces
from fedface.photos.faces import Detector
from fedface.photos.library import scan_table, summary
from fedface.photos.scan import ScanReport, scan_library
from fedface.reports.figures import face_grid
from fedface.reports.portrait import portrait_sheet, upsample_photo
from fedface.upsampling.pulse import PulseConfig

photos = typer.Typer(help="Read a photo library.", no_args_is_help=True, rich_markup_mode=None)


def upsample(
    photo: Annotated[Path, typer.Argument(help="A photo with a face, or a small square face.")],
    generator: Annotated[Path | None, typer.Option(help="A checkpoint; the embedded one otherwise.")] = None,
    detector: DetectorOption = None,
    factor: Annotated[int, typer.Option(min=2, help="How much the face is shrunk.")] = 4,
    faces: Annotated[int, typer.Option(min=1, max=16, help="How many faces to search.")] = 6,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[
        Path | None, typer.Option(help="The PNG to write; PHOTO-faces.png here otherwise.")
    ] = None,
) -> None:
    """Show what PULSE makes of a face: several people, all of whom shrink to the same pixels."""
    model = load_base() if generator is None else load_model(generator)
    target = out or Path(f"{photo.stem}-faces.png")
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        raise ConfigError(f"{target}: is a folder; name the PNG to write")
    with progress_bars() as bars:
        bars.stage("searching faces", 100)
        found = upsample_photo(
            photo,
            model.generator,
            lambda: chosen_detector(detector),
            factor=factor,
            faces=faces,
            seed=seed,
            progress=lambda done, of: bars.step(round(100 * done / max(1, of))),
        )
    target.write_bytes(portrait_sheet(found))
    if found.faces_in_photo > 1:
        console.print(f"{found.faces_in_photo} faces in the photo; the largest was taken", highlight=False)
    for i, (misfit, fits) in enumerate(zip(found.made.misfit[0], found.made.converged[0], strict=True)):
        verdict = (
            "shrinks to the same pixels" if fits else f"does not fit: {PulseConfig().eps:g} or less would"
        )
        console.print(f"face {i + 1}: misfit {misfit:.5f}, {verdict}", highlight=False)
    if not bool(found.made.converged.any()):
        console.print(
            "This generator cannot make a face that fits; what it shows is the nearest it knows.",
            highlight=False,
        )
    console.print("These people do not exist; the pixels do not say which face is right.", highlight=False)
    console.print(f"open {target}", highlight=False, soft_wrap=True)


@photos.command()
def scan(
    folder: Annotated[Path, typer.Argument(help="A photo library; it is read, never written.")],
    detector: DetectorOption = None,
    cache: Annotated[
        Path | None, typer.Option(help="The index file; in the user's state folder otherwise.")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="How many lines to print.")] = 40,
    json_out: JsonOption = False,
) -> None:
    """Read a folder of photos: what is there, where faces are, and what cannot be read and why."""
    finder = chosen_detector(detector)
    with progress_bars() as bars:
        bars.stage("files read", 0)

        def progress(so_far: ScanReport) -> None:
            bars.step(so_far.files)

        done = scan_library(folder, detector=finder, cache=cache, progress=progress)
    found = summary(folder, cache=cache, detector=finder.name)
    lines = scan_table(folder, cache=cache, detector=finder.name)
    if json_out:
        told = {"scan": asdict(done), "summary": asdict(found), "files": [asdict(row) for row in lines]}
        print(json.dumps(told, indent=2, default=str))
        return
    table = Table(box=None)
    for heading in ("file", "kind", "pixels", "taken", "place", "faces", "why not"):
        table.add_column(heading, overflow="ellipsis", no_wrap=heading != "why not", max_width=44)
    left = 0
    for number, row in enumerate(lines):
        if number >= rows:
            left += 1
            continue
        values = asdict(row)
        table.add_row(*(cell(value) for value in values.values()))
    console.print(table)
    if left:
        console.print(f"... and {left} more (--rows {rows + left}, or --json)", highlight=False)
    for key, value in asdict(found).items():
        console.print(f"{key.replace('_', ' ')}: {cell(value)}", highlight=False)


@photos.command()
def draw(
    out: Annotated[Path, typer.Argument(help="The PNG to write.")],
    size: Annotated[int, typer.Option(min=16, max=256, help="Pixels a side.")] = 64,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Draw a sheet of faces with known tone, light and camera; tone rises from left to right."""
    chance = torch.Generator().manual_seed(seed)
    everyone = sample_faces(60, ToneMix(light_share=0.5), chance)
    by_tone = everyone[everyone.tone.argsort().reshape(10, 6).T.reshape(-1)]
    made = draw_faces(by_tone, size, noise=chance)
    tones = by_tone.tone.reshape(6, 10)
    columns = [f"Monk {low:.1f}-{high:.1f}" for low, high in zip(tones.amin(0), tones.amax(0), strict=True)]
    rows = [("", made[10 * row : 10 * row + 10]) for row in range(6)]
    out.write_bytes(face_grid(rows, columns))
    console.print(f"open {out}", highlight=False, soft_wrap=True)


@photos.command()
def detectors(
    faces: Annotated[Path, typer.Option(help="A labelled set of faces.")],
    yunet: Annotated[Path | None, typer.Option(help="A YuNet .onnx file, to measure it as well.")] = None,
    per_cell: Annotated[int, typer.Option(min=1, help="Photos of each race and gender.")] = 10,
    json_out: JsonOption = False,
) -> None:
    """Measure in whose photos each face detector finds a face."""
    finders: list[Detector] = [HogDetector(), EmbeddedDetector(), *([YuNetDetector(yunet)] if yunet else [])]
    rates = []
    with progress_bars() as bars:
        bars.stage("detectors", len(finders))
        for number, finder in enumerate(finders, start=1):
            rates += measure_detection(faces, finder, per_cell=per_cell)
            bars.step(number)
    if json_out:
        print(json.dumps([{**asdict(rate), "interval": rate.interval} for rate in rates], indent=2))
        return
    table = Table(box=None)
    for heading in ("group", "photos", *(finder.name for finder in finders)):
        table.add_column(heading)
    for group in dict.fromkeys(rate.group for rate in rates):
        row = {rate.detector: rate for rate in rates if rate.group == group}
        cells = [f"{r.rate:.0%} [{r.interval[0]:.0%}, {r.interval[1]:.0%}]" for r in row.values()]
        table.add_row(group, str(next(iter(row.values())).count), *cells)
    console.print(table)


def chosen_detector(path: Path | None) -> Detector:
    return EmbeddedDetector() if path is None else YuNetDetector(path)
