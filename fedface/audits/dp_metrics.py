"""How well a device's own photos are served, as one vector per photo whose L2 norm is bounded by construction.

A device records the release, sums the vectors and adds noise to the sum (for the unit library the server does);
audits/dp_metric_estimates turns the total of all devices into metrics with intervals. No labels: groups are skin tones
measured from pixels.

A photo of tone group g whose generated face reads as group h, and whose metric k lies at x_k after its public range
is mapped to [-1, 1], adds

    v = clip_norm * (sqrt(a_table) e_gh,  sqrt(a_k) x_k e_g,  sqrt(a_k) (1 - x_k^2) e_g for each k),  sum a = 1

* The table of counts (rows: the original, columns: the generated face) gives the counts of originals in its row sums,
  of generated faces in its column sums, and of faces that keep their tone on its diagonal.
* x is centred, so that the error of a mean does not grow with the mean's distance from zero.
* The spread of photos, which an interval must include, costs no noise: x^2 + (1 - x^2)^2 = 1 - x^2 (1 - x^2) <= 1, so
  that the second number fits into the norm that the first leaves. Without it a spread could only be bounded by the
  range (Bhatia & Davis 2000), several times too wide. A yes or no is x = 1 or -1, and its spread follows from its mean.
* So a photo's squared norm lies between 1 - (a quarter of the shares of ranged metrics) and 1, in clip norms: clipping
  changes nothing.

Noise of standard deviation s changes a mean of n photos by s / (n sqrt(a_k)) half ranges, and a count of G groups by
s sqrt(G / a_table): few groups and narrow ranges make metrics precise.
Source: Dwork & Roth (2014), Theorem A.1 (Gaussian sums); Bhatia & Davis (2000), Am. Math. Monthly 107.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedface.photos.skin_tone import ToneReading, delta_e, measure_tone
from fedface.privacy.mechanism import ClipNorm
from fedface.privacy.plan import MAX_EXPECTED_BATCH_SIZE
from fedface.privacy_units import Unit
from fedface.tensor_types import Images, Vector
from fedface.validation import In, check, checked

RANGED_METRICS = ("consistency_error", "skin_difference", "lightness_shift")  # with a public range
_GROUP_NAMES = {2: ("lighter", "darker"), 3: ("light", "medium", "dark")}


@dataclass(frozen=True, kw_only=True)
@checked
class BudgetShares:
    """How the squared norm of a photo's vector is divided; each in (0, 1), 1 together.

    Errors are 1 / sqrt(a); the table has more, since its counts are the denominators of all means.
    """

    table: Annotated[float, In("(0, 1)")] = 0.4  # counts of originals by generated faces
    consistency_error: Annotated[float, In("(0, 1)")] = 0.15
    skin_difference: Annotated[float, In("(0, 1)")] = 0.15
    lightness_shift: Annotated[float, In("(0, 1)")] = 0.15
    detected: Annotated[float, In("(0, 1)")] = 0.15

    def __post_init__(self) -> None:
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        if not abs(sum(parts.values()) - 1.0) <= 1e-9:
            raise ValueError(f"shares must be 1 together, got {sum(parts.values()):.9g}")


@dataclass(frozen=True, kw_only=True)
@checked
class LocalMetricsConfig:
    """What devices measure and how it is encoded; every number is public and the same on all devices.

    A value outside its range counts as the range's end: choose a range that holds nearly all photos, and no wider,
    since noise grows with it.
    """

    tone_upper_bounds: tuple[int, ...] = (3, 6, 10)  # darkest Monk tone of each group, lightest group first
    consistency_error: tuple[float, float] = (0.0, 0.02)  # mean squared difference after the downscale
    skin_difference: tuple[float, float] = (0.0, 25.0)  # dE00 between the skin of generated face and original
    lightness_shift: tuple[float, float] = (-25.0, 25.0)  # generated minus original, L*; positive is lighter
    shares: BudgetShares = field(default_factory=BudgetShares)
    # The least noised count of units that is reported.
    min_group_size: Annotated[int, In(f"[1, {MAX_EXPECTED_BATCH_SIZE}]")] = 20
    # Of one device, public: larger sums are clamped by quantisation.
    max_units: Annotated[int, In(f"[1, {MAX_EXPECTED_BATCH_SIZE}]")] = 2000
    # Of one device, public: for `minimum_detectable_gap`.
    expected_units: Annotated[int, In(f"[1, {MAX_EXPECTED_BATCH_SIZE}]")] = 200

    def __post_init__(self) -> None:
        tones = self.tone_upper_bounds
        if not tones or list(tones) != sorted(set(tones)) or tones[0] < 1 or tones[-1] != 10:
            raise ValueError(
                f"tone_upper_bounds must be Monk tones 1 to 10, rising, the last 10; got {list(tones)}"
            )
        for name in RANGED_METRICS:
            ends = getattr(self, name)
            if len(ends) != 2 or not all(map(math.isfinite, ends)) or not ends[0] < ends[1]:
                raise ValueError(f"{name} must be two rising finite numbers, got {list(ends)}")

    def for_unit(self, unit: Unit) -> LocalMetricsConfig:
        """The same under this privacy unit: of libraries a device has exactly one."""
        return replace(self, max_units=1, expected_units=1) if unit == "library" else self

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the tone groups, lightest first."""
        firsts = (1, *(last + 1 for last in self.tone_upper_bounds[:-1]))
        spans = [
            f"Monk {a}" if a == b else f"Monk {a}-{b}"
            for a, b in zip(firsts, self.tone_upper_bounds, strict=True)
        ]
        names = _GROUP_NAMES.get(len(spans))
        return tuple(
            spans if names is None else (f"{name} ({span})" for name, span in zip(names, spans, strict=True))
        )

    @property
    def width(self) -> int:
        """d, the length of a photo's vector."""
        g = len(self.tone_upper_bounds)
        return g * g + (2 * len(RANGED_METRICS) + 1) * g

    def range_of(self, metric: str) -> tuple[float, float]:
        """The public range of a metric; 0 to 1 of a yes or no."""
        ends: tuple[float, float] = getattr(self, metric) if metric in RANGED_METRICS else (0.0, 1.0)
        return ends


@dataclass(frozen=True, kw_only=True)
class PhotoMetrics:
    """The metrics of n photos and of the faces generated from them; never sent. One number each, (n,)."""

    group: Tensor  # int64, which tone group the original reads as, from 0, lightest first
    output_group: Tensor  # int64, likewise for the generated face
    consistency_error: Tensor
    skin_difference: Tensor
    lightness_shift: Tensor
    detected: Tensor  # bool, whether a detector finds a face in the generated image

    def __post_init__(self) -> None:
        for part in fields(self):
            if (shape := tuple(getattr(self, part.name).shape)) != (len(self.group),):
                raise ValueError(f"{part.name} must have shape ({len(self.group)},), got {shape}")


def measure_photos(
    original: Images,
    generated: Images,
    consistency_error: Tensor,
    detected: Tensor,
    config: LocalMetricsConfig,
) -> PhotoMetrics:
    """Compare generated faces with the originals, photo by photo.

    Guarantees:
        * A row depends on its photo alone, to the last bit: each is read by itself, because in a batch the size
          decides how kernels round, and a rounding can put a photo into another group.

    Args:
        original: The device's photos, (n, 3, s, s) sRGB in [0, 1], aligned faces; n >= 0.
        generated: One face for each one's low-resolution version, of the same shape.
        consistency_error: Of each, mean squared difference after the downscale, (n,).
        detected: Whether a detector finds a face in the generated image, (n,) bool.
        config: Which groups.

    Raises:
        ValueError: Shapes do not agree.
    """
    if generated.shape != original.shape:
        raise ValueError(f"generated must have shape {tuple(original.shape)}, got {tuple(generated.shape)}")
    true, output = _read_each(original), _read_each(generated)
    return PhotoMetrics(
        group=_groups_of(true.monk, config),
        output_group=_groups_of(output.monk, config),
        consistency_error=consistency_error,
        skin_difference=delta_e(output.lab, true.lab),
        lightness_shift=output.lab[:, 0] - true.lab[:, 0],
        detected=detected,
    )


def _read_each(images: Images) -> ToneReading:
    readings = [measure_tone(torch.nan_to_num(image.clone())) for image in torch.split(images, 1)]
    if not len(images):
        return ToneReading(lab=torch.zeros(0, 3), ita=torch.zeros(0), monk=torch.zeros(0))
    return ToneReading(
        *(torch.cat(parts) for parts in zip(*((r.lab, r.ita, r.monk) for r in readings), strict=True))
    )


def _groups_of(monk: Tensor, config: LocalMetricsConfig) -> Tensor:
    """The group of each continuous Monk value, which rounds to the nearest tone, half up."""
    edges = torch.tensor([last + 0.5 for last in config.tone_upper_bounds[:-1]], dtype=monk.dtype)
    return torch.bucketize(monk, edges, right=True)


def metric_vectors(photos: PhotoMetrics, config: LocalMetricsConfig, *, clip_norm: float) -> Tensor:
    """What each photo adds to the sum, before clipping.

    Guarantees:
        * Each row's L2 norm is at most `clip_norm`, up to float32 rounding, whatever the metrics are. NaN counts as
          the upper end of its range.

    Args:
        photos: As measured.
        config: Public.
        clip_norm: Largest L2 norm of one photo's vector, > 0; only its ratio to the noise matters.

    Returns:
        (n, config.width): the table row by row, then for each of `RANGED_METRICS` its values and its free spreads by
        group, then detections by group.
    """
    check("clip_norm", ClipNorm, clip_norm)
    g, shares = len(config.tone_upper_bounds), config.shares
    here = one_hot(photos.group, g).double()
    cells = one_hot(photos.group * g + photos.output_group, g * g).double()
    parts = [math.sqrt(shares.table) * cells]
    for metric in RANGED_METRICS:
        low, high = config.range_of(metric)
        values = torch.nan_to_num(getattr(photos, metric).double(), nan=high, posinf=high, neginf=low)
        x = (2.0 * (values.clamp(low, high) - low) / (high - low) - 1.0)[:, None]
        weight = math.sqrt(getattr(shares, metric))
        parts += [weight * x * here, weight * (1.0 - x.square()) * here]
    parts.append(math.sqrt(shares.detected) * (2.0 * photos.detected.double()[:, None] - 1.0) * here)
    return (clip_norm * torch.cat(parts, dim=1)).float()


def average_within_unit(vectors: Tensor, units: Tensor) -> Tensor:
    """Each photo's vector over the number of its unit's photos, so that a unit's sum is the mean of its photos.

    A unit then weighs exactly one, however many photos it has: metrics are means over units of the means within,
    and counts are counts of units, where an occasion with photos of two groups counts in part for each. A mean is
    no longer than the longest of them, so nothing is clipped. Clipping the sum of a unit's photos would give the
    same guarantee, but would let a unit weigh up to one over the norm of its mean vector: 1.06 for photos that are
    alike, 1.4 for one that shows two groups.

    Args:
        vectors: One per photo, (n, d).
        units: Which unit each photo belongs to, int64 (n,). Photos that were not sampled must be left out before.

    Returns:
        (n, d).
    """
    _, place, sizes = torch.unique(units, return_inverse=True, return_counts=True)
    shared: Tensor = vectors / sizes[place][:, None]
    return shared


def ranges(config: LocalMetricsConfig, *, clip_norm: float) -> Vector:
    """Public bounds of what a device sends, for quantisation, shape (d,), all > 0.

    The sums of `max_units` units, of which at most two thirds can be used by the units themselves (with the
    default shares): the rest is room for noise. All are equal, so that clipping in public ranges is clipping.
    """
    check("clip_norm", ClipNorm, clip_norm)
    return torch.full((config.width,), clip_norm * config.max_units)


@dataclass(frozen=True, kw_only=True)
class DecodedSums:
    """The parts of a total of `metric_vectors`, in photos, with noise."""

    table: Tensor  # (G, G) counts
    first: dict[str, Tensor]  # of each of RANGED and of "detected": sums of x by group, (G,)
    free: dict[str, Tensor]  # of each of RANGED: sums of 1 - x^2 by group, (G,)


def decode_sums(total: Vector, config: LocalMetricsConfig, *, clip_norm: float) -> DecodedSums:
    """The inverse of `metric_vectors` for a sum, (d,), in float64."""
    g, shares = len(config.tone_upper_bounds), config.shares
    numbers = total.double() / clip_norm
    table, *rows = torch.split(numbers, [g * g] + [g] * (2 * len(RANGED_METRICS) + 1))
    weights: dict[str, Any] = {
        name: math.sqrt(getattr(shares, name)) for name in (*RANGED_METRICS, "detected")
    }
    first = {name: rows[2 * i] / weights[name] for i, name in enumerate((*RANGED_METRICS, "detected"))}
    free = {name: rows[2 * i + 1] / weights[name] for i, name in enumerate(RANGED_METRICS)}
    return DecodedSums(table=table.view(g, g) / math.sqrt(shares.table), first=first, free=free)
