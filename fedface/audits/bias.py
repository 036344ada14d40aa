"""Whom an upsampler serves worse, by which metric, and by how much.

The input is a probe: public faces whose groups are known. Skin tone is measured from pixels on both sides
(`photos.skin_tone`), so light and camera affect every tone metric; differences between a generated face and its own
original are affected less than absolute values.

Sources: Jalal et al. 2021 (arXiv:2106.12182) for RDP, PR and SPE; Laszkiewicz et al. 2024 (FAccT) for the
divergences from uniform; Sharma, Wu & Dalal (2005) for dE00.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, assert_never

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F

from fedface.audits.group_metrics import Gap, gap_between, mean_interval, metrics_by_group, rates_by_group
from fedface.measurements import Interval, rate_interval
from fedface.photos.skin_tone import TONE_BINS, ToneReading, delta_e, measure_tone, srgb_to_lab, tone_bin
from fedface.tensor_types import Images
from fedface.upsampling.upsampler import Upsampled

DARKER_FROM = 5.5  # continuous Monk value; the scale's ten swatches fall five and five
HALVES = ("lighter", "darker")
BINS = tuple(name for name, _ in TONE_BINS)


def confusion(true: Sequence[str], generated: Sequence[str], names: Sequence[str]) -> list[list[int]]:
    """Counts of pairs: row = group of the original, column = group of the generated face, ordered as `names`."""
    if len(true) != len(generated):
        raise ValueError(f"generated must name {len(true)} groups, got {len(generated)}")
    at = {name: i for i, name in enumerate(names)}
    if strange := sorted({*true, *generated} - set(names)):
        raise ValueError(f"groups must be among {list(names)}, got {strange}")
    table = [[0] * len(names) for _ in names]
    for row, column in zip(true, generated, strict=True):
        table[at[row]][at[column]] += 1
    return table


@dataclass(frozen=True, kw_only=True)
class FairnessMetrics:
    """Three notions of fairness of a reconstruction, from a table of counts.

    RDP: faces of every group stay in their group equally often. PR: each group is as frequent among the generated
    faces as among the originals. SPE: faces change from group i to j as often as from j to i.
    """

    groups: tuple[str, ...]  # groups with originals; the rows of RDP
    hit_rates: tuple[float, ...]  # P(generated in i | true in i), one per group
    rdp_gap: float  # largest minus smallest hit rate, 0 is fair
    rdp_ratio: float  # smallest over largest hit rate, 1 is fair; 1 where no group is ever hit
    rdp_chi2: float  # divergence of the normalised hit rates from uniform, 0 is fair
    rdp_chebyshev: float
    pr_true: tuple[float, ...]  # P(true in i), one per column of the table
    pr_generated: tuple[float, ...]  # P(generated in i)
    pr_total_variation: float  # half the summed difference of the two, 0 is fair
    pr_chi2: float  # divergence of pr_generated from uniform; says something on a balanced probe only
    pr_chebyshev: float
    spe: float  # largest |P(true i, generated j) - P(true j, generated i)|, 0 is fair
    count: int  # faces


def chi2_from_uniform(shares: ArrayLike) -> float:
    """k * sum (p_i - 1/k)^2 for k shares that sum to 1."""
    p = np.asarray(shares, dtype=np.float64)
    return float(len(p) * np.square(p - 1 / len(p)).sum())


def chebyshev_from_uniform(shares: ArrayLike) -> float:
    """max |p_i - 1/k| for k shares that sum to 1."""
    p = np.asarray(shares, dtype=np.float64)
    return float(np.abs(p - 1 / len(p)).max())


def fairness_metrics(table: ArrayLike, names: Sequence[str]) -> FairnessMetrics:
    """RDP, PR and SPE of a table of counts or probabilities, rows for the originals, columns for the generated.

    Args:
        table: (g, g), entries >= 0 and not all 0. A group without originals is left out of RDP.
        names: g names.
    """
    joint = np.asarray(table, dtype=np.float64)
    if joint.shape != (len(names), len(names)) or len(names) < 2:
        raise ValueError(f"table must be square with one row for each of >= 2 names, got {joint.shape}")
    total = joint.sum()
    if not np.isfinite(total) or (joint < 0).any() or total <= 0:
        raise ValueError("table must hold finite counts >= 0, not all 0")
    p = joint / total
    rows, columns = p.sum(axis=1), p.sum(axis=0)
    present = rows > 0
    hits = p.diagonal()[present] / rows[present]
    shares = hits / hits.sum() if hits.sum() > 0 else np.full(len(hits), 1 / len(hits))
    return FairnessMetrics(
        groups=tuple(name for name, here in zip(names, present, strict=True) if here),
        hit_rates=tuple(hits.tolist()),
        rdp_gap=float(hits.max() - hits.min()),
        rdp_ratio=float(hits.min() / hits.max()) if hits.max() > 0 else 1.0,
        rdp_chi2=chi2_from_uniform(shares),
        rdp_chebyshev=chebyshev_from_uniform(shares),
        pr_true=tuple(rows.tolist()),
        pr_generated=tuple(columns.tolist()),
        pr_total_variation=float(np.abs(rows - columns).sum() / 2),
        pr_chi2=chi2_from_uniform(columns),
        pr_chebyshev=chebyshev_from_uniform(columns),
        spe=float(np.abs(p - p.T).max()),
        count=round(total),
    )


@dataclass(frozen=True)
class Metric:
    """One way to be served worse."""

    title: str
    unit: str  # empty for shares
    kind: Literal["cost", "rate", "shift"]  # worse is: more, less, further from zero
    digits: int  # after the point, in sentences

    def cost(self, value: Interval) -> Interval:
        """How badly a group is served, larger is worse: a cost itself, a rate's negative, a shift's size."""
        match self.kind:
            case "cost":
                return value
            case "rate":
                return replace(value, estimate=-value.estimate, low=-value.high, high=-value.low)
            case "shift":
                low, high = sorted((abs(value.low), abs(value.high)))
                return replace(
                    value, estimate=abs(value.estimate), low=0.0 if value.covers_zero else low, high=high
                )
            case _:
                assert_never(self.kind)

    def format(self, value: Interval) -> str:
        """The estimate with its unit and interval, such as "3.1 dE00 [2.7, 3.4]"."""
        low, high = (f"{end:z.{self.digits}f}" for end in (value.low, value.high))
        amount = f"{value.estimate:z.{self.digits}f} {self.unit}".rstrip()
        return f"{amount} [{low}, {high}]"

    def shows(self, gap: Gap) -> bool:
        """Whether a gap excludes zero, and does not round to it at the digits shown."""
        return gap.clear and round(abs(gap.difference.estimate), self.digits) > 0


METRICS: dict[str, Metric] = {
    "consistency_error": Metric("consistency error to the photo (mean squared difference)", "", "cost", 4),
    "converged": Metric("share of faces that fit the photo", "", "rate", 2),
    "skin_difference": Metric("colour difference of the skin", "dE00", "cost", 1),
    "face_difference": Metric("colour difference of the whole picture", "dE00", "cost", 1),
    "lightness_shift": Metric("change in lightness of the skin", "L*", "shift", 1),
    "ita_shift": Metric("change in ITA of the skin", "degrees", "shift", 1),
    "monk_shift": Metric("change in Monk tone of the skin", "steps", "shift", 2),
    "same_tone_bin": Metric("share of faces that keep their tone bin", "", "rate", 2),
    "same_half": Metric("share of faces that stay on their half of the Monk scale", "", "rate", 2),
}


@dataclass(frozen=True, kw_only=True)
class GroupMetrics:
    """How one group is served, by every metric of `METRICS`; a photo's faces are averaged first."""

    # Mean squared difference after the downscale; a face that was not found counts as 1.
    consistency_error: Interval
    converged: Interval  # share of faces within the search's tolerance
    skin_difference: Interval  # CIEDE2000 between the skin of the generated face and of the original
    face_difference: Interval  # mean CIEDE2000 of 8 x 8 area means of the two faces
    lightness_shift: Interval  # generated minus original, L*; positive is lighter
    ita_shift: Interval  # generated minus original, degrees; positive is lighter
    monk_shift: Interval  # generated minus original, Monk steps; negative is lighter
    same_tone_bin: Interval  # share of faces in the tone bin of the original
    same_half: Interval  # share of faces on the original's side of the middle of the Monk scale

    def __getitem__(self, metric: str) -> Interval:
        value: Interval = getattr(self, metric)
        return value


@dataclass(frozen=True, kw_only=True)
class BiasReport:
    """The result of `measure_bias`; all numbers are finite."""

    photos: int
    faces_per_photo: int
    overall: GroupMetrics
    groups: dict[str, GroupMetrics]  # groups of at least two photos
    counts: dict[str, int]  # photos of every group, in the order of the probe
    gaps: dict[str, Gap]  # by metric; empty where no two groups can be compared
    tone_bins: FairnessMetrics  # over the bins of TONE_BINS, original against generated
    halves: FairnessMetrics  # over the two halves of the Monk scale
    # Share of darker faces, generated minus original; its size is the SPE of the halves.
    darker_change: Interval

    @property
    def unmeasured(self) -> dict[str, int]:
        """Groups of fewer than two photos, with their counts."""
        return {name: count for name, count in self.counts.items() if name not in self.groups}

    def sentences(self) -> list[str]:
        """One sentence per finding, clear gaps first; always ends with the limits of the probe.

        A gap that rounds to zero at the digits shown is omitted, however certain it is.
        """
        clear = [name for name, gap in self.gaps.items() if METRICS[name].shows(gap)]
        texts = [self._gap_sentence(name) for name in clear]
        if not self.gaps:
            texts.append("No two groups have enough photos to be compared.")
        elif not clear:
            texts.append(
                f"No metric differs clearly between the {len(self.groups)} groups with {self.photos} photos. "
                f"A gap in lightness below about {self._smallest_visible():.1f} L* would not have been detected."
            )
        quiet = [METRICS[name].title for name in self.gaps if name not in clear]
        if clear and quiet:
            texts.append(f"No clear gap in: {', '.join(quiet)}.")
        if not self.darker_change.covers_zero:
            more = "more" if self.darker_change.estimate > 0 else "fewer"
            texts.append(
                f"There are {more} darker faces among the generated than among the originals: "
                f"share {self.darker_change.estimate:+.2f} "
                f"[{self.darker_change.low:+.2f}, {self.darker_change.high:+.2f}]."
            )
        few = [name for name, service in self.groups.items() if service.consistency_error.is_small]
        if few or self.unmeasured:
            texts.append(f"Too few photos for a reliable result: {', '.join([*few, *self.unmeasured])}.")
        texts.append(
            "Skin tone is measured from pixels and depends on light and camera; groups are those of the probe. "
            "Each gap's interval accounts for the choice among groups, not for the number of metrics."
        )
        return texts

    def _gap_sentence(self, name: str) -> str:
        gap, metric = self.gaps[name], METRICS[name]
        worst, best = self.groups[gap.worst][name], self.groups[gap.best][name]
        direction = ""
        if metric.kind == "shift":
            lighter = (worst.estimate > 0) != (name == "monk_shift")
            direction = ", lighter than the originals" if lighter else ", darker than the originals"
        return (
            f"{gap.worst} is served worse: {metric.title} {metric.format(worst)} ({worst.count} photos)"
            f"{direction}, against {metric.format(best)} for {gap.best} ({best.count} photos); "
            f"gap {metric.format(gap.difference)}."
        )

    def _smallest_visible(self) -> float:
        difference = self.gaps["lightness_shift"].difference
        return difference.high - difference.estimate


def _half(tone: ToneReading) -> list[str]:
    return [HALVES[int(monk >= DARKER_FROM)] for monk in tone.monk.tolist()]


def _coarse_lab(images: Images) -> Tensor:
    """CIELAB of 8 x 8 area means, (n, 64, 3)."""
    return srgb_to_lab(F.adaptive_avg_pool2d(images.clamp(0, 1), 8)).flatten(2).transpose(1, 2)


def _per_photo(values: Tensor | list[bool], faces: int) -> np.ndarray:
    """Values of n * f faces, averaged over each photo's faces: (n,)."""
    return torch.as_tensor(values).double().view(-1, faces).mean(dim=1).numpy()


def measure_bias(
    truth: Images,
    groups: Sequence[str],
    upsampled: Upsampled,
    rng: np.random.Generator,
    *,
    true_tone: ToneReading | None = None,
    expected: Sequence[str] = (),
) -> BiasReport:
    """Compare the upsampled faces of each group of a probe with the originals.

    Faces whose search did not converge are included, because failing more often is serving worse.

    Args:
        truth: The originals, (n, 3, s, s) sRGB in [0, 1], aligned faces.
        groups: The group of each, n names.
        upsampled: The upsampler's results for the originals' low-resolution versions, in the same order.
        true_tone: The originals' tone where it is known (synthetic faces); otherwise it is measured from `truth`.
        expected: Groups that the report must mention even without a photo.

    Raises:
        ValueError: Shapes or counts do not agree, or there are fewer than two photos.
    """
    n, f = upsampled.photos, upsampled.faces_per_photo
    if n < 2 or f < 1:
        raise ValueError(f"upsampled must hold at least two photos with a face each, got {n} with {f}")
    expected_shape = (n, *upsampled.images.shape[2:])
    if truth.shape != expected_shape:
        raise ValueError(f"truth must have shape {expected_shape}, got {tuple(truth.shape)}")
    if len(groups) != n:
        raise ValueError(f"groups must name {n} photos, got {len(groups)}")
    images = upsampled.images.flatten(0, 1)
    once = measure_tone(truth) if true_tone is None else true_tone
    if len(once.monk) != n:
        raise ValueError(f"true_tone must hold {n} readings, got {len(once.monk)}")
    true = ToneReading(*(part.repeat_interleave(f, dim=0) for part in (once.lab, once.ita, once.monk)))
    output = measure_tone(images)
    true_bins, output_bins = tone_bin(true.ita), tone_bin(output.ita)
    true_halves, output_halves = _half(true), _half(output)
    coarse = delta_e(_coarse_lab(images), _coarse_lab(truth).repeat_interleave(f, dim=0)).mean(dim=1)
    values = {
        "consistency_error": _per_photo(
            torch.nan_to_num(upsampled.consistency_error.double(), nan=1.0, posinf=1.0).flatten(), f
        ),
        "converged": _per_photo(upsampled.converged.flatten(), f),
        "skin_difference": _per_photo(delta_e(output.lab, true.lab), f),
        "face_difference": _per_photo(coarse, f),
        "lightness_shift": _per_photo(output.lab[:, 0] - true.lab[:, 0], f),
        "ita_shift": _per_photo((output.ita - true.ita + 180) % 360 - 180, f),
        "monk_shift": _per_photo(output.monk - true.monk, f),
        "same_tone_bin": _per_photo([a == b for a, b in zip(true_bins, output_bins, strict=True)], f),
        "same_half": _per_photo([a == b for a, b in zip(true_halves, output_halves, strict=True)], f),
    }
    sizes = {name: sum(group == name for group in groups) for name in dict.fromkeys([*expected, *groups])}
    measured = [name for name, size in sizes.items() if size >= 2]
    tables = {name: _by_group(values[name], groups, name, rng) for name in METRICS}
    gaps = {}
    for name, table in tables.items():
        metric = METRICS[name]
        cost = {name: metric.cost(table[name]).estimate for name in measured}
        gap = gap_between(values[name], groups, cost, rng, rate=metric.kind == "rate")
        if gap is not None:
            gaps[name] = gap
    everyone = {m: _by_group(values[m], ["all"] * n, m, rng)["all"] for m in METRICS}
    darker = (output.monk >= DARKER_FROM).double() - (true.monk >= DARKER_FROM).double()
    return BiasReport(
        photos=n,
        faces_per_photo=f,
        overall=GroupMetrics(**everyone),
        groups={name: GroupMetrics(**{m: tables[m][name] for m in METRICS}) for name in measured},
        counts=sizes,
        gaps=gaps,
        tone_bins=fairness_metrics(confusion(true_bins, output_bins, BINS), BINS),
        halves=fairness_metrics(confusion(true_halves, output_halves, HALVES), HALVES),
        darker_change=mean_interval(_per_photo(darker, f), rng),
    )


def _by_group(
    values: np.ndarray, groups: Sequence[str], metric: str, rng: np.random.Generator
) -> dict[str, Interval]:
    rate = METRICS[metric].kind == "rate"
    found = rates_by_group(values, groups) if rate else metrics_by_group(values, groups, rng)
    return {name: value for name, value in found.items() if isinstance(value, Interval)}


@dataclass(frozen=True, kw_only=True)
class ToneHistogram:
    """How often each Monk tone occurs, by pixels: light and camera are mixed into it."""

    counts: tuple[int, ...]  # Monk 1 (lightest) to 10 (darkest)
    shares: tuple[Interval, ...]  # of each, Wilson's interval
    lighter: Interval  # share of faces below the middle of the scale
    darker: Interval
    count: int


def tone_histogram(images: Images) -> ToneHistogram:
    """Read the Monk tone of aligned faces, (n, 3, h, w) in [0, 1], n >= 1; for a generator's samples."""
    if len(images) < 1:
        raise ValueError("tone_histogram needs at least one image, got 0")
    monk = measure_tone(images).monk
    bins = (monk + 0.5).floor().clamp(1, 10).long() - 1
    counts = torch.bincount(bins, minlength=10).tolist()
    darker = int((monk >= DARKER_FROM).sum())
    n = len(monk)
    return ToneHistogram(
        counts=tuple(counts),
        shares=tuple(rate_interval(count, n) for count in counts),
        lighter=rate_interval(n - darker, n),
        darker=rate_interval(darker, n),
        count=n,
    )
