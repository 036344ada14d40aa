"""Which of several models serves the devices' own photos better, and which differences are not significant.

The models were evaluated on the same photos, each with independent noise. Differences are computed as if each model had
been evaluated on different photos of the same kind: where a photo that is hard for one model is hard for the others
too, which is usual, the intervals are wider than necessary.

Sources: Zou & Donner (2008), Stat. Med. 27, for differences from two intervals; Bonferroni's inequality for all
pairs at once, and for the worst of several groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from fedface.audits.dp_metric_estimates import DPMetricEstimates, GroupEstimates
from fedface.audits.dp_ratio_estimates import DP_METRICS, difference_between, level_for
from fedface.errors import FederationError
from fedface.measurements import Interval, NotMeasured


@dataclass(frozen=True, kw_only=True)
class PairwiseComparison:
    """Two models side by side."""

    better: str
    worse: str
    difference: Interval  # cost of the worse minus that of the better, for all pairs at once

    @property
    def apart(self) -> bool:
        """Whether the interval excludes zero."""
        return self.difference.low > 0


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Models in order, best first, by one metric."""

    metric: str
    by: Literal["overall", "worst group"]
    order: tuple[str, ...]
    costs: dict[str, Interval]  # see `Metric.cost`; 95 % for each model
    comparisons: tuple[PairwiseComparison, ...]  # all pairs

    @property
    def all_tied(self) -> bool:
        """Whether no difference is significant, so that the order carries no information."""
        return not any(pair.apart for pair in self.comparisons)

    @property
    def ties(self) -> tuple[tuple[str, str], ...]:
        """The pairs without a significant difference, the one that looks better first."""
        return tuple((pair.better, pair.worse) for pair in self.comparisons if not pair.apart)

    def scope(self) -> str:
        return "over all units" if self.by == "overall" else "for the group that each serves worst"

    def sentences(self) -> list[str]:
        """The order, and which differences are not significant."""
        metric = DP_METRICS[self.metric]
        texts = [f"By {metric.title}, {self.scope()}, best first: {', '.join(self.order)}."]
        for pair in self.comparisons:
            gap = metric.format(pair.difference)
            if pair.apart:
                texts.append(f"{pair.better} is better than {pair.worse} by {gap}.")
            else:
                texts.append(f"{pair.better} and {pair.worse} cannot be distinguished: {gap}.")
        texts.append("The intervals include the noise and hold for all pairs at once.")
        return texts


def rank_overall(estimates: Mapping[str, DPMetricEstimates], metric: str) -> Ranking:
    """Order models by how they serve all units together.

    Args:
        estimates: Estimates of each model, by its name; at least two, of the same photos.
        metric: One of DP_METRICS.

    Raises:
        FederationError: A model's total had too few units for any metric.
    """
    _check(estimates, metric)
    if missing := [name for name, found in estimates.items() if isinstance(found.overall, NotMeasured)]:
        raise FederationError(f"too few units for a metric of {', '.join(missing)}; ask more devices")

    def served(model: str, level: float) -> Interval:
        overall = estimates[model].overall
        assert isinstance(overall, GroupEstimates)
        return DP_METRICS[metric].cost(overall.means[metric].interval(level))

    pairs = _pairs(len(estimates))
    return _ranked(
        {model: served(model, level_for(1)) for model in estimates},
        {model: served(model, level_for(pairs)) for model in estimates},
        metric,
        "overall",
    )


def rank_worst_group(estimates: Mapping[str, DPMetricEstimates], metric: str) -> Ranking:
    """Order models by how they serve the group that each serves worst, among the groups reported of all.

    The worst of several noised metrics is biased towards worse; the intervals allow for that.

    Args:
        estimates: As for `rank_overall`.
        metric: One of DP_METRICS.

    Raises:
        FederationError: No group is reported of all models.
    """
    _check(estimates, metric)
    first, *others = (each.reported for each in estimates.values())
    groups = [name for name in first if all(name in reported for reported in others)]
    if not groups:
        raise FederationError("no tone group has enough units for every model; ask more devices")

    def served(model: str, level: float) -> Interval:
        reported = estimates[model].reported
        each = [DP_METRICS[metric].cost(reported[name].means[metric].interval(level)) for name in groups]
        worst = max(each, key=lambda each: each.estimate)
        return replace(worst, low=max(f.low for f in each), high=max(f.high for f in each))

    pairs = _pairs(len(estimates))
    return _ranked(
        {model: served(model, level_for(len(groups))) for model in estimates},
        {model: served(model, level_for(pairs * len(groups))) for model in estimates},
        metric,
        "worst group",
    )


def _pairs(models: int) -> int:
    return models * (models - 1) // 2


def _check(estimates: Mapping[str, DPMetricEstimates], metric: str) -> None:
    if len(estimates) < 2:
        raise ValueError(f"a ranking needs two models, got {len(estimates)}")
    if metric not in DP_METRICS:
        raise ValueError(f"metric must be one of {', '.join(DP_METRICS)}, got {metric!r}")


def _ranked(
    alone: Mapping[str, Interval],
    compared: Mapping[str, Interval],
    metric: str,
    by: Literal["overall", "worst group"],
) -> Ranking:
    order = sorted(alone, key=lambda model: alone[model].estimate)
    comparisons = tuple(
        PairwiseComparison(
            better=one, worse=other, difference=difference_between(compared[other], compared[one])
        )
        for one, other in combinations(order, 2)
    )
    return Ranking(metric=metric, by=by, order=tuple(order), costs=dict(alone), comparisons=comparisons)
