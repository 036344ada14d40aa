"""The command `fedface benchmark`: every upsampling method on one public probe, group by group.

Called from fedface/cli. Parses, calls `federation.methods`, prints the table's first lines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from fedface.cli.console import JsonOption, console, progress_bars
from fedface.cli.upsample import (
    DownscaleOption,
    FactorOption,
    MethodOption,
    chosen_methods,
    cores,
    shrinking,
)
from fedface.coordinator.method_benchmark import benchmark_methods, with_baselines
from fedface.errors import ConfigError
from fedface.experiment import LabelledProbe, SyntheticProbe
from fedface.models.checkpoint import load_model
from fedface.public_data.probe import public_faces
from fedface.reports import formatting, method_report, strict
from fedface.reports.measurements import Interval, Measurement
from fedface.reports.method_report import BenchmarkRecord
from fedface.upsampling.methods import METHODS, pair_with_models, with_workers

SHOWN = ("consistency_error", "skin_difference", "lightness_shift", "same_half")


def benchmark(
    method: MethodOption = None,
    photos: Annotated[
        Path | None, typer.Option(help="Folder of labelled photos; freshly drawn faces otherwise.")
    ] = None,
    label: Annotated[str, typer.Option(help="Which column of the photos tells the groups.")] = "race",
    subset: Annotated[str, typer.Option(help="Which set of the folder, where it holds several.")] = "",
    per_group: Annotated[int, typer.Option(min=2, max=1000, help="Faces of each group.")] = 12,
    light_fraction: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Drawn faces of a population with this share of light skin instead."),
    ] = None,
    faces: Annotated[int, typer.Option(min=1, max=16, help="How many faces of each photo.")] = 2,
    factor: FactorOption = 4,
    downscale: DownscaleOption = "bicubic-pulse",
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint; the embedded ones otherwise.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path, typer.Option(help="The folder for table and pictures.")] = Path("methods"),
    json_out: JsonOption = False,
) -> None:
    """Compare upsampling methods on one probe: who is served worse by which; nearest and bicubic are always there."""
    given = None if checkpoint is None else load_model(checkpoint)
    chosen = list(METHODS.values()) if not method and given is None else chosen_methods(method, given)
    asked = [with_workers(each, cores()) for each in with_baselines(chosen)]
    size, pairs = pair_with_models(asked, given)
    known = shrinking(downscale, factor, size)
    if photos is None and size < 16:
        raise ConfigError(
            f"drawn faces need 16 pixels, this checkpoint makes {size}; name photos with --photos"
        )
    if photos is not None and light_fraction is not None:
        raise ConfigError("--light-share goes with drawn faces; leave it or --photos out")
    probe = (
        SyntheticProbe(per_group=per_group, light_fraction=light_fraction)
        if photos is None
        else LabelledProbe(folder=photos, set=subset, label=label, per_group=per_group)
    )
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; name a folder for table and pictures")
    torch.set_num_threads(1)
    words = ["fedface", "methods", *(f"--method {name}" for name in method or ())]
    words += [f"--photos {photos} --label {label}"] if photos else []
    words += [f"--set {subset}"] if subset else []
    words += [f"--light-share {light_fraction:g}"] if light_fraction is not None else []
    words += [f"--checkpoint {checkpoint}"] if checkpoint else []
    words += [f"--each {per_group} --faces {faces} --factor {factor} --downscale {downscale} --seed {seed}"]
    with progress_bars() as bars:
        bars.stage("probe", 0)
        record, pictures = benchmark_methods(
            pairs,
            public_faces(probe, seed, size),
            known,
            faces_per_photo=faces,
            seed=seed,
            watcher=bars,
            command=" ".join(words),
        )
    path = method_report.write(record, pictures, out)
    if json_out:
        print(strict.dumps(record))
        return
    _print(record)
    console.print(f"open {path}", highlight=False, soft_wrap=True)
    console.print(f"also {out / 'faces.png'} and {out / 'by-group.png'}", highlight=False, soft_wrap=True)


def _print(record: BenchmarkRecord) -> None:
    console.print(f"{record.probe}; {record.downscale}", highlight=False)
    table = Table(box=None)
    for heading in ("method", *map(formatting.title_of, SHOWN), "darker faces made", "s per face"):
        table.add_column(heading)
    for each in record.methods:
        cells = [_cell(each.bias.overall[name]) for name in SHOWN]
        table.add_row(each.title, *cells, _cell(each.darker_made), f"{each.seconds_per_face:.2g}")
    console.print(table)
    console.print(
        f"share of darker originals: {_cell(record.methods[0].darker_true)}; 95 % intervals over "
        f"{record.photos} photos",
        highlight=False,
    )


def _cell(figure: Measurement) -> str:
    if not isinstance(figure, Interval):
        return "-"
    return f"{formatting.number(figure.estimate)} [{formatting.number(figure.low)}, {formatting.number(figure.high)}]"
