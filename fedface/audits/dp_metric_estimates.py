"""Metrics by tone group from the noised total of all devices, with intervals that include the noise.

Post-processing of a release, deterministic and without privacy cost (Dwork & Roth 2014, Proposition 2.1). Intervals
are those of audits/dp_ratio_estimates; audits/dp_model_ranking compares models by these estimates.

Sources: Agresti & Caffo (2000) for one success and one failure more; Bonferroni's inequality for simultaneous
intervals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.special import ndtri

from fedface.audits.dp_metrics import RANGED_METRICS, DecodedSums, LocalMetricsConfig, decode_sums
from fedface.audits.dp_ratio_estimates import DP_METRICS, DPRatioEstimate, difference_between, level_for
from fedface.audits.group_metrics import Gap
from fedface.errors import AggregationError
from fedface.measurements import LEVEL, Interval, NotMeasured
from fedface.privacy_units import Unit
from fedface.tensor_types import Vector

IMPOSSIBLE = 6.0  # standard deviations of noise; two totals in a billion lie further out
HEADLINE_METRICS = ("skin_difference", "same_group", "consistency_error")


@dataclass(frozen=True, kw_only=True)
class GroupEstimates:
    """How one tone group is served; counts are noised counts of units."""

    kind: ClassVar[str] = "group-estimates"

    count: Interval  # units that took part; the interval covers the noise alone
    means: dict[str, DPRatioEstimate]  # by metric of DP_METRICS

    def estimate(self, metric: str) -> Interval:
        """A metric's mean with its 95 % interval."""
        return self.means[metric].interval()

    def at_range_limit(self, metric: str) -> bool:
        """Whether noise or clipping moved the mean to an end of its public range."""
        mean = self.means[metric]
        return not mean.ends[0] < mean.above / mean.below < mean.ends[1]


@dataclass(frozen=True, kw_only=True)
class ToneShares:
    """How frequent a tone group is among the originals and among the generated faces."""

    original: Interval
    generated: Interval
    change: Interval  # generated minus original


@dataclass(frozen=True, kw_only=True)
class DPMetricEstimates:
    """Metrics of one model on the devices' own photos. Groups that may be small are suppressed."""

    devices: int  # in the sum; 0: there is none, and `overall` says why
    min_count: float  # a group with a smaller noised count is suppressed
    overall: GroupEstimates | NotMeasured  # all units, including those of suppressed groups
    groups: dict[str, GroupEstimates | NotMeasured]  # lightest first
    shares: dict[str, ToneShares]  # of the reported groups
    gaps: dict[str, Gap]  # by metric; empty where fewer than two groups are reported
    # By metric: the smallest visible gap; and the part that noise alone hides.
    hidden: dict[str, tuple[float, float]]

    @property
    def reported(self) -> dict[str, GroupEstimates]:
        return {name: group for name, group in self.groups.items() if isinstance(group, GroupEstimates)}

    @property
    def suppressed(self) -> tuple[str, ...]:
        return tuple(name for name, group in self.groups.items() if isinstance(group, NotMeasured))

    def headline(self) -> str:
        """One sentence: the first clear gap in a fixed order of metrics, or the gaps that the noise would hide."""
        start = "On the devices' own photos"
        if isinstance(self.overall, NotMeasured) and not self.devices:
            return f"{start}, nothing was measured: {self.overall.not_measured}."
        for name in (*HEADLINE_METRICS, *self.gaps):
            gap, metric = self.gaps.get(name), DP_METRICS[name]
            if gap is not None and metric.shows(gap):
                worst, best = (self.reported[group].estimate(name) for group in (gap.worst, gap.best))
                return (
                    f"{start}, {gap.worst} is served worse than {gap.best}: {metric.title} "
                    f"{metric.format(worst)} against {metric.format(best)}, including the noise."
                )
        for name in HEADLINE_METRICS:
            if name in self.hidden:
                metric = DP_METRICS[name]
                width = f"{self.hidden[name][0]:.{metric.digits}f} {metric.unit}".rstrip()
                return (
                    f"{start}, no group is shown to be served worse; a gap in {metric.title} below {width} "
                    "would be hidden by the noise and the number of photos."
                )
        return (
            f"{start}, no groups could be compared: under this noise fewer than two groups have at least "
            f"{math.ceil(self.min_count)} units."
        )

    def sentences(self) -> list[str]:
        """One sentence per finding, clear gaps first; always ends with the limits of these metrics."""
        if isinstance(self.overall, NotMeasured) and not self.devices:
            return [f"Nothing was measured: {self.overall.not_measured}."]
        clear = [name for name, gap in self.gaps.items() if DP_METRICS[name].shows(gap)]
        texts = [self._gap_sentence(name) for name in clear]
        if not self.gaps:
            texts.append("No two groups have enough units to be compared under this noise.")
        elif not clear:
            texts.append(f"No metric differs clearly between the {len(self.reported)} reported groups.")
        if hidden := [self._hidden_sentence(name) for name in self.gaps if name not in clear]:
            texts.append(
                f"With this noise, smaller differences between groups would not show: {'; '.join(hidden)}."
            )
        for name, shares in self.shares.items():
            if not shares.change.covers_zero:
                more = "more" if shares.change.estimate > 0 else "fewer"
                texts.append(
                    f"There are {more} faces measured as {name} among the generated than among the originals: share "
                    f"{shares.change.estimate:+.2f} [{shares.change.low:+.2f}, {shares.change.high:+.2f}]."
                )
        if self.suppressed:
            texts.append(
                f"Suppressed: {', '.join(self.suppressed)}; their noised counts are below "
                f"{math.ceil(self.min_count)} units."
            )
        texts.append(
            f"From {self.devices} devices; every unit has about the same weight, however many photos it has; intervals "
            "include the noise and the choice of photos. Tone is measured from pixels and depends on light and camera. "
            "Values outside the public ranges were clipped to them."
        )
        return texts

    def _gap_sentence(self, name: str) -> str:
        gap, metric = self.gaps[name], DP_METRICS[name]
        worst, best = (self.reported[group].estimate(name) for group in (gap.worst, gap.best))
        direction = ""
        if metric.kind == "shift":
            direction = f", {'lighter' if worst.estimate > 0 else 'darker'} than the originals"
        return (
            f"{gap.worst} is served worse: {metric.title} {metric.format(worst)} (about {worst.count} units)"
            f"{direction}, against {metric.format(best)} for {gap.best} (about {best.count} units); "
            f"gap {metric.format(gap.difference)}."
        )

    def _hidden_sentence(self, name: str) -> str:
        metric = DP_METRICS[name]
        if metric.kind == "rate" and self.hidden[name][0] >= 1:
            return f"{metric.title}, any difference"
        whole, noise = (f"{width:.{metric.digits}f}" for width in self.hidden[name])
        unit = f" {metric.unit}".rstrip()
        return f"{metric.title}, {whole}{unit} ({noise} due to the noise alone)"


@dataclass(frozen=True, kw_only=True)
class _Noise:
    """Standard deviations of the noise in the total, in photos."""

    config: LocalMetricsConfig
    total: float  # of every number of the total, in clip norms
    room: float  # for the errors of quantisation
    max_count: float = math.inf  # of units, where that is public

    def of(self, part: str) -> float:
        return self.total / math.sqrt(getattr(self.config.shares, part))

    @property
    def of_group(self) -> float:
        """Of a group's count, a row of the table."""
        return self.of("table") * math.sqrt(len(self.config.tone_upper_bounds))

    @property
    def min_count(self) -> float:
        return max(self.config.min_group_size, 1.0 + float(ndtri((1.0 + LEVEL) / 2.0)) * self.of_group)


def estimate_metrics(
    total: Vector,
    *,
    config: LocalMetricsConfig,
    clip_norm: float,
    noise_multiplier: float,
    devices: int,
    noises: float | None = None,
    unit: Unit = "photo",
) -> DPMetricEstimates:
    """The metrics in a total, by tone group and overall.

    Guarantees:
        * A group whose noised count is below `min_group_size`, or whose count's 95 % interval reaches below 1, is
          suppressed: neither its count, nor its metrics, nor its shares are reported.
        * Without noise, means and counts are those of the units, clipped to the public ranges.

    Args:
        total: The sum over devices of their noised, undivided sums of `metric_vectors`, (d,).
        config: As on the devices.
        clip_norm: As on the devices.
        noise_multiplier: sigma; each noise has standard deviation sigma * clip_norm on every number.
        devices: How many devices are in the sum, >= 1.
        noises: How many such noises are in the sum: None for one of each device.
        unit: Of a library, a device is one unit, so that at most `devices` are counted, and fewer than
            `min_group_size` report nothing.

    Raises:
        AggregationError: The total is implausible for a sum of metrics with this noise.
    """
    if devices < 1 or not noise_multiplier >= 0:
        raise ValueError(f"devices must be >= 1 and noise_multiplier >= 0, got {devices}, {noise_multiplier}")
    if total.shape != (config.width,):
        raise AggregationError(f"the metrics are {config.width} numbers, got shape {tuple(total.shape)}")
    if not bool(torch.isfinite(total).all()):
        raise AggregationError("a total of metrics must be finite: a device sent values that are not")
    noise = _Noise(
        config=config,
        total=noise_multiplier * math.sqrt(devices if noises is None else noises),
        room=1e-3 * devices * config.max_units,
        max_count=devices if unit == "library" else math.inf,
    )
    sums = decode_sums(total, config, clip_norm=clip_norm)
    _check_possible(sums, noise)
    rows = {name: [i] for i, name in enumerate(config.groups)}
    few = NotMeasured(not_measured=f"suppressed: below {noise.min_count:.0f} units, noise included")
    known = unit != "library" or devices >= config.min_group_size
    reported = {
        name: _group_metrics(sums, members, noise)
        for name, members in rows.items()
        if known and _count(sums, members, noise)[0] >= noise.min_count
    }
    all_rows = list(range(len(rows)))
    estimate, low, _ = _count(sums, all_rows, noise)
    enough = known and low >= 1 and estimate >= config.min_group_size
    shares = {name: _tone_shares(sums, rows[name][0], noise) for name in reported} if enough else {}
    gaps = {name: _gap(reported, name) for name in DP_METRICS} if len(reported) >= 2 else {}
    return DPMetricEstimates(
        devices=devices,
        min_count=noise.min_count,
        overall=_group_metrics(sums, all_rows, noise) if enough else few,
        groups={name: reported.get(name, few) for name in rows},
        shares=shares,
        gaps=gaps,
        hidden={name: _hidden(reported, gap, name) for name, gap in gaps.items()},
    )


def missing_metrics(config: LocalMetricsConfig, reason: str) -> DPMetricEstimates:
    """In place of the metrics of a sum that there is not."""
    missing = NotMeasured(not_measured=reason)
    return DPMetricEstimates(
        devices=0,
        min_count=config.min_group_size,
        overall=missing,
        groups=dict.fromkeys(config.groups, missing),
        shares={},
        gaps={},
        hidden={},
    )


def _check_possible(sums: DecodedSums, noise: _Noise) -> None:
    """Refuse a total that the noise cannot explain. A device that sends plausible but false values is not detected."""
    far = IMPOSSIBLE * noise.of("table") + noise.room
    counts = sums.table.sum(1)
    faults = []
    if bool((sums.table < -far).any()):
        faults.append("a count is far below zero")
    for name, first in sums.first.items():
        off = IMPOSSIBLE * math.hypot(noise.of(name), noise.of_group) + noise.room / math.sqrt(
            getattr(noise.config.shares, name)
        )
        if bool((first.abs() > counts.clamp(min=0.0) + off).any()):
            faults.append(f"a mean of {name} lies outside its range")
        free = sums.free.get(name, torch.zeros_like(first))
        if bool(((free < -off) | (free > counts.clamp(min=0.0) + off)).any()):
            faults.append(f"a spread of {name} is impossible")
    if faults:
        raise AggregationError(
            f"this total cannot be a sum of metrics with the agreed noise: {'; '.join(faults)}. A device sent invalid "
            "values, or devices and server use different parameters"
        )


def _count(sums: DecodedSums, rows: Sequence[int], noise: _Noise) -> tuple[float, float, float]:
    """How many units' originals are in some groups, with its 95 % interval by noise alone; may be 0."""
    estimate = float(sums.table[list(rows)].sum())
    half = float(ndtri((1.0 + LEVEL) / 2.0)) * noise.of_group * math.sqrt(len(rows))
    estimate, low, high = (
        min(max(x, 0.0), noise.max_count) for x in (estimate, estimate - half, estimate + half)
    )
    return estimate, low, high


def _group_metrics(sums: DecodedSums, rows: Sequence[int], noise: _Noise) -> GroupEstimates:
    """All measures of the units whose originals are in some groups, of which there are more than none."""
    at = list(rows)
    count = float(sums.table[at].sum())
    count_noise = len(at) * noise.of_group**2
    means = {}
    for name, first in sums.first.items():
        above = float(first[at].sum())
        # A unit's own mean varies less than its photos do: for units of many photos this is a little too wide.
        photos = (count, 0.0, -count)
        if name in sums.free:
            m = min(max(above / count, -1.0), 1.0)
            spread = 1.0 - float(sums.free[name][at].sum()) / count - m * m
            photos = (count * min(max(spread, 0.0), 1.0 - m * m), 0.0, 0.0)
        low, high = noise.config.range_of(name)
        means[name] = DPRatioEstimate(
            above=above,
            below=count,
            noise=(len(at) * noise.of(name) ** 2, 0.0, count_noise),
            photos=photos,
            ends=(-1.0, 1.0),
            unit=(high - low) / 2.0,
            zero=(high + low) / 2.0,
        )
    same = sums.table.diagonal()[at]
    means["same_group"] = _share(float(same.sum()), len(at), count, count_noise, noise)
    units = _count(sums, rows, noise)
    return GroupEstimates(count=Interval(*units, round(units[0])), means=means)


def _share(part: float, cells: int, count: float, count_noise: float, noise: _Noise) -> DPRatioEstimate:
    """The share that `cells` cells of the table have of a larger part that contains them."""
    cell = noise.of("table") ** 2
    return DPRatioEstimate(
        above=part,
        below=count,
        noise=(cells * cell, -2.0 * cells * cell, count_noise),
        photos=(0.0, count, -count),
        ends=(0.0, 1.0),
        unit=1.0,
        zero=0.0,
    )


def _tone_shares(sums: DecodedSums, row: int, noise: _Noise) -> ToneShares:
    table, groups = sums.table, len(sums.table)
    count, count_noise = float(table.sum()), groups * noise.of_group**2
    true, generated, same = float(table[row].sum()), float(table[:, row].sum()), float(table[row, row])
    change = (generated - true) / count
    moved = min(max((true + generated - 2.0 * same + 2.0) / (count + 2.0), abs(change)), 1.0)
    # The cells that changes are summed from stand as often with a plus as with a minus, so that their noise and
    # that of the count are independent.
    changed = DPRatioEstimate(
        above=generated - true,
        below=count,
        noise=(2.0 * (groups - 1) * noise.of("table") ** 2, 0.0, count_noise),
        photos=(count * moved, 0.0, -count),
        ends=(-1.0, 1.0),
        unit=1.0,
        zero=0.0,
    )
    return ToneShares(
        original=_share(true, groups, count, count_noise, noise).interval(),
        generated=_share(generated, groups, count, count_noise, noise).interval(),
        change=changed.interval(),
    )


def _pairs(groups: int) -> int:
    return groups * (groups - 1) // 2


def _gap(reported: Mapping[str, GroupEstimates], metric: str) -> Gap:
    """The worst against the best served group, with an interval that holds for all pairs of groups at once."""
    level = level_for(_pairs(len(reported)))
    served = {name: group.means[metric].interval(level) for name, group in reported.items()}
    order = sorted(served, key=lambda name: DP_METRICS[metric].cost(served[name]).estimate)
    worst, best = order[-1], order[0]
    return Gap(worst=worst, best=best, difference=difference_between(served[worst], served[best]))


def _hidden(reported: Mapping[str, GroupEstimates], gap: Gap, metric: str) -> tuple[float, float]:
    """Half the width of a gap's interval, and that of the noise alone."""
    level = level_for(_pairs(len(reported)))
    worst, best = (reported[name].means[metric].noise_alone(level) for name in (gap.worst, gap.best))
    noise = difference_between(worst, best)
    return (gap.difference.high - gap.difference.low) / 2.0, (noise.high - noise.low) / 2.0


def minimum_detectable_gap(
    config: LocalMetricsConfig,
    *,
    noise_multiplier: float,
    devices: int,
    noises: float | None = None,
    unit: Unit = "photo",
) -> dict[str, float]:
    """By metric, the gap between two groups of equal size that the noise will hide; arguments as `estimate_metrics`.

    If every device has `expected_units` units; infinite where no group will be reported.
    """
    if unit == "library" and devices < config.min_group_size:
        return dict.fromkeys(DP_METRICS, math.inf)
    groups = len(config.groups)
    noise = _Noise(
        config=config, total=noise_multiplier * math.sqrt(devices if noises is None else noises), room=0.0
    )
    count = config.expected_units * devices / groups
    z = float(ndtri((1.0 + level_for(_pairs(groups))) / 2.0))
    # At the end of a range the count's noise counts in full; in the middle it does not count.
    halves = {
        name: (high - low) / 2.0
        for name in (*RANGED_METRICS, "detected")
        for low, high in [config.range_of(name)]
    }
    errors = {name: half * math.hypot(noise.of(name), noise.of_group) for name, half in halves.items()}
    errors["same_group"] = noise.of_group
    seen = count >= noise.min_count
    return {name: z * math.sqrt(2.0) * error / count if seen else math.inf for name, error in errors.items()}
