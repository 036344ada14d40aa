"""The record of a tournament, its picture and its page of text: which model serves people's own photos best.

Written by coordinator/model_ranking.py. Every number is noised; intervals say so, and pairs that cannot be told apart are
named rather than ranked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure as Canvas

from fedface import number_format
from fedface.atomic_io import replace_text
from fedface.codec import dumps
from fedface.measurements import Epsilon, Interval, NotMeasured
from fedface.privacy.accounting import compose, epsilon_of
from fedface.privacy.mechanism import GaussianSum, SampledGaussian
from fedface.privacy_units import UNITS, unit_in_words
from fedface.reports import device_metrics_section
from fedface.reports.charts import STYLE
from fedface.reports.comparison_charts import COLOURS, MARKERS, png_on_white
from fedface.reports.device_metrics_record import DeviceMetricsRecord
from fedface.reports.model_card import code_block

FILE = "tournament.json"
NOT_PRICED = NotMeasured(not_measured="its record does not hold the recipe's sampling rate")
ALL_ASKED = (
    "Devices were asked about all their photos, also those that a candidate was trained on: a recipe's holdout_fraction counts "
    "in a run, not here. A candidate that learned from these devices has an advantage that it may not have elsewhere."
)


@dataclass(frozen=True, kw_only=True)
class RankingRecord:
    """Models in order by one measure."""

    measure: str
    by: str  # "overall" or "worst group"
    order: tuple[str, ...]  # best first
    ties: tuple[tuple[str, ...], ...]  # pairs that cannot be told apart
    sentences: tuple[str, ...]  # the order, one for each pair, and what the intervals hold

    def all_tied(self, models: int) -> bool:
        """Whether no two of so many models can be told apart, so that the order says nothing."""
        return len(self.ties) == models * (models - 1) // 2


@dataclass(frozen=True, kw_only=True)
class RankingReport:
    """A finished tournament; what all answers cost together follows from its candidates."""

    name: str
    question: str
    finished: str  # ISO 8601, UTC
    command: str
    experiment: dict[str, Any]
    candidates: tuple[DeviceMetricsRecord, ...]  # `when` is the candidate's name
    rankings: tuple[RankingRecord, ...]
    notes: tuple[str, ...] = field(default_factory=tuple)
    together: Epsilon | NotMeasured = field(default_factory=lambda: NOT_PRICED)  # the price of all answers
    asked: str = field(default_factory=lambda: ALL_ASKED)  # which photos, in words

    def __post_init__(self) -> None:
        if self.together == NOT_PRICED:
            object.__setattr__(self, "together", _together(self.candidates, self.experiment))

    def price_sentence(self) -> str:
        """What all answers of a device cost one unit together, and what a unit is."""
        count = len(self.candidates)
        answers = "Both answers" if count == 2 else f"All {count} answers"
        whose = f"{answers} of a device together"
        if isinstance(self.together, Epsilon) and self.together.unit == "library":
            whose = (
                f"What the trusted server publishes of {answers[0].lower()}{answers[1:]} of a device together"
            )
        sentence = f"{whose}: {str(self.together)}."
        match self.together:
            case Epsilon(unit=unit) if unit in UNITS:
                return f"{sentence} The price is for {unit_in_words(unit)}."  # type: ignore[arg-type]
        return sentence

    def undecided(self) -> bool:
        """Whether no two models can be told apart by any measure."""
        return all(ranking.all_tied(len(self.candidates)) for ranking in self.rankings)

    def verdicts(self) -> list[str]:
        """Who serves better, in words: an order only where some pair is told apart."""
        count = len(self.candidates)
        if self.undecided():
            return [f"No two of the {count} models can be told apart by any measure."]
        said = []
        for ranking in self.rankings:
            if not ranking.all_tied(count):
                said.append(" ".join(ranking.sentences))
                continue
            whom = "over all units" if ranking.by == "overall" else "for the group that each serves worst"
            title = device_metrics_section.title(ranking.measure)
            said.append(f"By {title}, {whom}, no two of the {count} models can be told apart.")
        return said

    def title(self) -> str:
        """What a page of it is called."""
        count = len(self.candidates)
        return f"Which model serves the devices' own photos best: tournament of {number_format.counted(count, 'model')}"


def _together(candidates: Sequence[DeviceMetricsRecord], experiment: dict[str, Any]) -> Epsilon | NotMeasured:
    """The price of one answer about each candidate, from the noise of each."""
    evaluation = experiment.get("evaluation")
    rate = evaluation.get("sampling_rate") if isinstance(evaluation, dict) else None
    prices = [told.epsilon for told in candidates if isinstance(told.epsilon, Epsilon)]
    if not isinstance(rate, int | float) or not 0 < rate <= 1 or not prices or len(prices) < len(candidates):
        return NOT_PRICED
    events = [
        SampledGaussian(
            sampling_rate=float(rate), sum=GaussianSum(clip_norm=1.0, sigma=told.noise_multiplier), steps=1
        ).event()
        for told in candidates
    ]
    delta, unit = prices[0].delta, prices[0].unit
    return epsilon_of(compose(events), delta, unit=unit).measured()


def write(record: RankingReport, folder: Path) -> None:
    """Write `tournament.json`, `tournament.md` and `tournament.png` into a folder."""
    (folder / "tournament.png").write_bytes(picture(record))
    replace_text(folder / "tournament.md", markdown(record))
    replace_text(folder / FILE, dumps(record))


def picture(record: RankingReport) -> bytes:
    """Each measure by tone group, one mark for each candidate, with intervals that include the noise; PNG."""
    measures = device_metrics_section.measures_of(record.candidates)
    groups = _shown(record)
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(max(6.2, 2.6 * len(measures)), 3.4), layout="constrained", dpi=110)
        row = canvas.subplots(1, max(1, len(measures)), squeeze=False)[0]
        for axes, measure in zip(row, measures, strict=False):
            for index, told in enumerate(record.candidates):
                shift = 0.16 * (index - (len(record.candidates) - 1) / 2)
                for place, name in enumerate(groups):
                    found = next((g for g in (*told.groups, told.overall) if g.group == name), None)
                    value = found.figures.get(measure) if found else None
                    if isinstance(value, Interval):
                        axes.errorbar(
                            place + shift, value.estimate,
                            yerr=[[max(0.0, value.estimate - value.low)], [max(0.0, value.high - value.estimate)]],
                            color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)],
                            markersize=4.5, elinewidth=1.0, capsize=2, linestyle="none",
                            label=told.when if told.when not in axes.get_legend_handles_labels()[1] else None,
                        )  # fmt: skip
            unit = device_metrics_section.unit(measure)
            axes.set_title(_wrapped(device_metrics_section.title(measure), unit), loc="left", fontsize=8)
            axes.set_xticks(range(len(groups)), [name.replace(" (", "\n(") for name in groups], fontsize=7)
        handles, labels = row[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower center", ncols=min(6, max(1, len(labels))))
        return png_on_white(canvas)


def _shown(record: RankingReport) -> list[str]:
    """The groups that some candidate has a figure for, light to dark, all last; the picture leaves out the others."""
    told = {
        g.group
        for one in record.candidates
        for g in device_metrics_section.ordered(one)
        if not device_metrics_section.untold(g)
    }
    return [name for name in device_metrics_section.names_of(record.candidates) if name in told]


def _empty(record: RankingReport) -> list[str]:
    shown = _shown(record)
    left_out = [name for name in device_metrics_section.names_of(record.candidates) if name not in shown]
    return (
        [f"Not in the picture, because nothing is told of them: {', '.join(left_out)}."] if left_out else []
    )


def _wrapped(title: str, unit: str) -> str:
    words, lines = f"{title}{', ' + unit if unit else ''}".split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 30:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def markdown(record: RankingReport) -> str:
    """The tournament as a page of text, with its picture."""
    measures = device_metrics_section.measures_of(record.candidates)
    heads = ["group", "candidate", "units", *(device_metrics_section.title(name) for name in measures)]
    lines = [f"# {_plain(record.title())}", "", f"The recipe's question: {_plain(record.question)}", ""]
    lines += [_plain(record.price_sentence()), "", "![Scores by tone group](tournament.png)", ""]
    lines += [f"- {_plain(text)}" for text in [*_empty(record), *record.verdicts()]]
    lines += ["", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name in device_metrics_section.names_of(record.candidates):
        for told in record.candidates:
            for group in device_metrics_section.ordered(told):
                if group.group == name:
                    cells = [
                        text.replace("*", "\\*") for text in device_metrics_section.texts(group, measures)
                    ]
                    lines.append("| " + " | ".join([name, _plain(told.when), *cells]) + " |")
    lines.append("")
    lines += [f"{_plain(text)}\n" for text in device_metrics_section.end_sentence(record.candidates)]
    for told in record.candidates:
        lines.append(
            f"- {_plain(told.when)}: weights `{told.weights_hash[:12]}`, {told.method}, "
            f"{number_format.counted(told.devices, 'device')}, {str(told.epsilon)}."
        )
    notes = [record.asked, *record.notes]
    lines += ["", *(f"- {_plain(note)}" for note in notes), "", "Again:", "", *code_block(record.command), ""]
    return "\n".join(lines)


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("<", "&lt;").replace("`", "'").replace("*", "\\*")
