"""One self-contained HTML page about a run: no network, light or dark, phone or print.

The template is page.html. Everything that a device or a YAML file wrote is escaped by the template;
only our own charts enter as markup.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from markupsafe import Markup

from fedface import number_format
from fedface.atomic_io import replace_text
from fedface.audits.bias import METRICS
from fedface.audits.dp_ratio_estimates import DP_METRICS
from fedface.measurements import Epsilon, Interval, NotMeasured
from fedface.privacy.privacy_target import PrivacyTarget
from fedface.privacy_units import PLURALS, describe_unit
from fedface.reports import (
    charts,
    device_metrics_section,
    disclosures,
    formatting,
    headline_summary,
    model_card,
)
from fedface.reports.run_record import BiasRecord, RunRecord
from fedface.reports.templates import html_template

FILE = "report.html"
SO_FAR = "report-so-far.html"  # of a run that is not finished
TEMPLATE = Path(__file__).with_name("page.html")
SHOWN = (
    "skin_difference",
    "monk_shift",
    "same_half",
    "consistency_error",
)  # the others are in a folded section

# One skin colour per tone bin, from the published Monk swatches; decoration, never data.
TONE_COLORS = {
    "very light": "#f3e7db",
    "light": "#d7bd96",
    "intermediate": "#bf9a72",
    "tan": "#a07e56",
    "brown": "#825c43",
    "dark": "#3a312a",
}
SOURCE_LABELS = {"devices": "faces like the devices'", "before": "samples before", "after": "samples after"}
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


def render(record: RunRecord, folder: Path, *, so_far: str = "") -> str:
    """The page as HTML text.

    Args:
        folder: Contains the record's pictures; a missing one is named on the page.
        so_far: Of a run that is not finished: how far it is.
    """
    attacks = disclosures.applicable_attacks(record)
    ceilings = []
    if attacks and record.plan.dp_parameters.is_private:
        ceilings = [formatting.ceilings_sentence(record.plan, attacks[0].identification.candidates)]
    attack_note = disclosures.attack_note(record)
    return html_template(TEMPLATE.read_text(encoding="utf-8")).render(
        **model_card.common_values(record),
        so_far=so_far,
        summary=headline_summary.headline_summary(record),
        when=_when(record),
        tiles=headline_summary.headline_numbers(record),
        spent=formatting.spent(record),
        covers=describe_unit(record.plan.dp_parameters.unit),
        turnout=_turnout(record),
        refusals=_refusals(record),
        curves=_curves(record),
        hash_note=disclosures.hash_note(record),
        device_charts=_device_charts(record),
        device_metric_names=list(DP_METRICS),
        units=PLURALS[record.plan.dp_parameters.unit],
        holdout=_holdout(record),
        pictures={section: _pictures(record, folder, section) for section in ("faces", "attacks", "more")},
        bias=_bias(record),
        tones=_tones(record),
        attacks=attacks,
        attack_sentences=[
            *([attack_note] if attack_note else []),
            *(
                formatting.identification_sentence(attack.identification, attack.scores.defense)
                for attack in attacks
            ),
            *ceilings,
            *(formatting.inversion_sentence(attack.scores) for attack in attacks),
        ],
        experiment=json.dumps(record.experiment, indent=2, ensure_ascii=False),
    )


def write(record: RunRecord, folder: Path) -> Path:
    """Render the page into the run's folder and return its path; one that was written before the end is removed."""
    path = folder / FILE
    replace_text(path, render(record, folder))
    (folder / SO_FAR).unlink(missing_ok=True)
    return path


def write_so_far(record: RunRecord, folder: Path) -> Path:
    """Render the page of a run that is not finished, marked as such, and return its path."""
    path, total = folder / SO_FAR, record.plan.dp_parameters.schedule.rounds
    so_far = f"{len(record.rounds)} of {number_format.counted(total, 'round')}, without audits"
    replace_text(path, render(record, folder, so_far=so_far))
    return path


def themed(svg: bytes, name: str, alt: str) -> Markup:
    """A chart as inline markup, labelled for screen readers, in the page's font and colours.

    Args:
        svg: From reports.charts.
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


def _turnout(record: RunRecord) -> dict[str, int]:
    """In how many rounds each device took part."""
    counts = Counter(device for entry in record.rounds for device in entry.participants)
    return {device.id: counts[device.id] for device in record.devices}


def _refusals(record: RunRecord) -> list[str]:
    reasons: dict[tuple[str, str, str], list[int]] = {}
    for entry in record.rounds:
        for kind, list_of in (("refused", entry.refusals), ("was dropped", entry.dropped)):
            for refusal in list_of:
                reasons.setdefault((refusal.device, kind, refusal.reason), []).append(entry.round)
    return [f"{who} {kind} in {_span(rounds)}: {why}" for (who, kind, why), rounds in reasons.items()]


def _span(rounds: Sequence[int]) -> str:
    if len(rounds) == 1:
        return f"round {rounds[0]}"
    if list(rounds) == list(range(rounds[0], rounds[-1] + 1)):
        return f"rounds {rounds[0]} to {rounds[-1]}"
    return f"rounds {', '.join(str(number) for number in rounds)}"


def _curves(record: RunRecord) -> list[dict[str, Markup | str]]:
    missing = NotMeasured(not_measured="not requested")
    names = list(dict.fromkeys([*record.metrics_before, *(n for r in record.rounds for n in r.metrics)]))
    panels: list[dict[str, Markup | str]] = []
    for index, name in enumerate(names):
        title, unit, from_zero = formatting.SAMPLE_METRICS.get(name, (name.replace("_", " "), "", False))
        points = [(0.0, record.metrics_before.get(name, missing))]
        points += [(float(entry.round), entry.metrics.get(name, missing)) for entry in record.rounds]
        known = [(at, value) for at, value in points if isinstance(value, Interval)]
        if not known:
            reasons = [value.not_measured for _, value in points if isinstance(value, NotMeasured)]
            panels.append({"title": title, "unit": unit, "svg": f"not measured: {reasons[-1]}"})
            continue
        first, last = (number_format.number(known[end][1].estimate) for end in (0, -1))
        alt = f"{title} by round: from {first} to {last}"
        svg = themed(charts.curve(known, from_zero=from_zero), f"curve{index}", alt)
        counts = ", ".join(str(count) for count in dict.fromkeys(value.count for _, value in known))
        panels.append({"title": title, "unit": "; ".join(filter(None, (unit, f"n = {counts}"))), "svg": svg})
    panels.append(_epsilon_curve(record))
    return panels


def _epsilon_curve(record: RunRecord) -> dict[str, Markup | str]:
    title = "Privacy spent"
    known = [(entry.round, entry.epsilon) for entry in record.rounds if isinstance(entry.epsilon, Epsilon)]
    if not known:
        return {"title": title, "unit": "", "svg": str(formatting.spent(record))}
    points = [(0.0, Interval(0.0, 0.0, 0.0, 1))]
    points += [(float(at), Interval(e.estimate, e.lower, e.upper, 1)) for at, e in known]
    target = record.plan.privacy
    limit = target.epsilon if isinstance(target, PrivacyTarget) else None
    last = known[-1][1]
    alt = f"Epsilon by round, to {str(last)}"
    unit = f"epsilon at delta {number_format.format_delta(last.delta)} per {last.unit}"
    if limit is not None:
        unit += "; dashed: the guarantee"
    svg = themed(charts.curve(points, limit=limit, from_zero=True), "epsilon", alt)
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
    kinds = {"before": record.bias_before, "after": record.bias_after}
    audits = {label: audit for label, audit in kinds.items() if isinstance(audit, BiasRecord)}
    missing = {label: audit for label, audit in kinds.items() if isinstance(audit, NotMeasured)}
    groups = list(dict.fromkeys(name for audit in audits.values() for name in audit.report.counts))
    main, rest = (SHOWN, [name for name in METRICS if name not in SHOWN]) if audits else ((), [])
    return {
        "audits": audits,
        "missing": missing,
        "groups": groups,
        "charts": [_dots(audits, groups, name, f"dots{index}") for index, name in enumerate(main)],
        "other_charts": [_dots(audits, groups, name, f"more{index}") for index, name in enumerate(rest)],
        "compared": {**audits, **record.reference},
        "main_metrics": SHOWN[:3],
        "all_metrics": list(METRICS),
        "colors": TONE_COLORS,
    }


def _dots(
    audits: Mapping[str, BiasRecord], groups: Sequence[str], metric: str, name: str
) -> dict[str, Markup | str]:
    series = []
    for label, audit in audits.items():
        found = audit.report.groups.items()
        series.append(
            (SOURCE_COLORS[label], [(float(groups.index(group)), values[metric]) for group, values in found])
        )
    title = formatting.title_of(metric)
    chart = charts.group_dots(groups, series, unit=formatting.unit_of(metric))
    return {"title": title, "svg": themed(chart, name, f"{title} by group")}


def _holdout(record: RunRecord) -> str:
    """The fraction of held-out photos as a sentence; empty if there were none."""
    evaluation = record.experiment.get("evaluation")
    share = evaluation.get("holdout_fraction") if isinstance(evaluation, dict) else None
    if not isinstance(share, int | float) or not 0 < share < 1:
        return ""
    # A library is split by occasions, too.
    whole = "photos" if record.plan.dp_parameters.unit == "photo" else "occasions"
    return (
        f"About {number_format.percent(share)} of each device's {whole} were held out: used for evaluation, not for "
        "training."
    )


def _device_charts(record: RunRecord) -> list[dict[str, Markup | str]]:
    return [
        {"title": title, "svg": themed(svg, f"own{index}", f"{title} by group, on the devices' photos")}
        for index, (title, svg) in enumerate(device_metrics_section.metric_charts(record))
    ]


def _tones(record: RunRecord) -> dict[str, object]:
    if not record.tones:
        return {"svg": "", "legend": []}
    bars, legend = [], []
    for tone in record.tones:
        histogram, color = tone.histogram, SOURCE_COLORS[tone.source]
        legend.append(
            {"color": THEMED[color], "text": f"{SOURCE_LABELS[tone.source]} (n = {histogram.count:,})"}
        )
        bars.append((color, [count / histogram.count for count in histogram.counts]))
    chart = charts.tone_bars([f"Monk {step}" for step in range(1, 11)], bars)
    return {"svg": themed(chart, "tones", "Skin tone of samples by Monk step"), "legend": legend}
