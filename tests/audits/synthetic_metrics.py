"""Metrics of photos sampled from known distributions in three tone groups, and the server's estimates of them. No
images are needed to test the coverage of intervals.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fedface.audits.dp_metric_estimates import DPMetricEstimates, estimate_metrics
from fedface.audits.dp_metrics import LocalMetricsConfig, PhotoMetrics, metric_vectors
from fedface.tensor_types import Vector

CONFIG = LocalMetricsConfig()
LIGHT, MEDIUM, DARK = CONFIG.groups
CLIP = 2.5  # any: metrics must not depend on it

# Three groups of known frequency. Ranged values are Beta(a, b) on their range, whose mean is a / (a + b).
FREQUENT = np.array([0.5, 0.3, 0.2])
BETA = {
    "consistency_error": [(1.0, 9.0), (1.5, 8.5), (3.0, 7.0)],
    "skin_difference": [(2.0, 8.0), (3.0, 7.0), (4.0, 6.0)],
    "lightness_shift": [(10.0, 10.0), (11.0, 9.0), (12.0, 8.0)],
}
FOUND = np.array([0.98, 0.95, 0.8])
GENERATED = np.array(
    [[0.9, 0.08, 0.02], [0.15, 0.8, 0.05], [0.05, 0.25, 0.7]]
)  # rows: original, columns: generated


def sampled(count: int, rng: np.random.Generator) -> PhotoMetrics:
    """Photos from the distributions above."""
    group = rng.choice(3, size=count, p=FREQUENT)
    values = {}
    for name, shapes in BETA.items():
        low, high = CONFIG.range_of(name)
        a, b = np.array(shapes)[group].T
        values[name] = torch.from_numpy(low + (high - low) * rng.beta(a, b))
    return PhotoMetrics(
        group=torch.from_numpy(group),
        output_group=torch.from_numpy(
            (rng.random(count)[:, None] > GENERATED.cumsum(1)[group]).sum(1).clip(0, 2)
        ),
        detected=torch.from_numpy(rng.random(count) < FOUND[group]),
        **values,
    )


def truths() -> dict[tuple[str, str], float]:
    """The expected metrics of infinitely many photos, by group and metric."""
    by_group = {
        name: np.array([low + (high - low) * a / (a + b) for a, b in shapes])
        for name, shapes in BETA.items()
        for low, high in [CONFIG.range_of(name)]
    }
    by_group |= {"detected": FOUND, "same_group": GENERATED.diagonal()}
    known = {
        (group, name): value
        for name, values in by_group.items()
        for group, value in zip(CONFIG.groups, values.tolist(), strict=True)
    }
    return known | {("all", name): float(values @ FREQUENT) for name, values in by_group.items()}


def total_of(photos: PhotoMetrics, config: LocalMetricsConfig = CONFIG) -> Vector:
    return metric_vectors(photos, config, clip_norm=CLIP).double().sum(0)


def read(
    total: Vector, *, sigma: float = 0.0, devices: int = 1, config: LocalMetricsConfig = CONFIG
) -> DPMetricEstimates:
    return estimate_metrics(total, config=config, clip_norm=CLIP, noise_multiplier=sigma, devices=devices)


def release(photos: PhotoMetrics, sigma: float, devices: int, rng: np.random.Generator) -> DPMetricEstimates:
    """The server's estimates after `devices` devices added their noise; reproducible: nothing is private here."""
    noise = sigma * CLIP * math.sqrt(devices) * rng.standard_normal(CONFIG.width)
    return read(total_of(photos) + torch.from_numpy(noise), sigma=sigma, devices=devices)


def members(photos: PhotoMetrics, chosen: Tensor) -> PhotoMetrics:
    return PhotoMetrics(**{name: getattr(photos, name)[chosen] for name in vars(photos)})


def even(each: int = 100, **values: float) -> PhotoMetrics:
    """Equally many photos in each group, all served equally well except for the given values."""
    group = torch.arange(3).repeat_interleave(each)
    generated = {"consistency_error": 0.001, "skin_difference": 4.0, "lightness_shift": 0.0, **values}
    return PhotoMetrics(
        group=group,
        output_group=group,
        detected=torch.ones(3 * each, dtype=torch.bool),
        **{name: torch.full((3 * each,), value) for name, value in generated.items()},
    )
