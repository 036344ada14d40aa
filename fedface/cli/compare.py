"""The command `fedface compare`: every combination that an experiment varies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedface.atomic_io import locked_folder
from fedface.cli.console import print_json, progress_bars
from fedface.cli.options import JsonOption, PhotosOption, SetOption, command_line, parse_changes
from fedface.errors import ConfigError


def compare(
    experiment: Annotated[Path, typer.Argument(help="The experiment's YAML file, with the key `vary`.")],
    photos: PhotosOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the comparison; default: runs/NAME, or the next free one.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted comparison; finished runs are reused.")
    ] = False,
    set: SetOption = None,
    json_out: JsonOption = False,
) -> None:
    """Run every combination that an experiment varies."""
    import torch

    from fedface.cli.tables import print_comparison
    from fedface.coordinator.compare_runs import compare_runs
    from fedface.coordinator.run_folder import new_folder, resume_comparison
    from fedface.public_data.labelled_sets import check_simulated
    from fedface.simulation.in_process import in_process_cohort
    from fedface.sweep import read_sweep

    changes = parse_changes(set)
    sweep = read_sweep(experiment, photos=photos, changes=changes)
    for variant in sweep.variants:
        check_simulated(variant.experiment, experiment)
    # Devices train in parallel, one thread each: small networks gain nothing from a second one.
    torch.set_num_threads(1)
    folder = resume_comparison(sweep.name, out) if resume else new_folder(sweep.name, out)
    if not resume and (folder / "runs").exists():
        raise ConfigError(
            f"{folder}: contains a comparison; continue it with --resume, or choose another folder"
        )
    with locked_folder(folder, "comparison"), progress_bars() as bars:
        record = compare_runs(
            sweep,
            folder,
            in_process_cohort,
            progress=bars,
            command=command_line("compare", experiment, photos, changes),
        )
    if json_out:
        print_json(record)
        return
    print_comparison(record, folder)
