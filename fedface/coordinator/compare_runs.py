"""A comparison: every run of a sweep, without its audits, and metrics and images of the samples of each.

Each run has a folder of its own and is finished once its metrics are there, so that an interrupted comparison continues
where it stopped, also in the middle of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import torch

from fedface.atomic_io import replace_bytes, replace_text
from fedface.audits.bias import tone_histogram
from fedface.audits.feature_extractors import ColourFeatures, open_features
from fedface.audits.sample_quality import quality, tone_groups
from fedface.audits.tone_distance import tone_distance
from fedface.codec import dumps, load
from fedface.coordinator.rounds import ProgressListener, epsilon_spent, run_rounds
from fedface.coordinator.run import check_same, initialize_run
from fedface.coordinator.run_state import RunState, weights_path
from fedface.coordinator.server_metrics import upsample_with
from fedface.errors import ConfigError
from fedface.experiment import Experiment, SyntheticDevices, devices_folder
from fedface.measurements import NotMeasured
from fedface.messages.cohort import Cohort
from fedface.models.checkpoint import load_model, weights_hash
from fedface.models.model import Model
from fedface.photos.skin_tone import measure_tone
from fedface.public_data.device_photos import describe_devices, device_faces
from fedface.randomness import Streams
from fedface.reports import comparison_charts, comparison_report
from fedface.reports.comparison_report import UNTRAINED, ComparedRun, ComparisonRecord, ModelQuality
from fedface.reports.run_record import MachineRecord, installed_versions
from fedface.sweep import Sweep, Variant, level_of
from fedface.tensor_types import Images
from fedface.training.training_methods import common_streams, prepare_round

MEASURED_ON = 2  # increase when the same samples would give other metrics
FACES = 600  # samples of each model, and faces on either side of the reference
SHOWN = 12  # samples in a row of the image

CohortOf = Callable[[Experiment, Path], Cohort]  # an experiment and the folder of its devices' states


@dataclass(frozen=True)
class _Reference:
    """Faces like the devices', in three sets."""

    faces: Images  # to compare with
    second: Images  # the score of a perfect generator
    inputs: Images  # inputs of upsamplers, degraded


def compare_runs(
    sweep: Sweep,
    folder: Path,
    cohort_of: CohortOf,
    *,
    progress: ProgressListener,
    command: str = "",
    faces: int = FACES,
) -> ComparisonRecord:
    """Run what is not finished, measure every model in the same way, and write tables and charts.

    Args:
        sweep: The runs.
        folder: For all of them, each in `runs/NAME`; started before or not.
        cohort_of: Makes the devices of one run.
        faces: Samples of each model, and faces on either side of the reference, >= 40.

    Returns:
        The record; `comparison.json`, `comparison.md` and the charts are in the folder.

    Raises:
        RunError: The folder holds runs of another experiment.
        ConfigError: The devices' faces are private, so there is no reference to compare with.
    """
    for variant in sweep.variants:
        # Fail now rather than after hours if a checkpoint is missing or of another family.
        variant.experiment.training.check(variant.experiment.start().architecture)
    runs: list[ComparedRun] = []
    for number, variant in enumerate(sweep.variants, 1):
        progress.message(
            f"run {number} of {len(sweep.variants)}: {', '.join(variant.names) or variant.method}"
        )
        runs += [_base(variant, folder, faces, progress), _one(variant, folder, cohort_of, faces, progress)]
    first = sweep.variants[0].experiment
    truth = _reference(first, first.start().size, faces)
    record = ComparisonRecord(
        name=sweep.name,
        question=sweep.question,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        versions=installed_versions(),
        machine=MachineRecord.here(),
        devices=_devices(first),
        features=f"Distances, precision and recall are computed from {open_features(ColourFeatures()).identity.name}: "
        "they cannot be compared with published FID or KID, only with each other.",
        reference=_metrics(truth.second, "reference", truth, first.seed),
        # Each once: the untrained model belongs to every epsilon of its method.
        runs=tuple({(run.method, run.level, run.seed): run for run in runs}.values()),
    )
    progress.stage("pictures", 1)
    comparison_report.write(record, folder)
    _draw(record, sweep, folder, truth)
    progress.advance(1)
    return record


def _one(
    variant: Variant, folder: Path, cohort_of: CohortOf, faces: int, progress: ProgressListener
) -> ComparedRun:
    """Finish one run, or read its metrics from the disk."""
    place = folder / "runs" / variant.folder
    experiment, stored = variant.experiment, place / f"metrics-{_measure_name(faces)}.json"
    if not (place / "state.json").exists():
        initialize_run(experiment, place)
    check_same(experiment, place)
    if stored.exists():
        return load(ComparedRun, stored)
    plan = experiment.plan()
    cohort = cohort_of(experiment, devices_folder(folder) / variant.folder)
    state = run_rounds(experiment, plan, cohort, RunState.read(place), None, progress)
    final = load_model(weights_path(place, experiment.rounds))
    work = prepare_round(final, experiment.training, plan.dp_parameters, common_streams(experiment.seed, 0))
    run = ComparedRun(
        method=variant.method,
        level=level_of(experiment),
        epsilon=epsilon_spent(plan, experiment.rounds),
        seed=experiment.seed,
        noise_multiplier=plan.noise_multiplier,
        numbers_up=len(work.ranges()),
        bytes_up=sum(record.bytes_up for record in state.rounds),
        seconds=sum(record.seconds for record in state.rounds),
        model=_measure(final, experiment, faces, progress),
    )
    replace_text(stored, dumps(run))
    return run


def _base(variant: Variant, folder: Path, faces: int, progress: ProgressListener) -> ComparedRun:
    """The metrics of a method's public model before any round, measured once."""
    experiment = variant.experiment
    base = experiment.start()
    stored = (
        folder / "bases" / f"{weights_hash(*base.modules())}-{experiment.seed}-{_measure_name(faces)}.json"
    )
    if stored.exists():
        model = load(ModelQuality, stored)
    else:
        model = _measure(base, experiment, faces, progress)
        stored.parent.mkdir(parents=True, exist_ok=True)
        replace_text(stored, dumps(model))
    return ComparedRun(
        method=variant.method,
        level=UNTRAINED,
        epsilon=NotMeasured(not_measured="no photo was used"),
        seed=experiment.seed,
        noise_multiplier=0.0,
        numbers_up=0,
        bytes_up=0,
        seconds=0.0,
        model=model,
    )


def _measure_name(faces: int) -> str:
    """The name of a measurement: metrics depend on the number of faces and on the version of the code."""
    return f"{faces}-{MEASURED_ON}"


def _measure(model: Model, experiment: Experiment, faces: int, progress: ProgressListener) -> ModelQuality:
    progress.stage("samples", 1)
    generated = _sampled(model, experiment, faces)
    truth = _reference(experiment, model.size, faces)
    return _metrics(generated, weights_hash(*model.modules()), truth, experiment.seed)


def _sampled(model: Model, experiment: Experiment, count: int) -> Images:
    """Samples, generated in two halves in parallel; deterministic in weights and seed."""
    halves = [count // 2, count - count // 2]
    streams = Streams(experiment.seed).child("compared samples")

    def draw(number: int) -> Images:
        rng = streams.generator(str(number))
        if model.is_upsampler:
            inputs = _reference(experiment, model.size, count).inputs[number * halves[0] :]
            return upsample_with(model, inputs[: halves[number]], experiment.upsampling.downscale)
        return model.generator.sample(halves[number], rng)

    with ThreadPoolExecutor(2) as pool:
        return torch.cat(list(pool.map(draw, range(2))))


def _metrics(generated: Images, name: str, truth: _Reference, seed: int) -> ModelQuality:
    streams = Streams(seed).child("compared metrics")
    readings, true = measure_tone(generated).monk.double(), measure_tone(truth.faces).monk.double()
    found = quality(
        truth.faces,
        tone_groups(truth.faces),
        generated,
        tone_groups(generated),
        ColourFeatures(),
        streams.numpy("quality"),
    )
    return ModelQuality(
        weights_hash=name,
        tones=tone_histogram(generated),
        tone_distance=tone_distance(readings.numpy(), true.numpy(), streams.numpy("tones")),
        quality=found,
    )


@lru_cache(maxsize=4)
def _reference(experiment: Experiment, size: int, faces: int) -> _Reference:
    everyone, inputs = (
        device_faces(experiment, 2 * faces, size),
        device_faces(experiment, faces, size, part=2),
    )
    if everyone is None or inputs is None:
        raise ConfigError(
            "devices: the photos of remote devices are private; compare with synthetic or labelled devices"
        )
    half = len(everyone) // 2
    return _Reference(everyone[:half], everyone[half : 2 * half], inputs)


def _devices(experiment: Experiment) -> str:
    everyone = describe_devices(experiment)
    photos = sorted({count for _, _, count in everyone})
    each = f"{photos[0]} to {photos[-1]}" if len(photos) > 1 else f"{photos[0]}"
    start = f"{len(everyone)} devices with {each} photos each"
    match experiment.devices:
        case SyntheticDevices(light_fractions=shares):
            return (
                f"{start}: synthetic faces, of which {sum(shares) / len(shares):.0%} have light skin (Monk 1-5), from "
                f"{max(shares):.0%} on the lightest device to {min(shares):.0%} on the darkest. Tone is estimated from "
                "pixels, so every metric includes light and camera."
            )
        case _:
            return f"{start}: {'; '.join(dict.fromkeys(text for _, text, _ in everyone))}."


def _draw(record: ComparisonRecord, sweep: Sweep, folder: Path, truth: _Reference) -> None:
    pictures = {
        "against-epsilon": comparison_charts.against_epsilon(record),
        "tones": comparison_charts.tone_histograms(record),
        "by-group": comparison_charts.by_group(record),
        "samples": comparison_charts.samples(_rows(record, sweep, folder), truth.second[:SHOWN]),
    }
    for name, png in pictures.items():
        replace_bytes(folder / f"{name}.png", png)


def _rows(record: ComparisonRecord, sweep: Sweep, folder: Path) -> dict[str, Images]:
    """A row of samples for each method and epsilon, of the first seed, from the same latents per architecture."""
    rows: dict[str, Images] = {}
    for method in record.methods():
        mine = [variant for variant in sweep.variants if variant.method == method]
        seed = mine[0].experiment.seed
        rows[f"{method}, epsilon 0"] = _sampled(mine[0].experiment.start(), mine[0].experiment, SHOWN)
        by_level = {level_of(v.experiment): v for v in mine if v.experiment.seed == seed}
        for level in record.levels():
            if level in by_level:
                variant = by_level[level]
                path = weights_path(folder / "runs" / variant.folder, variant.experiment.rounds)
                rows[f"{method}, epsilon {level}"] = _sampled(load_model(path), variant.experiment, SHOWN)
    return rows
