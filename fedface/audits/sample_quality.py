"""Quality of generated faces compared with real ones, overall and by group: distances, precision and recall.

Kernel and Frechet distance compare the distributions; precision and density ask whether generated faces look like real
ones, recall and coverage whether every kind of real face is generated. docs/quality.md explains what each detects.

Precision and recall depend on how many faces span the manifolds. All groups are therefore measured at one
count, that of the smallest, over several disjoint draws where a group has more faces.

Sources: Kynkaanniemi et al. 2019 (arXiv:1904.06991) for precision and recall; Naeem et al. 2020
(arXiv:2002.09797) for density and coverage; audits/feature_distances for the distances.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from fedface.audits.feature_distances import (
    BLOCKS,
    Moments,
    faces_to_extrapolate,
    frechet_distance,
    frechet_interval,
    frechet_of_moments,
    jackknife_half_width,
    kernel_distance,
    kernel_interval,
    rows_at_once,
)
from fedface.audits.feature_extractors import Extractor, FeatureIdentity, FeatureSource, open_features
from fedface.measurements import Interval, NotMeasured, rate_interval
from fedface.photos.skin_tone import measure_tone
from fedface.tensor_types import Images

TONE_GROUPS = ("Monk 1-2", "Monk 3-4", "Monk 5-6", "Monk 7-8", "Monk 9-10")
MIN_SAMPLES = 40  # faces a side below which nothing is measured
SPAN_AT_MOST = 4000  # faces that span a manifold: beyond it, time grows with the square and little is learned
_BORDER = 1 + 1e-9  # the k-th neighbour itself is inside its ball, whichever way its distance was rounded
_DRAWS = 5  # disjoint draws of a group with more faces than the smallest one


def tone_groups(images: Images) -> tuple[str, ...]:
    """Each face's group by the Monk tone read from its pixels, two steps to a group: n names of TONE_GROUPS.

    Light and camera are mixed into the reading: it says how a face looks, not whose face it is.

    Args:
        images: Aligned faces (n, 3, h, w), sRGB in [0, 1].
    """
    step = (measure_tone(images).monk + 0.5).floor().clamp(1, 10).long() - 1
    return tuple(TONE_GROUPS[index] for index in (step // 2).tolist())


@dataclass(frozen=True, kw_only=True)
class InsufficientSamples:
    """A metric, or a whole group, that was not measured, and why."""

    kind: ClassVar[str] = "insufficient-samples"

    real: int  # faces
    generated: int
    fewest: int  # needed on each side

    def reason(self) -> NotMeasured:
        return NotMeasured(
            not_measured=f"needs {self.fewest} faces a side, has {self.real} real and {self.generated} generated"
        )

    def __str__(self) -> str:
        return str(self.reason())


@dataclass(frozen=True, kw_only=True)
class Frechet:
    """The Frechet distance three times, because a few faces alone make it large. Squared units of the features."""

    plain: float  # between half of the real faces and as many generated ones; biased upwards
    floor: float  # between the two halves of the real faces: the score of a perfect set at that count
    count: int  # faces on each side of both
    limit: Interval | InsufficientSamples  # extrapolated to infinitely many faces; may fall below 0


@dataclass(frozen=True, kw_only=True)
class ManifoldMetrics:
    """Whether each set lies within the other's manifold; 95 % intervals that are rather too wide."""

    precision: Interval  # share of generated faces within a ball of some real face
    recall: Interval  # share of real faces within a ball of some generated face
    # Mean number of real balls around a generated face, over k; 1 is expected of equal sets.
    density: Interval
    coverage: Interval  # share of real balls with a generated face in them
    coverage_of_equals: float  # expected of a perfect set; see `equal_coverage`
    span: int  # faces a side in each draw: compare only metrics of one span


@dataclass(frozen=True, kw_only=True)
class GroupQuality:
    """All metrics of one group, or of all faces."""

    kind: ClassVar[str] = "group-quality"

    real: int  # faces
    generated: int
    kernel: Interval  # unbiased squared MMD; covers 0 where the sets cannot be distinguished
    frechet: Frechet
    neighbours: ManifoldMetrics


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Generated faces compared with real ones."""

    identity: FeatureIdentity  # metrics of other features must not be compared with these
    k: int  # neighbours that a ball reaches to
    overall: GroupQuality
    groups: dict[str, GroupQuality | InsufficientSamples]  # by name, sorted


@dataclass(frozen=True, kw_only=True)
class GroupedFeatures:
    """Faces as rows of numbers with their groups: for real faces, computed once and used in many comparisons."""

    features: Tensor  # (n, d) float64
    groups: tuple[str, ...]  # n names
    identity: FeatureIdentity

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or len(self.features) != len(self.groups):
            raise ValueError(
                f"features must have shape ({len(self.groups)}, d), got {tuple(self.features.shape)}"
            )

    def group(self, name: str) -> Tensor:
        """The rows of one group, (m, d)."""
        return self.features[torch.tensor([group == name for group in self.groups], dtype=torch.bool)]


def grouped_features(images: Images, groups: Sequence[str], extractor: Extractor) -> GroupedFeatures:
    """Compute features of faces (n, 3, h, w), sRGB in [0, 1], with n names of groups."""
    return GroupedFeatures(
        features=extractor.features(images), groups=tuple(groups), identity=extractor.identity
    )


def quality(
    real: Images,
    real_groups: Sequence[str],
    generated: Images,
    generated_groups: Sequence[str],
    source: FeatureSource,
    rng: np.random.Generator,
    *,
    k: int = 3,
) -> Quality:
    """Compare generated faces with real ones, overall and by group.

    Args:
        real: (n, 3, h, w), sRGB in [0, 1], n >= 40.
        real_groups: n names, of labels or from `tone_groups`.
        generated: (m, 3, h, w), m >= 40; clamped to [0, 1].
        generated_groups: m names, from `tone_groups`: generated faces have no labels.
        rng: Orders the faces before they are split into blocks and draws.
        k: Neighbours that a ball reaches to, 1 <= k <= 10.

    Raises:
        ValueError: an argument is out of bounds, or there are too few faces overall.
        WeightsError, ConfigError: see `open_features`.
    """
    extractor = open_features(source)
    return compare_quality(
        grouped_features(real, real_groups, extractor),
        grouped_features(generated, generated_groups, extractor),
        rng,
        k=k,
    )


def compare_quality(
    real: GroupedFeatures,
    generated: GroupedFeatures,
    rng: np.random.Generator,
    *,
    k: int = 3,
    fewest: int = MIN_SAMPLES,
) -> Quality:
    """As `quality`, from precomputed features.

    Args:
        fewest: Faces a side below which a group is not measured, >= 40; k <= fewest // 4.

    Raises:
        ValueError: as in `quality`, or the two sets have features of different identity.
    """
    if real.identity != generated.identity:
        raise ValueError(f"features differ and cannot be compared: {real.identity}; {generated.identity}")
    if fewest < MIN_SAMPLES:
        raise ValueError(f"fewest must be >= {MIN_SAMPLES}, got {fewest}")
    if not 1 <= k <= fewest // 4:
        raise ValueError(f"k must lie in [1, {fewest // 4}] for {fewest} faces, got {k}")
    if min(len(real.groups), len(generated.groups)) < fewest:
        counts = f"{len(real.groups)} real and {len(generated.groups)} generated"
        raise ValueError(f"each set needs at least {fewest} faces, got {counts}")
    names = sorted({*real.groups, *generated.groups})
    pairs = {
        name: (_shuffled(real.group(name), rng), _shuffled(generated.group(name), rng)) for name in names
    }
    enough = {name: min(len(a), len(b)) for name, (a, b) in pairs.items() if min(len(a), len(b)) >= fewest}
    span = min(enough.values(), default=fewest)
    return Quality(
        identity=real.identity,
        k=k,
        overall=_measure(_shuffled(real.features, rng), _shuffled(generated.features, rng), k, SPAN_AT_MOST),
        groups={
            name: _measure(a, b, k, span)
            if name in enough
            else InsufficientSamples(real=len(a), generated=len(b), fewest=fewest)
            for name, (a, b) in pairs.items()
        },
    )


def _shuffled(features: Tensor, rng: np.random.Generator) -> Tensor:
    return features[torch.from_numpy(rng.permutation(len(features)))]


def _measure(real: Tensor, generated: Tensor, k: int, span: int) -> GroupQuality:
    side = min(len(real) // 2, len(generated))
    needed = faces_to_extrapolate(real.shape[1])
    few = InsufficientSamples(real=len(real), generated=len(generated), fewest=needed)
    return GroupQuality(
        real=len(real),
        generated=len(generated),
        kernel=kernel_interval(real, generated),
        frechet=Frechet(
            plain=frechet_distance(real[:side], generated[:side]),
            floor=frechet_distance(real[:side], real[side : 2 * side]),
            count=side,
            limit=frechet_interval(real, generated) if min(len(real), len(generated)) >= needed else few,
        ),
        neighbours=measure_manifold(
            real, generated, k=k, span=min(span, len(real), len(generated), SPAN_AT_MOST)
        ),
    )


def measure_manifold(real: Tensor, generated: Tensor, *, k: int, span: int) -> ManifoldMetrics:
    """Precision, recall, density and coverage, each with an interval by the jackknife over blocks.

    Args:
        real: (n, d), n >= span, in random order: draws are consecutive rows.
        generated: (m, d), m >= span, in random order.
        k: Neighbours that a ball reaches to; the tenth part of a draw that is left out must leave more than k.
        span: Faces a side in a draw, at least 20.
    """
    if not 2 * BLOCKS <= span <= min(len(real), len(generated)):
        raise ValueError(f"span must lie in [{2 * BLOCKS}, {min(len(real), len(generated))}], got {span}")
    draws = min(_DRAWS, len(real) // span, len(generated) // span)
    rest = [np.delete(np.arange(span), part) for part in np.array_split(np.arange(span), BLOCKS)]
    estimates, halves = [], []
    for start in range(0, draws * span, span):
        x, y = real[start : start + span], generated[start : start + span]
        estimates.append(manifold_metrics(x, y, k=k))
        halves.append(jackknife_half_width(np.array([manifold_metrics(x[i], y[i], k=k) for i in rest])))
    estimate = np.mean(estimates, axis=0)
    half = np.sqrt(np.mean(np.square(halves), axis=0) / draws)
    count = draws * span
    precision, recall, density, coverage = (
        Interval(float(middle), max(0.0, float(middle - width)), float(middle + width), count)
        for middle, width in zip(estimate, half, strict=True)
    )
    return ManifoldMetrics(
        precision=_as_rate(precision),
        recall=_as_rate(recall),
        density=density,
        coverage=_as_rate(coverage),
        coverage_of_equals=equal_coverage(span, span, k=k),
        span=span,
    )


def _as_rate(interval: Interval) -> Interval:
    """Inside [0, 1], and nowhere narrower than Wilson's interval, which is never of zero width."""
    wilson = rate_interval(interval.estimate * interval.count, interval.count)
    low, high = min(interval.low, wilson.low), min(1.0, max(interval.high, wilson.high))
    return Interval(interval.estimate, low, high, interval.count)


def equal_coverage(real: int, generated: int, *, k: int) -> float:
    """The coverage expected of two sets from one source, by counting ranks: 1 - prod_i (n - i) / (n + m - i).

    Source: Naeem et al. 2020, Lemma 2. The expected density is 1 at any count.
    """
    return 1 - math.prod((real - i) / (real + generated - i) for i in range(1, k + 1))


def manifold_metrics(real: Tensor, generated: Tensor, *, k: int) -> tuple[float, float, float, float]:
    """Precision, recall, density and coverage of one draw: (n, d) and (m, d), both longer than k.

    A ball around a face reaches to the k-th nearest other face of its own set, the border included. Tables of
    distances are computed in blocks of bounded size.
    """
    if not 1 <= k < min(len(real), len(generated)):
        raise ValueError(f"k must lie in [1, {min(len(real), len(generated)) - 1}], got {k}")
    centre = real.mean(dim=0)  # near the origin, squared distances from inner products lose fewer digits
    x, y = (real - centre).double(), (generated - centre).double()
    reach_x, reach_y = _reach(x, k), _reach(y, k)
    recalled, covered = torch.zeros(len(x), dtype=torch.bool), torch.zeros(len(x), dtype=torch.bool)
    precise = inside = 0
    step = rows_at_once(len(x))
    for start in range(0, len(y), step):
        table = _squared_distances(y[start : start + step], x)
        hit = table <= reach_x
        precise += int(hit.any(dim=1).sum())
        inside += int(hit.sum())
        covered |= hit.any(dim=0)
        recalled |= (table <= reach_y[start : start + step, None]).any(dim=0)
    recall, coverage = float(recalled.double().mean()), float(covered.double().mean())
    return precise / len(y), recall, inside / (k * len(y)), coverage


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    lengths = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
    return torch.addmm(lengths, a, b.T, alpha=-2).clamp(min=0)


def _reach(x: Tensor, k: int) -> Tensor:
    """The squared distance of each row to its k-th nearest other row, (n,)."""
    reach = torch.empty(len(x), dtype=x.dtype)
    step = rows_at_once(len(x))
    for start in range(0, len(x), step):
        table = _squared_distances(x[start : start + step], x)
        table.diagonal(offset=start).fill_(math.inf)
        reach[start : start + step] = table.topk(k, dim=1, largest=False).values[:, -1]
    return reach * _BORDER


@dataclass(frozen=True, kw_only=True)
class StreamComparison:
    """Two streams of faces compared without storing them."""

    identity: FeatureIdentity
    frechet: float  # of all faces; biased upwards by about c / count
    kernel: Interval  # the mean over pairs of batches; its count is the faces in those
    real: int  # faces
    generated: int


def compare_streams(
    real: Iterable[Images], generated: Iterable[Images], source: FeatureSource
) -> StreamComparison:
    """Compare faces that arrive in batches: memory is a batch on each side and two covariances.

    Args:
        real: Batches (b, 3, h, w) of at least two faces each, in random order; at least two batches.
        generated: The same. Batches are paired for the kernel distance as long as both last; all count for the other.

    Raises:
        ValueError: fewer than two batches a side, or a batch of one face.
    """
    extractor = open_features(source)
    kernels, paired = [], 0
    rows_real, rows_generated = (iter(map(extractor.features, batches)) for batches in (real, generated))
    moments: list[Moments | None] = [None, None]
    while True:
        pair = [next(rows_real, None), next(rows_generated, None)]
        if pair[0] is None and pair[1] is None:
            break
        for side, rows in enumerate(pair):
            if rows is not None:
                seen, new = moments[side], Moments.of(rows)
                moments[side] = new if seen is None else seen.merge(new)
        if pair[0] is not None and pair[1] is not None:
            kernels.append(kernel_distance(pair[0], pair[1]))
            paired += min(len(pair[0]), len(pair[1]))
    a, b = moments
    if a is None or b is None or len(kernels) < 2:
        raise ValueError(f"each stream needs at least two batches, got {len(kernels)} pairs")
    mean = float(np.mean(kernels))
    half = float(stats.t.ppf(0.975, len(kernels) - 1) * np.std(kernels, ddof=1)) / math.sqrt(len(kernels))
    return StreamComparison(
        identity=extractor.identity,
        frechet=frechet_of_moments(a, b),
        kernel=Interval(mean, mean - half, mean + half, paired),
        real=a.count,
        generated=b.count,
    )
