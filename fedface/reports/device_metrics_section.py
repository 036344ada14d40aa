"""The report's section on metrics from the devices' own photos: tables, charts and sentences.

Every number is noised and its interval includes the noise. Groups are ordered light to dark, with all units last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from fedface import number_format
from fedface.audits.dp_metric_estimates import HEADLINE_METRICS, GroupEstimates, minimum_detectable_gap
from fedface.audits.dp_metrics import LocalMetricsConfig
from fedface.audits.dp_ratio_estimates import DP_METRICS
from fedface.codec import CodecError, decode
from fedface.measurements import NotMeasured
from fedface.reports import charts
from fedface.reports.device_metrics_record import DeviceMetricsRecord
from fedface.reports.run_record import RunRecord

ALL = "all"  # the row of all units
COLORS = {"before": charts.BEFORE, "after": charts.AFTER}
AT_LIMIT = "\N{NO-BREAK SPACE}*"  # marks a metric at an end of its range
MOST_UNITS = 10**6  # upper bound of a search, units per device

Group = GroupEstimates | NotMeasured


def title(metric: str) -> str:
    return DP_METRICS[metric].title


def unit(metric: str) -> str:
    """The unit of a metric; empty for a share."""
    return DP_METRICS[metric].unit.strip()


def groups_of(record: DeviceMetricsRecord) -> dict[str, Group]:
    """The groups light to dark, then all units together."""
    return {**record.estimates.groups, ALL: record.estimates.overall}


def group_names(records: Sequence[DeviceMetricsRecord]) -> list[str]:
    """The groups of several records, "all" last."""
    names = dict.fromkeys(name for record in records for name in record.estimates.groups)
    return [*names, ALL]


def metric_charts(record: RunRecord) -> list[tuple[str, bytes]]:
    """For each metric, its title and a chart of the reported groups before and after the run, as SVG."""
    reported = {name for one in record.device_metrics for name in one.estimates.reported}
    groups = [name for name in group_names(record.device_metrics) if name in reported]
    if not groups:
        return []
    return [
        (
            title(metric),
            charts.group_dots(
                groups, [_dots(one, groups, metric) for one in record.device_metrics], unit=unit(metric)
            ),
        )
        for metric in DP_METRICS
    ]


def _dots(record: DeviceMetricsRecord, groups: Sequence[str], metric: str) -> tuple[str, charts.Points]:
    known = record.estimates.reported.items()
    points = [(float(groups.index(name)), group.estimate(metric)) for name, group in known]
    return COLORS.get(record.when, charts.INK), points


def cells(group: Group) -> list[tuple[str, str]]:
    """The count of units and each metric, as an estimate and its interval; empty for a suppressed group."""
    if isinstance(group, NotMeasured):
        return []
    units = group.count
    found = [(f"about {units.estimate:,.0f}", f"[{max(units.low, 0):,.0f}, {units.high:,.0f}]")]
    for name in DP_METRICS:
        estimate, ends = group.estimate(name).texts()
        found.append((estimate + AT_LIMIT if group.at_range_limit(name) else estimate, ends))
    return found


def texts(group: Group) -> list[str]:
    """The same as one text per column."""
    if isinstance(group, NotMeasured):
        return [group.not_measured, *["–"] * len(DP_METRICS)]
    return [f"{value} {ends}" for value, ends in cells(group)]


def sentences(record: RunRecord) -> list[str]:
    """The findings for the last model, what the noise hides where groups are missing, and what the mark means."""
    if not record.device_metrics:
        return []
    last = record.device_metrics[-1]
    found = last.estimates.sentences()
    if len(last.estimates.reported) < 2 and (hidden := hidden_sentence(record)):
        found.insert(1, hidden)
    return [*found, *range_limit_note(record.device_metrics)]


def range_limit_note(records: Sequence[DeviceMetricsRecord]) -> list[str]:
    """What the mark beside a metric means, if there is one."""
    groups = [group for record in records for group in groups_of(record).values()]
    if not any(
        group.at_range_limit(name)
        for group in groups
        if isinstance(group, GroupEstimates)
        for name in group.means
    ):
        return []
    return [
        "A metric marked with * is at an end of its range, because of noise or because values were clipped."
    ]


def hidden_sentence(record: RunRecord) -> str:
    """Which differences the noise would hide between two groups just large enough to be reported.

    Computed from public numbers only: the experiment, the noise, and the number of devices. Empty if the experiment is
    unknown.
    """
    last, config = record.device_metrics[-1], metrics_config(record.experiment)
    devices = last.estimates.devices
    if config is None or devices < 1:
        return ""
    units, found = 1, {name: math.inf for name in HEADLINE_METRICS}
    while units < MOST_UNITS and not all(map(math.isfinite, found.values())):
        units = max(units + 1, math.ceil(1.05 * units))
        found = minimum_detectable_gap(
            replace(config, expected_units=units),
            noise_multiplier=last.noise_multiplier,
            devices=devices,
            noises=record.plan.dp_parameters.noises_in_sum(devices),
            unit=record.plan.dp_parameters.unit,
        )
    if not all(math.isfinite(found[name]) for name in HEADLINE_METRICS):
        return ""
    size = units * devices // len(config.groups)
    widths = {name: high - low for name in HEADLINE_METRICS for low, high in [config.range_of(name)]}
    gaps = [
        f"{title(name)}, {found[name]:.{DP_METRICS[name].digits}f} {unit(name)}".rstrip()
        if found[name] < widths[name]
        else f"{title(name)}, any difference"
        for name in HEADLINE_METRICS
    ]
    return (
        f"Even if each group had just enough units to be reported (about {size}), the noise alone would hide "
        f"differences between two of them below: {'; '.join(gaps)}."
    )


def metrics_config(experiment: dict[str, object]) -> LocalMetricsConfig | None:
    """The metrics' parameters in a record's experiment; None if they are missing or cannot be read."""
    evaluation = experiment.get("evaluation")
    if not isinstance(evaluation, dict) or not isinstance(metrics := evaluation.get("metrics"), dict):
        return None
    try:
        return decode(LocalMetricsConfig, metrics, complete=True)
    except CodecError:
        return None


def cost_sentence(record: DeviceMetricsRecord) -> str:
    return f"Evaluating the model {record.when} the run: {cost(record)}."


def cost(record: DeviceMetricsRecord) -> str:
    """How many devices are in the sum, and the privacy loss of one unit."""
    return f"a sum of {number_format.counted(record.estimates.devices, 'device')}, at {record.epsilon}"
