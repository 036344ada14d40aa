"""The record, chart and Markdown page of a ranking of models by the devices' own photos.

Every number is noised and its interval includes the noise; pairs that cannot be distinguished are named, not ordered.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedface import number_format
from fedface.atomic_io import replace_bytes, replace_text
from fedface.audits.dp_metric_estimates import GroupEstimates
from fedface.audits.dp_model_ranking import Ranking
from fedface.audits.dp_ratio_estimates import DP_METRICS
from fedface.codec import dumps
from fedface.measurements import Epsilon
from fedface.privacy.privacy_target import Noise
from fedface.privacy_units import describe_unit
from fedface.reports import device_metrics_section
from fedface.reports.charts import error_bars, figure_png, legend_below, panels
from fedface.reports.device_metrics_record import DeviceMetricsRecord
from fedface.reports.markdown import code_block, table

FILE, PAGE, CHART = "ranking.json", "ranking.md", "ranking.png"
ALL_PHOTOS = (
    "Devices evaluated every candidate on all their photos, including those that a candidate was trained on: "
    "holdout_fraction applies to runs, not to rankings. A candidate that was trained on these devices has an advantage "
    "that it may not have elsewhere."
)


@dataclass(frozen=True, kw_only=True)
class RankingReport:
    name: str
    question: str
    finished: str  # ISO 8601, UTC
    command: str
    experiment: dict[str, Any]
    candidates: tuple[DeviceMetricsRecord, ...]  # `when` is the candidate's name
    rankings: tuple[Ranking, ...]
    epsilon: Epsilon  # privacy loss of all evaluations by a device together
    noise: Noise  # where it was added
    notes: tuple[str, ...]

    def privacy_sentence(self) -> str:
        """The privacy loss of all evaluations by a device together, and what a unit is."""
        count = len(self.candidates)
        evaluations = "both evaluations" if count == 2 else f"all {count} evaluations"
        subject = f"{evaluations[0].upper()}{evaluations[1:]} by a device together"
        if self.noise == "central":
            subject = f"What the trusted server publishes of {evaluations} by a device together"
        return f"{subject}: {self.epsilon}. The unit is {describe_unit(self.epsilon.unit)}."

    def undecided(self) -> bool:
        """Whether no two models can be distinguished by any metric."""
        return all(ranking.all_tied for ranking in self.rankings)

    def verdicts(self) -> list[str]:
        """Which model serves better, in words; an order only if some pair can be distinguished."""
        count = len(self.candidates)
        if self.undecided():
            return [f"No two of the {count} models can be distinguished by any metric."]
        verdicts = []
        for ranking in self.rankings:
            if not ranking.all_tied:
                verdicts.append(" ".join(ranking.sentences()))
                continue
            title = device_metrics_section.title(ranking.metric)
            verdicts.append(
                f"By {title}, {ranking.scope()}, no two of the {count} models can be distinguished."
            )
        return verdicts

    def title(self) -> str:
        count = number_format.counted(len(self.candidates), "model")
        return f"Which model serves the devices' own photos best: ranking of {count}"


def write(record: RankingReport, folder: Path) -> None:
    """Write `ranking.json`, `ranking.md` and `ranking.png` into a folder."""
    replace_bytes(folder / CHART, chart(record))
    replace_text(folder / PAGE, markdown(record))
    replace_text(folder / FILE, dumps(record))


def chart(record: RankingReport) -> bytes:
    """Each metric by tone group, one mark per candidate, with intervals that include the noise; PNG."""
    groups = _reported(record)
    with panels(len(DP_METRICS), (max(6.2, 2.6 * len(DP_METRICS)), 3.4)) as (canvas, row):
        for axes, metric in zip(row, DP_METRICS, strict=True):
            for index, candidate in enumerate(record.candidates):
                shift = 0.16 * (index - (len(record.candidates) - 1) / 2)
                served = device_metrics_section.groups_of(candidate)
                known = [(place, served[name]) for place, name in enumerate(groups)]
                points = [
                    (at + shift, g.estimate(metric)) for at, g in known if isinstance(g, GroupEstimates)
                ]
                error_bars(axes, points, index, candidate.when)
            unit = device_metrics_section.unit(metric)
            title = f"{device_metrics_section.title(metric)}{unit and ', '}{unit}"
            axes.set_title("\n".join(textwrap.wrap(title, 31)), loc="left", fontsize=8)
            axes.set_xticks(range(len(groups)), [name.replace(" (", "\n(") for name in groups], fontsize=7)
        legend_below(canvas, row[0])
        return figure_png(canvas)


def _reported(record: RankingReport) -> list[str]:
    """The groups that are reported for some candidate, light to dark, all last."""
    reported = {
        name
        for candidate in record.candidates
        for name, group in device_metrics_section.groups_of(candidate).items()
        if isinstance(group, GroupEstimates)
    }
    return [name for name in device_metrics_section.group_names(record.candidates) if name in reported]


def _suppressed(record: RankingReport) -> list[str]:
    names, reported = device_metrics_section.group_names(record.candidates), _reported(record)
    suppressed = [name for name in names if name not in reported]
    return [f"Not in the chart, because they are suppressed: {', '.join(suppressed)}."] if suppressed else []


def markdown(record: RankingReport) -> str:
    heads = ["group", "candidate", "units", *(device_metrics_section.title(name) for name in DP_METRICS)]
    lines = [f"# {_plain(record.title())}", "", f"Question: {_plain(record.question)}", ""]
    lines += [_plain(record.privacy_sentence()), "", f"![Metrics by tone group]({CHART})", ""]
    lines += [f"- {_plain(text)}" for text in [*_suppressed(record), *record.verdicts()]]
    rows = [
        [name, _plain(each.when), *(text.replace("*", "\\*") for text in device_metrics_section.texts(group))]
        for name in device_metrics_section.group_names(record.candidates)
        for each in record.candidates
        for group in [device_metrics_section.groups_of(each)[name]]
    ]
    lines += ["", *table(heads, rows), ""]
    lines += [f"{_plain(text)}\n" for text in device_metrics_section.range_limit_note(record.candidates)]
    for candidate in record.candidates:
        lines.append(
            f"- {_plain(candidate.when)}: weights `{candidate.weights_hash[:12]}`, {candidate.method}, "
            f"{device_metrics_section.cost(candidate)}."
        )
    notes = [ALL_PHOTOS, *record.notes]
    lines += ["", *(f"- {_plain(note)}" for note in notes), "", "Run it again:", ""]
    return "\n".join([*lines, *code_block(record.command), ""])


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("<", "&lt;").replace("`", "'").replace("*", "\\*")
