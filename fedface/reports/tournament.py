"""The record of a tournament, its picture and its page of text: which model serves people's own photos best.

Written by federation/tournament.py. Every number is noised; intervals say so, and pairs that cannot be told apart are
named rather than ranked.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure as Canvas

from fedface.reports import private_page, strict, wording
from fedface.reports.comparison_figures import COLOURS, MARKERS, png_on_white
from fedface.reports.figures import STYLE
from fedface.reports.private_record import PrivateRecord
from fedface.reports.quantities import Interval

FILE = "tournament.json"


@dataclass(frozen=True, kw_only=True)
class RankingRecord:
    """Models in order by one measure."""

    measure: str
    by: str  # "overall" or "worst group"
    order: tuple[str, ...]  # best first
    ties: tuple[tuple[str, ...], ...]  # pairs that cannot be told apart
    sentences: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TournamentRecord:
    """A finished tournament."""

    name: str
    question: str
    finished: str  # ISO 8601, UTC
    command: str
    experiment: dict[str, Any]
    candidates: tuple[PrivateRecord, ...]  # `when` is the candidate's name
    rankings: tuple[RankingRecord, ...]
    notes: tuple[str, ...] = field(default_factory=tuple)


def write(record: TournamentRecord, folder: Path) -> None:
    """Write `tournament.json`, `tournament.md` and `tournament.png` into a folder."""
    (folder / "tournament.png").write_bytes(picture(record))
    (folder / "tournament.md").write_text(markdown(record), encoding="utf-8")
    part = folder / f"{FILE}.part"
    part.write_text(strict.dumps(record), encoding="utf-8")
    os.replace(part, folder / FILE)


def picture(record: TournamentRecord) -> bytes:
    """Each measure by tone group, one mark for each candidate, with intervals that include the noise; PNG."""
    measures = private_page.measures_of(record.candidates)
    groups = list(dict.fromkeys(g.group for told in record.candidates for g in (*told.groups, told.overall)))
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
                            label=told.when if place == len(groups) - 1 else None,
                        )  # fmt: skip
            unit = private_page.unit(measure)
            axes.set_title(_wrapped(private_page.title(measure), unit), loc="left", fontsize=8)
            axes.set_xticks(range(len(groups)), [name.replace(" (", "\n(") for name in groups], fontsize=7)
        handles, labels = row[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower center", ncols=min(6, max(1, len(labels))))
        return png_on_white(canvas)


def _wrapped(title: str, unit: str) -> str:
    words, lines = f"{title}{', ' + unit if unit else ''}".split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 30:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def markdown(record: TournamentRecord) -> str:
    """The tournament as a page of text, with its picture."""
    measures = private_page.measures_of(record.candidates)
    heads = ["group", "candidate", "units", *(private_page.title(name) for name in measures)]
    lines = [f"# {_plain(record.question)}", "", "![Scores by tone group](tournament.png)", ""]
    for ranking in record.rankings:
        lines += [f"- {_plain(' '.join(ranking.sentences))}"]
    lines += ["", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    names = list(dict.fromkeys(g.group for told in record.candidates for g in (*told.groups, told.overall)))
    for name in names:
        for told in record.candidates:
            for group in (*told.groups, told.overall):
                if group.group == name:
                    cells = [f"{value} {ends}" for value, ends in private_page.cells(group, measures)]
                    lines.append("| " + " | ".join([name, _plain(told.when), *cells]) + " |")
    lines.append("")
    for told in record.candidates:
        lines.append(
            f"- {_plain(told.when)}: weights `{told.weights_hash[:12]}`, {told.method}, {told.devices} devices, "
            f"{wording.epsilon(told.epsilon)}."
        )
    lines += ["", *(f"- {_plain(note)}" for note in record.notes), "", f"Again: `{record.command}`", ""]
    return "\n".join(lines)


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("<", "&lt;").replace("`", "'")
