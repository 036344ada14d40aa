"""The page's section on what devices said of their own photos, and on who left the run.

Called from reports/page.py and reports/card.py. Every number here is noised: intervals include it, and a group that
cannot be told from a small one has none.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedface.audits.noised_means import FIGURES
from fedface.reports import figures, wording
from fedface.reports.private_record import PrivateGroup, PrivateRecord
from fedface.reports.quantities import Figure, Interval, NotMeasured
from fedface.reports.run import RunRecord

COLORS = {"before": figures.BEFORE, "after": figures.AFTER}


def title(measure: str) -> str:
    """The title of a figure that devices send."""
    return FIGURES[measure].title if measure in FIGURES else measure.replace("_", " ")


def unit(measure: str) -> str:
    """Its unit; empty for a share."""
    return FIGURES[measure].unit.strip() if measure in FIGURES else ""


def measures_of(records: Sequence[PrivateRecord]) -> list[str]:
    """Every measure that some group has a number for, in the order of the records."""
    everyone = [group for record in records for group in (record.overall, *record.groups)]
    return list(dict.fromkeys(name for group in everyone for name in group.figures))


def charts(record: RunRecord) -> list[tuple[str, bytes]]:
    """For each measure, its title and a chart of the groups before and after the run, as SVG."""
    groups = list(dict.fromkeys(group.group for told in record.private for group in told.groups))
    drawn = []
    for measure in measures_of(record.private):
        series = [_series(told, groups, measure) for told in record.private]
        if any(line.at for line in series):
            drawn.append((title(measure), figures.group_dots(groups, series, unit=unit(measure))))
    return drawn


def _series(told: PrivateRecord, groups: Sequence[str], measure: str) -> figures.Series:
    known = [
        (float(groups.index(group.group)), value)
        for group in told.groups
        if isinstance(value := group.figures.get(measure), Interval)
    ]
    return figures.Series(
        label=told.when,
        color=COLORS.get(told.when, figures.INK),
        at=tuple(at for at, _ in known),
        estimate=tuple(value.estimate for _, value in known),
        low=tuple(value.low for _, value in known),
        high=tuple(value.high for _, value in known),
    )


def rows(records: Sequence[PrivateRecord]) -> list[dict[str, object]]:
    """Lines of a table: for each group and model, how many units and each measure with its interval."""
    names = list(dict.fromkeys(g.group for told in records for g in (*told.groups, told.overall)))
    absent = NotMeasured(not_measured="not asked")
    table: list[dict[str, object]] = []
    for name in names:
        lines = []
        for told in records:
            found = next((g for g in (*told.groups, told.overall) if g.group == name), None)
            group = found or PrivateGroup(group=name, units=absent, figures={})
            lines.append({"label": told.when, "cells": cells(group, measures_of(records))})
        table.append({"group": name, "lines": lines})
    return table


def cells(group: PrivateGroup, measures: Sequence[str]) -> list[tuple[str, str]]:
    """The count of units and each measure, as an estimate and its interval; or why there is none."""
    why = group.units.not_measured if isinstance(group.units, NotMeasured) else "not told"
    none = NotMeasured(not_measured=why)
    return [_cell(group.units, whole=True), *(_cell(group.figures.get(name, none)) for name in measures)]


def _cell(value: Figure, *, whole: bool = False) -> tuple[str, str]:
    match value:
        case Interval(estimate=estimate, low=low, high=high):
            if whole:
                return f"about {estimate:,.0f}", f"[{max(low, 0):,.0f}, {high:,.0f}]"
            return wording.interval(value)
        case NotMeasured(not_measured=reason):
            return "not told", reason


def spent_sentence(record: PrivateRecord) -> str:
    """What asking cost, and whom."""
    return f"Asking about the model {record.when} the run: {spent_words(record)}."


def spent_words(record: PrivateRecord) -> str:
    """How many answered, at what price for one unit."""
    return f"{record.devices} devices answered, at {wording.epsilon(record.epsilon)}"
