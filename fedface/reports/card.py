"""The model card: what the weights are for, how they were made, whom they serve worse, what they leak.

Called by the coordinator at the end of a run, beside the page. Markdown, so that it can travel with the
weights. Source: Mitchell et al. 2019 (arXiv:1810.03993). Everything that a device or a YAML file wrote is
escaped: Markdown lets HTML through.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fedface.reports import private_page, wording
from fedface.reports.quantities import NotMeasured
from fedface.reports.run import BiasRecord, PlanRecord, RunRecord

FILE = "model-card.md"
SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|&!~])")


def render(record: RunRecord) -> str:
    """The model card as Markdown text."""
    sections = [
        _head(record),
        _use(record),
        _training(record),
        _privacy(record),
        _bias(record),
        *([_private(record)] if record.private else []),
        _leakage(record),
        _limits(record),
        _provenance(record),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def write(record: RunRecord, folder: Path) -> Path:
    """Render the card into the run's folder and say where it lies."""
    path = folder / FILE
    path.write_text(render(record), encoding="utf-8")
    return path


def plain(text: str) -> str:
    """Text on one line in which neither Markdown nor HTML means anything."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split())).replace("\\<", "&lt;").replace("\\>", "&gt;")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; cells are escaped here."""
    lines = [heads, ["---"] * len(heads)]
    body = [[plain(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [[plain(head) for head in lines[0]], lines[1], *body]]


def _head(record: RunRecord) -> list[str]:
    return [
        f"# Model card: {plain(record.name)}",
        "",
        f"Question: {plain(record.question)}",
        "",
        *(plain(sentence) for sentence in wording.answer(record)),
    ]


def _use(record: RunRecord) -> list[str]:
    return [
        "## Intended use",
        "",
        "Research on improving face generators and upsamplers with photos that stay on their devices, and on",
        "measuring what that costs and whom it serves. A face that these weights make from a low-resolution",
        "photo is one of many that fit it, not the person in it.",
        "",
        "Not for identifying anybody, not for evidence, not for deciding about people.",
    ]


def _training(record: RunRecord) -> list[str]:
    rounds = len(record.rounds)
    answers = sum(len(entry.answered) for entry in record.rounds)
    refused = sum(len(entry.refusals) for entry in record.rounds)
    dropped = sum(len(entry.dropped) for entry in record.rounds)
    replies = f"{answers} answers, {refused} refusals, {dropped} dropped"
    lines = ["## Training", "", f"{len(record.devices)} devices, {rounds} rounds: {replies}.", ""]
    return (
        lines
        + table(["Device", "Publicly known"], [[device.id, device.description] for device in record.devices])
        + [f"\n{plain(left.sentence)}" for left in record.left]
    )


def _privacy(record: RunRecord) -> list[str]:
    lines = ["## Privacy", "", plain(wording.promise(record.plan))]
    if isinstance(record.plan, PlanRecord):
        plan = record.plan
        lines += [
            "",
            *([f"- It covers {plain(plan.covers)}"] if plan.covers else []),
            f"- Planned: {plain(wording.epsilon(plan.epsilon))}",
            f"- Spent: {plain(wording.epsilon(wording.spent(record)))}",
            f"- Noise multiplier {wording.constant(plan.noise_multiplier)}, clip norm "
            f"{wording.constant(plan.clip_norm)}, sampling rate {wording.constant(plan.sampling_rate)}, "
            f"{plan.rounds} rounds of {plan.steps_per_round} steps, neighbours: {plain(plan.adjacency)}",
        ]
    return lines


def _bias(record: RunRecord) -> list[str]:
    lines = ["## Whom it serves worse", ""]
    match record.bias_after:
        case NotMeasured(not_measured=reason):
            return [*lines, f"Not measured: {plain(reason)}"]
        case BiasRecord() as audit:
            lines += [f"- {plain(sentence)}" for sentence in audit.sentences]
            counts = f"{audit.photos} photos, {audit.faces_per_photo} faces each"
            lines += ["", f"Probe: {plain(audit.probe)}, {counts}."]
            measures = list(dict.fromkeys(name for group in audit.groups for name in group.figures))
            absent = NotMeasured(not_measured="too few photos of this group")
            rows = [
                [group.group, *(wording.figure(group.figures.get(name, absent)) for name in measures)]
                for group in audit.groups
            ]
            units = [f" ({wording.unit_of(name)})" if wording.unit_of(name) else "" for name in measures]
            titles = [wording.title_of(name) + unit for name, unit in zip(measures, units, strict=True)]
            heads = ["Group", *titles]
            return [*lines, "", *table(heads, rows)]


def _private(record: RunRecord) -> list[str]:
    last, measures = record.private[-1], private_page.measures_of(record.private)
    heads = ["Group", "Units", *(private_page.title(name) for name in measures)]
    rows = [
        [group.group, *(f"{value} {ends}" for value, ends in private_page.cells(group, measures))]
        for group in (*last.groups, last.overall)
    ]
    lines = ["## What devices say of their own photos", "", *(f"- {plain(text)}" for text in last.sentences)]
    lines += ["", *(f"- {plain(private_page.spent_sentence(told))}" for told in record.private), ""]
    return lines + table(heads, rows)


def _leakage(record: RunRecord) -> list[str]:
    lines = ["## What an update gives away", ""]
    if not record.attacks:
        return [*lines, "Not measured: no attack was run against these updates."]
    for attack in record.attacks:
        lines.append(f"- {plain(wording.named_sentence(attack))} {plain(wording.attack_sentence(attack))}")
    untested = list(dict.fromkeys(item for attack in record.attacks for item in attack.not_tested))
    if untested:
        lines += ["", f"Not tested: {plain('; '.join(untested))}."]
    return lines


def _limits(record: RunRecord) -> list[str]:
    notes = record.notes or ("Nobody wrote down the limits of this run; take its numbers with care.",)
    return ["## What this cannot show", "", *(f"- {plain(note)}" for note in notes)]


def _provenance(record: RunRecord) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return [
        "## Provenance",
        "",
        f"- Weights before: `{record.base_hash}`",
        f"- Weights after: `{record.final_hash}`",
        f"- Run from {record.started} to {record.finished}; again with: {plain(record.command)}",
        f"- Versions: {plain(versions)}",
    ]
