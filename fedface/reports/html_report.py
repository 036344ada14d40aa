"""One self-contained HTML page about a run, for a person: no network, light or dark, phone or paper.

Called by the coordinator at the end of a run and by `fedface report`. The words come from reports.wording,
the charts from reports.figures, the layout from page.html beside this file. Everything that a device or a
YAML file wrote is escaped by the template; only our own charts enter as markup.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fedface import number_format
from fedface.atomic_io import replace_text
from fedface.errors import RunError
from fedface.measurements import Epsilon, Interval, Measurement, NotMeasured
from fedface.privacy_units import PLURALS
from fedface.reports import charts, device_metrics_section, disclosures, formatting, headline_summary
from fedface.reports.headline_numbers import headline_numbers
from fedface.reports.run_record import AttackRecord, BiasRecord, PlanRecord, RunRecord

FILE = "report.html"
TEMPLATE = Path(__file__).with_name("page.html")
SHOWN = ("skin_difference", "monk_shift", "same_half", "consistency_error")  # the rest is one click away

# One skin colour per tone bin, from the published Monk swatches: a hint beside a name, never data.
TONE_COLORS = {
    "very light": "#f3e7db",
    "light": "#d7bd96",
    "intermediate": "#bf9a72",
    "tan": "#a07e56",
    "brown": "#825c43",
    "dark": "#3a312a",
}
SOURCE_COLORS = {"devices": charts.DEVICES, "before": charts.BEFORE, "after": charts.AFTER}
THEMED = {
    charts.INK: "var(--ink)",
    charts.FAINT: "var(--line)",
    charts.BEFORE: "var(--before)",
    charts.AFTER: "var(--after)",
    charts.DEVICES: "var(--devices)",
    charts.LIMIT: "var(--limit)",
}
SVG_FONT = re.compile(r"font: ([0-9.]+px) [^;\"]*")
SVG_ID = re.compile(r' id="(?![mp][0-9a-f]{8,})[^"]*"')


def render(record: RunRecord, folder: Path) -> str:
    """The page as HTML text.

    Args:
        record: What happened.
        folder: Where the record's pictures lie; one that is missing is named, not hidden.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        number=number_format.number,
        constant=number_format.constant,
        delta=number_format.format_delta,
        size=number_format.size,
        seconds=number_format.seconds,
        percent=number_format.percent,
        counted=number_format.counted,
    )
    attacks = disclosures.attacks_of(record)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        record=record,
        answer=headline_summary.headline_summary(record),
        when=_when(record),
        tiles=headline_numbers(record),
        plan=record.plan if isinstance(record.plan, PlanRecord) else None,
        promise=formatting.promise(record.plan),
        meaning=_meaning(record),
        spent=str(formatting.spent(record)),
        turnout=_turnout(record),
        refusals=_refusals(record),
        curves=_curves(record),
        leaving=disclosures.withdrawal_notes(record),
        hash_note=disclosures.hash_note(record),
        private=_private(record),
        holdout_fraction=_held_out(record),
        faces=_pictures(record, folder, "faces"),
        more=_pictures(record, folder, "more"),
        attack_pictures=_pictures(record, folder, "attacks"),
        bias=_bias(record),
        tones=_tones(record),
        attacks=_attacks(attacks),
        attack_records=attacks,
        attack_sentences=[
            *([note] if (note := disclosures.attack_note(record)) else []),
            *(formatting.named_sentence(attack) for attack in attacks),
            *(formatting.attack_sentence(attack) for attack in attacks),
        ],
        not_tested=list(dict.fromkeys(item for attack in attacks for item in attack.not_tested)),
        experiment=json.dumps(record.experiment, indent=2, ensure_ascii=False),
    )


def write(record: RunRecord, folder: Path) -> Path:
    """Render the page into the run's folder and say where it lies."""
    path = folder / FILE
    replace_text(path, render(record, folder))
    return path


def themed(svg: bytes, name: str, alt: str) -> Markup:
    """One of our charts as inline markup: named for screen readers, in the page's font and colours.

    Args:
        svg: From reports.figures.
        name: Unique on the page; its ids get this prefix.
        alt: What the chart shows, escaped here.
    """
    text = svg.decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = SVG_ID.sub("", text)
    text = re.sub(r'id="([mp][0-9a-f]+)"', rf'id="{name}-\1"', text)
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    text = SVG_FONT.sub(r"font-size: \1", text)
    for color, variable in THEMED.items():
        text = text.replace(color, variable)
    text = re.sub(r' (?:width|height)="[0-9.]+pt"', "", text, count=2)
    label = Markup.escape(alt)
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))


def _when(record: RunRecord) -> str:
    started = datetime.fromisoformat(record.started)
    lasted = (datetime.fromisoformat(record.finished) - started).total_seconds()
    return f"{started.day} {started:%B %Y, %H:%M} UTC, {number_format.seconds(max(lasted, 0.0))}"


def _meaning(record: RunRecord) -> str:
    cost = formatting.spent(record)
    if isinstance(record.plan, PlanRecord) and isinstance(cost, Epsilon):
        return formatting.meaning(cost, noise_at=record.plan.noise_at)
    return ""


def _turnout(record: RunRecord) -> list[dict[str, str]]:
    total = len(record.rounds)
    rows = []
    for device in record.devices:
        answered = sum(device.id in entry.answered for entry in record.rounds)
        match device.photos:
            case int():
                photos = f"{device.photos:,}"
            case NotMeasured(not_measured=reason):
                photos = f"not told: {reason}"
        rounds = f"{answered} of {total}"
        rows.append({"id": device.id, "text": device.description, "photos": photos, "rounds": rounds})
    return rows


def _refusals(record: RunRecord) -> list[str]:
    said: dict[tuple[str, str, str], list[int]] = {}
    for entry in record.rounds:
        for kind, list_of in (("said no", entry.refusals), ("was dropped", entry.dropped)):
            for refusal in list_of:
                said.setdefault((refusal.device, kind, refusal.reason), []).append(entry.round)
    return [f"{who} {kind} in {_span(rounds)}: {why}" for (who, kind, why), rounds in said.items()]


def _span(rounds: Sequence[int]) -> str:
    if len(rounds) == 1:
        return f"round {rounds[0]}"
    if list(rounds) == list(range(rounds[0], rounds[-1] + 1)):
        return f"rounds {rounds[0]} to {rounds[-1]}"
    return f"rounds {', '.join(str(number) for number in rounds)}"


def _series(points: Iterable[tuple[float, Measurement]], label: str, color: str) -> charts.Series:
    known = [(at, value) for at, value in points if isinstance(value, Interval)]
    return charts.Series(
        label=label,
        color=color,
        at=tuple(at for at, _ in known),
        estimate=tuple(value.estimate for _, value in known),
        low=tuple(value.low for _, value in known),
        high=tuple(value.high for _, value in known),
    )


def _curves(record: RunRecord) -> list[dict[str, Markup | str]]:
    missing = NotMeasured(not_measured="the probe did not ask for it")
    names = list(dict.fromkeys([*record.metrics_before, *(n for r in record.rounds for n in r.metrics)]))
    panels: list[dict[str, Markup | str]] = []
    for index, name in enumerate(names):
        title, unit, from_zero = formatting.PROBE_FIGURES.get(name, (name.replace("_", " "), "", False))
        points = [(0.0, record.metrics_before.get(name, missing))]
        points += [(float(entry.round), entry.metrics.get(name, missing)) for entry in record.rounds]
        line = _series(points, title, charts.AFTER)
        if not line.at:
            reasons = [value.not_measured for _, value in points if isinstance(value, NotMeasured)]
            panels.append({"title": title, "unit": unit, "svg": f"not measured: {reasons[-1]}"})
            continue
        first, last = number_format.number(line.estimate[0]), number_format.number(line.estimate[-1])
        alt = f"{title} by round: from {first} to {last}"
        svg = themed(charts.curve([line], from_zero=from_zero), f"curve{index}", alt)
        panels.append({"title": title, "unit": unit, "svg": svg})
    panels.append(_epsilon_curve(record))
    return panels


def _epsilon_curve(record: RunRecord) -> dict[str, Markup | str]:
    title = "Privacy spent"
    known = [(entry.round, entry.epsilon) for entry in record.rounds if isinstance(entry.epsilon, Epsilon)]
    if not known:
        return {"title": title, "unit": "", "svg": str(formatting.spent(record))}
    line = charts.Series(
        label=title,
        color=charts.AFTER,
        at=(0.0, *(float(at) for at, _ in known)),
        estimate=(0.0, *(value.estimate for _, value in known)),
        low=(0.0, *(value.lower for _, value in known)),
        high=(0.0, *(value.upper for _, value in known)),
    )
    limit = record.plan.target_epsilon if isinstance(record.plan, PlanRecord) else None
    last = known[-1][1]
    alt = f"Epsilon by round, to {str(last)}"
    unit = f"epsilon at delta {number_format.format_delta(last.delta)} per {last.unit}"
    if limit is not None:
        unit += "; dashed: the promise"
    svg = themed(charts.curve([line], limit=limit, from_zero=True), "epsilon", alt)
    return {"title": title, "unit": unit, "svg": svg}


def _pictures(record: RunRecord, folder: Path, section: str) -> list[dict[str, str]]:
    shown = []
    for picture in record.pictures.values():
        if picture.section != section:
            continue
        kind = "png" if picture.file.endswith(".png") else "jpeg"
        try:
            content = base64.b64encode((folder / picture.file).read_bytes()).decode("ascii")
            source = f"data:image/{kind};base64,{content}"
        except FileNotFoundError:
            source = ""
        shown.append({"source": source, "file": picture.file, "caption": picture.caption, "alt": picture.alt})
    return shown


def _bias(record: RunRecord) -> dict[str, object]:
    audits = [
        (label, audit, color)
        for label, audit, color in (
            ("before", record.bias_before, charts.BEFORE),
            ("after", record.bias_after, charts.AFTER),
        )
        if isinstance(audit, BiasRecord)
    ]
    missing = [
        f"{label}: not measured: {audit.not_measured}"
        for label, audit in (("Before", record.bias_before), ("After", record.bias_after))
        if isinstance(audit, NotMeasured)
    ]
    beside = [(title, audit, charts.INK) for title, audit in record.reference.items()]
    groups = list(dict.fromkeys(group.group for _, audit, _ in audits for group in audit.groups))
    measures = list(dict.fromkeys(name for _, audit, _ in audits for g in audit.groups for name in g.metrics))
    main = [name for name in SHOWN if name in measures] or measures[:4]
    rest = [name for name in measures if name not in main]
    return {
        "audits": [{"label": label, "audit": audit} for label, audit, _ in audits],
        "missing": missing,
        "charts": [_dots(audits, groups, name, f"dots{index}") for index, name in enumerate(main)],
        "other_charts": [_dots(audits, groups, name, f"more{index}") for index, name in enumerate(rest)],
        "main": _bias_table([*audits, *beside], groups, main[:3]),
        "full": _bias_table([*audits, *beside], groups, measures),
        "beside": list(record.reference),
        "gaps": [
            {"label": label, "text": formatting.gap_sentence(gap, name)}
            for label, audit, _ in audits
            for name, gap in audit.gaps.items()
        ],
    }


def _dots(
    audits: Sequence[tuple[str, BiasRecord, str]], groups: Sequence[str], measure: str, name: str
) -> dict[str, Markup | str]:
    series = []
    for label, audit, color in audits:
        served = [group for group in audit.groups if measure in group.metrics]
        points = [(float(groups.index(group.group)), group.metrics[measure]) for group in served]
        series.append(_series(points, label, color))
    title = formatting.title_of(measure)
    chart = charts.group_dots(groups, series, unit=formatting.unit_of(measure))
    return {"title": title, "svg": themed(chart, name, f"{title} by group")}


def _bias_table(
    audits: Sequence[tuple[str, BiasRecord, str]], groups: Sequence[str], measures: Sequence[str]
) -> dict[str, object]:
    absent = NotMeasured(not_measured="too few photos of this group")
    rows = []
    for name in groups:
        lines = []
        for label, audit, _ in audits:
            found = next((group for group in audit.groups if group.group == name), None)
            values = found.metrics if found else {}
            cells = [_cell(values.get(measure, absent), found.count if found else 0) for measure in measures]
            lines.append({"label": label, "count": found.count if found else 0, "cells": cells})
        rows.append({"group": name, "color": TONE_COLORS.get(name, ""), "lines": lines})
    heads = [(formatting.title_of(name), formatting.unit_of(name)) for name in measures]
    return {"heads": heads, "rows": rows}


def _cell(value: Measurement, count: int) -> tuple[str, str]:
    """A number and its interval; n only where it is not the group's own count."""
    match value:
        case Interval(count=n):
            estimate, ends = value.texts()
            return (
                estimate,
                ends if n == count else f"{ends}, n{number_format.SPACE}={number_format.SPACE}{n:,}",
            )
        case NotMeasured(not_measured=reason):
            return "not measured", reason


def _attacks(attacks: Sequence[AttackRecord]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for attack in attacks:
        values = (attack.psnr, attack.baseline_psnr, attack.ssim, attack.baseline_ssim, attack.gallery)
        cells = [_cell(value, 0) for value in values]
        rng = f"{number_format.percent(1 / attack.gallery_size)} · {number_format.percent(attack.gallery_ceiling)}"
        rows.append({"defence": attack.defense, "cells": cells, "chance": rng})
    return rows


def _held_out(record: RunRecord) -> str:
    """Which share of a device's photos was asked and not trained on, as a sentence; empty where none was."""
    evaluation = record.experiment.get("evaluation")
    share = evaluation.get("holdout_fraction") if isinstance(evaluation, dict) else None
    if not isinstance(share, int | float) or not 0 < share < 1:
        return ""
    unit = record.plan.unit if isinstance(record.plan, PlanRecord) else "photo"
    whole = "photos" if unit == "photo" else "occasions"  # also of a library: it is split by occasions
    return f"About {number_format.percent(share)} of each device's {whole} were held out: asked about, not trained on."


def _private(record: RunRecord) -> dict[str, object]:
    measures = device_metrics_section.measures_of(record.device_metrics)
    return {
        "sentences": device_metrics_section.sentences(record),
        "units": PLURALS[record.plan.unit] if isinstance(record.plan, PlanRecord) else "units",
        "costs": [device_metrics_section.spent_sentence(told) for told in record.device_metrics],
        "heads": [
            (device_metrics_section.title(name), device_metrics_section.unit(name)) for name in measures
        ],
        "rows": device_metrics_section.rows(record.device_metrics),
        "method": record.device_metrics[-1].method if record.device_metrics else "",
        "charts": [
            {"title": title, "svg": themed(svg, f"own{index}", f"{title} by group, from the devices' photos")}
            for index, (title, svg) in enumerate(device_metrics_section.metric_charts(record))
        ],
    }


def _tones(record: RunRecord) -> dict[str, object]:
    if not record.tones:
        return {"svg": "", "legend": []}
    groups = record.tones[0].groups
    for tone in record.tones:
        if tone.groups != groups:
            raise RunError(f"tones: expected the groups {list(groups)} everywhere, got {list(tone.groups)}")
    bars, legend = [], []
    for tone in record.tones:
        total = sum(tone.counts)
        count = f" (n = {total:,})" if total else ": not measured: no face was counted"
        text = f"{tone.label}{count}"
        legend.append({"color": THEMED[SOURCE_COLORS[tone.source]], "text": text})
        bars.append((SOURCE_COLORS[tone.source], [count / max(1, total) for count in tone.counts]))
    chart = charts.tone_bars(groups, bars)
    return {"svg": themed(chart, "tones", "Skin tone of samples by tone group"), "legend": legend}
