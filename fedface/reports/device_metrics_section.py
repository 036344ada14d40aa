"""The page's section on what devices said of their own photos.

Called from reports/html_report.py, reports/model_card.py, reports/model_ranking_report.py and the command line. Every number here is noised:
intervals include it, and a group that cannot be told from a small one has none. Groups stand light to dark, all last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from fedface import number_format
from fedface.audits.dp_metric_estimates import minimum_detectable_gap
from fedface.audits.dp_metrics import LocalMetricsConfig
from fedface.audits.dp_ratio_estimates import DP_METRICS
from fedface.codec import CodecError, decode
from fedface.measurements import Interval, Measurement, NotMeasured
from fedface.reports import charts
from fedface.reports.device_metrics_record import DeviceMetricsGroup, DeviceMetricsRecord
from fedface.reports.record_builders import light_to_dark
from fedface.reports.run_record import PlanRecord, RunRecord

COLORS = {"before": charts.BEFORE, "after": charts.AFTER}
AT_END = "\N{NO-BREAK SPACE}*"  # beside a figure that stands at an end of its range
MOST_UNITS = 10**6  # of one device, when looking for how many would be enough
HIDDEN = ("skin_difference", "same_group", "consistency_error")  # differences that noise hides, in words


def title(measure: str) -> str:
    """The title of a figure that devices send."""
    return DP_METRICS[measure].title if measure in DP_METRICS else measure.replace("_", " ")


def unit(measure: str) -> str:
    """Its unit; empty for a share."""
    return DP_METRICS[measure].unit.strip() if measure in DP_METRICS else ""


def measures_of(records: Sequence[DeviceMetricsRecord]) -> list[str]:
    """Every measure that some group has a number for, in the order of the records."""
    everyone = [group for record in records for group in (record.overall, *record.groups)]
    return list(dict.fromkeys(name for group in everyone for name in group.figures))


def ordered(told: DeviceMetricsRecord) -> list[DeviceMetricsGroup]:
    """The groups light to dark, then all units together."""
    by_name = {group.group: group for group in told.groups}
    return [*(by_name[name] for name in light_to_dark(list(by_name))), told.overall]


def names_of(records: Sequence[DeviceMetricsRecord]) -> list[str]:
    """The groups of several records, light to dark, "all" last."""
    groups = light_to_dark(list(dict.fromkeys(group.group for told in records for group in told.groups)))
    return [*groups, *dict.fromkeys(told.overall.group for told in records)]


def metric_charts(record: RunRecord) -> list[tuple[str, bytes]]:
    """For each measure, its title and a chart of the groups before and after the run, as SVG; groups without a figure
    are left out, since the table says so."""
    told_of = {g.group for told in record.device_metrics for g in told.groups if g.figures}
    groups = [name for name in names_of(record.device_metrics) if name in told_of]
    drawn = []
    for measure in measures_of(record.device_metrics):
        series = [_series(told, groups, measure) for told in record.device_metrics]
        if any(line.at for line in series):
            drawn.append((title(measure), charts.group_dots(groups, series, unit=unit(measure))))
    return drawn


def _series(told: DeviceMetricsRecord, groups: Sequence[str], measure: str) -> charts.Series:
    known = [
        (float(groups.index(group.group)), value)
        for group in told.groups
        if isinstance(value := group.figures.get(measure), Interval)
    ]
    return charts.Series(
        label=told.when,
        color=COLORS.get(told.when, charts.INK),
        at=tuple(at for at, _ in known),
        estimate=tuple(value.estimate for _, value in known),
        low=tuple(value.low for _, value in known),
        high=tuple(value.high for _, value in known),
    )


def rows(records: Sequence[DeviceMetricsRecord]) -> list[dict[str, object]]:
    """Lines of a table: for each group and model, how many units and each measure with its interval."""
    absent = NotMeasured(not_measured="not asked")
    table: list[dict[str, object]] = []
    for name in names_of(records):
        lines = []
        for told in records:
            found = next((group for group in ordered(told) if group.group == name), None)
            group = found or DeviceMetricsGroup(group=name, units=absent, figures={})
            given = cells(group, measures_of(records))
            lines.append({"label": told.when, "cells": given, "untold": untold(group)})
        table.append({"group": name, "lines": lines})
    return table


def untold(group: DeviceMetricsGroup) -> str:
    """Why nothing is told of a group, in one cell for the whole line; empty where something is."""
    if isinstance(group.units, NotMeasured) and not group.figures:
        return f"not told: {group.units.not_measured}"
    return ""


def cells(group: DeviceMetricsGroup, measures: Sequence[str]) -> list[tuple[str, str]]:
    """The count of units and each measure, as an estimate and its interval; or why there is none."""
    none = NotMeasured(not_measured="no figure")
    given = [_cell(group.units, whole=True)]
    for name in measures:
        estimate, ends = _cell(group.figures.get(name, none))
        given.append((estimate + AT_END if name in group.at_end else estimate, ends))
    return given


def texts(group: DeviceMetricsGroup, measures: Sequence[str]) -> list[str]:
    """The same as one text for each column, where cells cannot be joined."""
    if why := untold(group):
        return [why, *["–"] * len(measures)]
    return [f"{value} {ends}" for value, ends in cells(group, measures)]


def _cell(value: Measurement, *, whole: bool = False) -> tuple[str, str]:
    match value:
        case Interval(estimate=estimate, low=low, high=high):
            if whole:
                return f"about {estimate:,.0f}", f"[{max(low, 0):,.0f}, {high:,.0f}]"
            return value.texts()
        case NotMeasured(not_measured=reason):
            return "not told", reason


def sentences(record: RunRecord) -> list[str]:
    """What the last model's figures say, what they would have hidden where they say nothing, and what a mark means."""
    if not record.device_metrics:
        return []
    last = record.device_metrics[-1]
    said = list(last.sentences)
    if sum(bool(group.figures) for group in last.groups) < 2 and (hidden := hidden_sentence(record)):
        said.insert(1, hidden)
    return [*said, *end_sentence(record.device_metrics)]


def end_sentence(records: Sequence[DeviceMetricsRecord]) -> list[str]:
    """What the mark beside a figure means, if there is one."""
    if not any(group.at_end for told in records for group in ordered(told)):
        return []
    return [
        "A figure with * stands at an end of its range: noise, or cutting values to the range, put it there."
    ]


def hidden_sentence(record: RunRecord) -> str:
    """Which differences noise would have hidden between two groups just large enough to be told of.

    From public numbers alone: the recipe, the noise, and how many devices answered. Empty where the recipe is unknown.
    """
    last, config = record.device_metrics[-1], figures_config(record.experiment)
    if config is None or last.devices < 1:
        return ""
    units, found = 1, {name: math.inf for name in HIDDEN}
    while units < MOST_UNITS and not all(map(math.isfinite, found.values())):
        units = max(units + 1, math.ceil(1.05 * units))
        found = minimum_detectable_gap(
            replace(config, expected_units=units),
            noise_multiplier=last.noise_multiplier,
            devices=last.devices,
            noises=1 if isinstance(record.plan, PlanRecord) and record.plan.noise_at == "server" else None,
        )
    if not all(math.isfinite(found[name]) for name in HIDDEN):
        return ""
    size = units * last.devices // len(config.groups)
    wide = {name: high - low for name in HIDDEN for low, high in [config.range_of(name)]}
    said = [
        f"{title(name)}, {found[name]:.{DP_METRICS[name].digits}f} {unit(name)}".rstrip()
        if found[name] < wide[name]
        else f"{title(name)}, any difference at all"
        for name in HIDDEN
    ]
    return (
        f"Had each group had just enough units to be told of (about {size}), noise alone would still have hidden a "
        f"difference between two of them below: {'; '.join(said)}."
    )


def figures_config(experiment: dict[str, object]) -> LocalMetricsConfig | None:
    """The public recipe of the figures in a record's experiment; None where it holds none that can be read."""
    evaluation = experiment.get("evaluation")
    if not isinstance(evaluation, dict) or not isinstance(told := evaluation.get("metrics"), dict):
        return None
    try:
        return decode(LocalMetricsConfig, told, complete=True)
    except CodecError:
        return None


def spent_sentence(record: DeviceMetricsRecord) -> str:
    """What asking cost, and whom."""
    return f"Asking about the model {record.when} the run: {spent_words(record)}."


def spent_words(record: DeviceMetricsRecord) -> str:
    """How many answered, at what price for one unit."""
    return f"{number_format.counted(record.devices, 'device')} answered, at {str(record.epsilon)}"
