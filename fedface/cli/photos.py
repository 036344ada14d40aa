"""Commands about photos and faces: scan a library, draw a sheet, measure detectors."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from fedface.cli.console import DetectorOption, JsonOption, cell, console, progress_bars
from fedface.photos.detection_rates import measure_detection
from fedface.photos.detectors import EmbeddedDetector, HogDetector, YuNetDetector
from fedface.photos.face_alignment import Detector
from fedface.photos.library import scan_table, summary
from fedface.photos.scan import ScanReport, scan_library
from fedface.reports.charts import face_grid
from fedface.synthetic.faces import ToneMix, sample_faces
from fedface.synthetic.faces import render as draw_faces

photos = typer.Typer(help="Read a photo library.", no_args_is_help=True, rich_markup_mode=None)


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
            bars.advance(so_far.files)

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
def synthesize(
    out: Annotated[Path, typer.Argument(help="The PNG to write.")],
    size: Annotated[int, typer.Option(min=16, max=256, help="Pixels a side.")] = 64,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Draw a sheet of faces with known tone, light and camera; tone rises from left to right."""
    rng = torch.Generator().manual_seed(seed)
    everyone = sample_faces(60, ToneMix(light_fraction=0.5), rng)
    by_tone = everyone[everyone.tone.argsort().reshape(10, 6).T.reshape(-1)]
    made = draw_faces(by_tone, size, noise=rng)
    tones = by_tone.tone.reshape(6, 10)
    columns = [f"Monk {low:.1f}-{high:.1f}" for low, high in zip(tones.amin(0), tones.amax(0), strict=True)]
    rows = [("", made[10 * row : 10 * row + 10]) for row in range(6)]
    out.write_bytes(face_grid(rows, columns))
    console.print(f"open {out}", highlight=False, soft_wrap=True)


@photos.command("audit-detectors")
def audit_detectors(
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
            bars.advance(number)
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
