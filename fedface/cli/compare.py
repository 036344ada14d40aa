"""The command that compares several runs of one question."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from fedface.cli.console import JsonOption, console, progress_bars
from fedface.cli.run import PhotosOption, SetOption, changes_of, command_of
from fedface.coordinator.compare_runs import compare_runs
from fedface.coordinator.run_folder import locked, new_folder, resume_comparison
from fedface.errors import ConfigError
from fedface.experiment import RemoteDevices
from fedface.public_data.labelled_sets import check_sources
from fedface.reports import strict
from fedface.reports.comparison_report import METRICS, TITLES, ComparisonRecord
from fedface.reports.measurements import Interval, Measurement
from fedface.simulation.in_process import in_process_cohort
from fedface.sweep import read_sweep


def compare(
    experiment: Annotated[Path, typer.Argument(help="The experiment's YAML file, with the key vary.")],
    photos: PhotosOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the comparison; runs/NAME, or the next free, otherwise.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the comparison that was cut short; finished runs stay.")
    ] = False,
    set: SetOption = None,
    json_out: JsonOption = False,
) -> None:
    """Run every combination that a file varies, and compare what their models make."""
    changes = changes_of(set)
    sweep = read_sweep(experiment, photos=photos, changes=changes)
    for variant in sweep.variants:
        if isinstance(variant.experiment.devices, RemoteDevices):
            raise ConfigError(f"{experiment}: waits for real devices, whose photos nobody can compare with")
        check_sources(variant.experiment)
    # Devices train side by side, each in one thread: small networks leave a second one idle.
    torch.set_num_threads(1)
    folder = resume_comparison(sweep.name, out) if resume else new_folder(sweep.name, out)
    if not resume and (folder / "runs").exists():
        raise ConfigError(
            f"{folder}: holds a comparison; continue it with --resume, or choose another folder"
        )
    with locked(folder), progress_bars() as bars:
        record = compare_runs(
            sweep,
            folder,
            in_process_cohort,
            watcher=bars,
            command=command_of("compare", experiment, photos, changes),
        )
    if json_out:
        print(strict.dumps(record))
        return
    _print(record, folder)


def _print(record: ComparisonRecord, folder: Path) -> None:
    console.print(record.question, style="bold", highlight=False)
    table = Table(box=None)
    for heading in ("way", "epsilon", "runs", *(TITLES[measure] for measure in METRICS)):
        table.add_column(heading)
    for way in record.ways():
        for level in record.levels():
            runs = record.chosen(way, level)
            if runs:
                cells = [_cell(record.over_seeds(way, level, measure)) for measure in METRICS]
                table.add_row(way, level, str(len(runs)), *cells)
    console.print(table)
    console.print(
        "epsilon 0: the public model, untouched; ∞: no noise; a promised epsilon is an upper bound, per unit of the "
        "promise, at the delta in the table's file",
        highlight=False,
    )
    console.print(f"open {folder / 'comparison.md'}", highlight=False, soft_wrap=True)


def _cell(figure: Measurement) -> str:
    if not isinstance(figure, Interval):
        return "-"
    return f"{figure.estimate:.3f} [{figure.low:.3f}, {figure.high:.3f}]"
