"""Commands about photos: scan a library, render synthetic faces, measure face detectors by group."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedface.atomic_io import check_output, write_output
from fedface.cli.console import cell, print_json, progress_bars, say, table_of
from fedface.cli.options import DetectorOption, JsonOption, SeedOption, command_group, example

photos = command_group("Photo libraries, synthetic faces, face detectors.")


@photos.command(epilog=example("fedface photos scan ~/Pictures"))
def scan(
    folder: Annotated[Path, typer.Argument(help="A photo library; fedface never writes to it.")],
    detector: DetectorOption = None,
    cache: Annotated[
        Path | None, typer.Option(help="The index file; default: in the user's state folder.")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="How many rows to print.")] = 40,
    json_out: JsonOption = False,
) -> None:
    """Scan a folder of photos: which files, how many faces, and why a file cannot be read."""
    from fedface.photos.detectors import load_detector
    from fedface.photos.library import scan_table, summary
    from fedface.photos.photo_files import describe_skipped
    from fedface.photos.scan import ScanReport, checked_folder, scan_library

    checked_folder(folder)
    finder = load_detector(detector)
    with progress_bars() as bars:
        bars.stage("files read", 0)

        def progress(so_far: ScanReport) -> None:
            bars.advance(so_far.files)

        done = scan_library(folder, detector=finder, cache=cache, progress=progress)
    found = summary(folder, cache=cache, detector=finder.name)
    lines = list(scan_table(folder, cache=cache, detector=finder.name))
    if json_out:
        record = {"scan": asdict(done), "summary": asdict(found), "files": [asdict(row) for row in lines]}
        print_json(record)
        return
    table = table_of(())
    for heading in ("file", "kind", "pixels", "taken", "place", "faces", "why not"):
        table.add_column(heading, overflow="ellipsis", no_wrap=heading != "why not", max_width=44)
    for row in lines[:rows]:
        table.add_row(*map(cell, asdict(row).values()))
    say(table)
    if len(lines) > rows:
        say(f"... and {len(lines) - rows} more (--rows {len(lines)}, or --json)")
    for key, value in asdict(found).items():
        say(f"{key.replace('_', ' ')}: {cell(value)}")
    if skipped := describe_skipped(done.skipped):
        say(f"skipped: {skipped}")


@photos.command(epilog=example("fedface photos synthesize faces.png --size 64"))
def synthesize(
    out: Annotated[Path, typer.Argument(help="The PNG to write.")],
    size: Annotated[int, typer.Option(min=16, max=256, help="Pixels a side.")] = 64,
    seed: SeedOption = 0,
) -> None:
    """Render a sheet of synthetic faces with known skin tone, light and camera; skin gets darker from left to right."""
    import torch

    from fedface.photos.image_io import PICTURE_MARK
    from fedface.reports.charts import face_grid
    from fedface.synthetic.faces import ToneMix, render, sample_faces

    check_output(out, PICTURE_MARK)
    rng = torch.Generator().manual_seed(seed)
    everyone = sample_faces(60, ToneMix(light_fraction=0.5), rng)
    by_tone = everyone[everyone.tone.argsort().reshape(10, 6).T.reshape(-1)]
    images = render(by_tone, size, noise=rng)
    tones = by_tone.tone.reshape(6, 10)
    columns = [f"Monk {low:.1f}-{high:.1f}" for low, high in zip(tones.amin(0), tones.amax(0), strict=True)]
    rows = [("", images[10 * row : 10 * row + 10]) for row in range(6)]
    write_output(out, face_grid(rows, columns), PICTURE_MARK)
    say(f"open {out}")


@photos.command(
    "audit-detectors", epilog=example("fedface photos audit-detectors --faces fairface --per-cell 20")
)
def audit_detectors(
    faces: Annotated[Path, typer.Option(help="A folder of labelled faces (docs/detection.md).")],
    yunet: Annotated[Path | None, typer.Option(help="A YuNet .onnx file to measure as well.")] = None,
    per_cell: Annotated[int, typer.Option(min=1, help="Photos per race and gender.")] = 10,
    json_out: JsonOption = False,
) -> None:
    """Measure how often each face detector finds a face, by group."""
    from fedface.photos.detection_rates import measure_detection
    from fedface.photos.detectors import EmbeddedDetector, HogDetector, YuNetDetector
    from fedface.photos.face_alignment import Detector

    finders: list[Detector] = [HogDetector(), EmbeddedDetector(), *([YuNetDetector(yunet)] if yunet else [])]
    rates = []
    with progress_bars() as bars:
        bars.stage("detectors", len(finders))
        for number, finder in enumerate(finders, start=1):
            rates += measure_detection(faces, finder, per_cell=per_cell)
            bars.advance(number)
    if json_out:
        print_json([{**asdict(rate), "interval": [rate.interval.low, rate.interval.high]} for rate in rates])
        return
    rows = []
    for group in dict.fromkeys(rate.group for rate in rates):
        of_group = [rate for rate in rates if rate.group == group]
        found = [rate.interval for rate in of_group]
        cells = [f"{one.estimate:.0%} [{one.low:.0%}, {one.high:.0%}]" for one in found]
        rows.append([group, of_group[0].count, *cells])
    say(table_of(["group", "photos", *(finder.name for finder in finders)], rows))
