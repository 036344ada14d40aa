"""The command `fedface benchmark`: every upsampling method on one public probe, group by group."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from fedface.atomic_io import locked_folder
from fedface.cli.console import print_json, progress_bars
from fedface.cli.options import (
    CheckpointOption,
    DownscaleOption,
    FactorOption,
    JsonOption,
    MethodOption,
    SeedOption,
    public_path,
)
from fedface.errors import ConfigError


def benchmark(
    method: MethodOption = None,
    photos: Annotated[
        Path | None, typer.Option(help="Folder of labelled photos; default: synthetic faces.")
    ] = None,
    label: Annotated[str, typer.Option(help="The CSV column that names the groups.")] = "race",
    subset: Annotated[str, typer.Option(help="The subset of the folder, where it has several.")] = "",
    per_group: Annotated[int, typer.Option(min=2, max=1000, help="Faces per group.")] = 12,
    light_fraction: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Synthetic faces of a population with this fraction of light skin."),
    ] = None,
    faces: Annotated[int, typer.Option(min=1, max=16, help="Generated faces per photo.")] = 2,
    factor: FactorOption = 4,
    downscale: DownscaleOption = "bicubic-pulse",
    checkpoint: CheckpointOption = None,
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option(help="The folder for table and pictures.")] = Path("benchmark"),
    json_out: JsonOption = False,
) -> None:
    """Compare upsampling methods on one probe, by group.

    Nearest and bicubic are always included.
    """
    import torch

    from fedface.cli.tables import print_benchmark
    from fedface.cli.upsample_job import available_cores, choose_methods, make_degradation
    from fedface.coordinator.method_benchmark import benchmark_methods, with_baselines
    from fedface.experiment import LabelledProbe, SyntheticProbe
    from fedface.models.checkpoint import load_model
    from fedface.public_data.probe import public_faces
    from fedface.reports import method_report
    from fedface.upsampling.methods import METHODS, pair_with_models, with_workers

    given = None if checkpoint is None else load_model(checkpoint)
    chosen = list(METHODS.values()) if not method and given is None else choose_methods(method, given)
    methods = [with_workers(each, available_cores()) for each in with_baselines(chosen)]
    size, pairs = pair_with_models(methods, given)
    degradation = make_degradation(downscale, factor, size)
    if photos is None and size < 16:
        raise ConfigError(
            f"synthetic faces need 16 pixels, this checkpoint generates {size}; use labelled photos (--photos)"
        )
    if photos is not None and light_fraction is not None:
        raise ConfigError("--light-fraction applies to synthetic faces; omit it or --photos")
    probe = (
        SyntheticProbe(per_group=per_group, light_fraction=light_fraction)
        if photos is None
        else LabelledProbe(folder=photos, set=subset, label=label, per_group=per_group)
    )
    torch.set_num_threads(1)
    arguments = ["fedface", "benchmark"]
    for name in method or ():
        arguments += ["--method", name]
    arguments += ["--photos", public_path(photos), "--label", label] if photos else []
    arguments += ["--subset", subset] if subset else []
    arguments += [] if light_fraction is None else ["--light-fraction", f"{light_fraction:g}"]
    arguments += ["--checkpoint", public_path(checkpoint)] if checkpoint else []
    arguments += ["--per-group", str(per_group), "--faces", str(faces), "--factor", str(factor)]
    arguments += ["--downscale", downscale, "--seed", str(seed)]
    with locked_folder(out, "benchmark"), progress_bars() as bars:
        bars.stage("probe", 0)
        record, pictures = benchmark_methods(
            pairs,
            public_faces(probe, seed, size),
            degradation,
            faces_per_photo=faces,
            seed=seed,
            progress=bars,
            command=shlex.join(arguments),
        )
        path = method_report.write(record, pictures, out)
    if json_out:
        print_json(record)
        return
    print_benchmark(record, path)
