"""Upsampling methods on one public probe: degrade, upsample, compare by group, with nearest and bicubic as baselines.

No device takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import torch

from fedface.audits.bias import DARKER_FROM
from fedface.audits.feature_distances import face_distance
from fedface.audits.group_metrics import mean_interval
from fedface.codec import encode
from fedface.coordinator.rounds import ProgressListener
from fedface.coordinator.server_metrics import MIN_FACES, MethodEvaluation, evaluate_on_probe, examples
from fedface.experiment import UpsamplingConfig
from fedface.measurements import Measurement, NotMeasured, rate_interval
from fedface.models.model import Model
from fedface.photos.skin_tone import measure_tone
from fedface.public_data.probe import PublicProbe
from fedface.randomness import Streams
from fedface.reports import method_report
from fedface.reports.charts import face_grid
from fedface.reports.method_report import BenchmarkRecord, MethodMetrics
from fedface.reports.run_record import MachineRecord, installed_versions
from fedface.upsampling.degradation import Degradation, format_degradation
from fedface.upsampling.methods import BASELINES, Method, is_deterministic, name_of, title_of
from fedface.upsampling.upsampler import pixel_std


def with_baselines(methods: Sequence[Method]) -> list[Method]:
    """The methods, with nearest and bicubic appended unless included."""
    return [*methods, *(each for each in BASELINES if name_of(each) not in map(name_of, methods))]


def benchmark_methods(
    pairs: Sequence[tuple[Method, Model | None]],
    probe: PublicProbe,
    downscale: Degradation,
    *,
    faces_per_photo: int,
    seed: int,
    progress: ProgressListener,
    command: str,
) -> tuple[BenchmarkRecord, dict[str, bytes]]:
    """Run every method on the same photos.

    Args:
        pairs: Each method with its checkpoint.
        probe: At least two public faces with their groups.
        downscale: The degradation of the photos, which every search inverts.
        faces_per_photo: Faces per photo, >= 1; deterministic methods give one.
        seed: Of starting points, samples and bootstrap resamples.

    Returns:
        The record, and images by name, PNG.

    Raises:
        ConfigError: A method does not support its checkpoint or the downscale.
    """
    found: list[MethodMetrics] = []
    chosen = examples(probe)
    rows = [("original", probe.images[chosen])]
    for number, (method, model) in enumerate(pairs):
        progress.stage(f"{title_of(method)} on {len(probe.images)} faces", 1000)
        faces = 1 if is_deterministic(method) else faces_per_photo
        config = UpsamplingConfig(downscale=downscale, method=method, faces_per_photo=faces)
        served = evaluate_on_probe(
            model,
            probe,
            config,
            method,
            seed,
            lambda done, of: progress.advance(round(1000 * done / max(1, of))),
        )
        found.append(_metrics(served, probe, served.seconds / (len(probe.images) * faces), seed))
        if number == 0:
            side = served.low.shape[-1]
            rows.append((f"input,\n{side} x {side}", served.low[chosen].clamp(0, 1)))
        rows.append((title_of(method).replace(" from ", "\nfrom "), served.upsampled.images[chosen, 0]))
    record = BenchmarkRecord(
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        versions=installed_versions(),
        machine=MachineRecord.here(),
        probe=probe.description,
        downscale=format_degradation(downscale),
        photos=len(probe.images),
        seed=seed,
        methods=tuple(found),
    )
    pictures = {
        "faces": face_grid(rows, [probe.groups[i] for i in chosen], side=96),
        "by-group": method_report.by_group(record),
    }
    return record, pictures


def _metrics(served: MethodEvaluation, probe: PublicProbe, seconds: float, seed: int) -> MethodMetrics:
    streams = Streams(seed).child("methods")
    generated = served.upsampled.images
    first = generated[:, 0]
    distance: Measurement = NotMeasured(not_measured=f"needs {MIN_FACES} faces to compare with")
    if len(first) >= MIN_FACES:
        distance = face_distance(probe.images, first, streams.numpy("blocks"))
    spread: Measurement = NotMeasured(not_measured="only one face per photo was generated")
    if generated.shape[1] > 1:
        each = torch.stack([pixel_std(faces).mean() for faces in generated])
        spread = mean_interval(each.double().numpy(), streams.numpy("spread"))
    true, dark = probe.tone.monk >= DARKER_FROM, measure_tone(first).monk >= DARKER_FROM
    return MethodMetrics(
        method=name_of(served.method),
        title=title_of(served.method),
        settings=encode(served.method),
        weights_hash=served.bias.weights_hash,
        bias=served.bias,
        distance=distance,
        spread=spread,
        darker_true=rate_interval(int(true.sum()), len(true)),
        darker_generated=rate_interval(int(dark.sum()), len(dark)),
        seconds_per_face=seconds,
    )
