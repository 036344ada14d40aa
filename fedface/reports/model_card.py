"""The model card: what the weights are for, how they were made, whom they serve worse, what they leak.

Called by the coordinator at the end of a run, beside the page. Markdown, so that it can travel with the
weights. Source: Mitchell et al. 2019 (arXiv:1810.03993). Everything that a device or a YAML file wrote is
escaped: Markdown lets HTML through.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fedface import number_format
from fedface.atomic_io import replace_text
from fedface.measurements import NotMeasured
from fedface.reports import device_metrics_section, disclosures, formatting, headline_summary
from fedface.reports.run_record import BiasRecord, PlanRecord, RunRecord

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
        *([_private(record)] if record.device_metrics else []),
        _leakage(record),
        _limits(record),
        _provenance(record),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def write(record: RunRecord, folder: Path) -> Path:
    """Render the card into the run's folder and say where it lies."""
    path = folder / FILE
    replace_text(path, render(record))
    return path


def plain(text: str) -> str:
    """Text on one line in which neither Markdown nor HTML means anything."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split())).replace("\\<", "&lt;").replace("\\>", "&gt;")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; cells are escaped here."""
    lines = [heads, ["---"] * len(heads)]
    body = [[plain(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [[plain(head) for head in lines[0]], lines[1], *body]]


def code_block(text: str) -> list[str]:
    """Text to copy as it stands: in a code block nothing is markup, and its fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [fence, text, fence]


def _head(record: RunRecord) -> list[str]:
    return [
        f"# Model card: {plain(record.name)}",
        "",
        f"Question: {plain(record.question)}",
        "",
        *(plain(sentence) for sentence in headline_summary.headline_summary(record)),
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
    replies = f"{number_format.counted(answers, 'answer')}, {number_format.counted(refused, 'refusal')}, {dropped} dropped"
    size = f"{number_format.counted(len(record.devices), 'device')}, {number_format.counted(rounds, 'round')}"
    lines = ["## Training", "", f"{size}: {replies}.", ""]
    known = [[device.id, device.description] for device in record.devices]
    lines += table(["Device", "Publicly known"], known)
    return [
        *lines,
        "",
        "### Leaving",
        "",
        *(f"- {plain(text)}" for text in disclosures.withdrawal_notes(record)),
    ]


def _privacy(record: RunRecord) -> list[str]:
    lines = ["## Privacy", "", plain(formatting.promise(record.plan))]
    if isinstance(record.plan, PlanRecord):
        plan = record.plan
        steps = f"{number_format.counted(plan.rounds, 'round')} of {number_format.counted(plan.steps_per_round, 'step')}"
        neighbours = f"neighbours: {plain(plan.adjacency)}"
        if plan.noise_at == "server":
            kept = [
                "- Who is trusted: the server. It sees all that each device sends, bare, and adds the noise.",
                f"- Noise multiplier {number_format.constant(plan.noise_multiplier)}; each device's whole update is cut to "
                f"length {number_format.constant(plan.update_clip_norm)}; {steps}, every device in each round; {neighbours}",
            ]
        else:
            kept = [
                "- Who is trusted: nobody but the device itself, which cuts gradients and adds the noise.",
                f"- Noise multiplier {number_format.constant(plan.noise_multiplier)}, clip norm "
                f"{number_format.constant(plan.clip_norm)}, sampling rate {number_format.constant(plan.sampling_rate)}, "
                f"{steps}; {neighbours}",
            ]
        lines += [
            "",
            *([f"- It covers {plain(plan.covers)}"] if plan.covers else []),
            f"- Planned: {plain(str(plan.epsilon))}",
            f"- Spent: {plain(str(formatting.spent(record)))}",
            *kept,
        ]
    return lines


def _bias(record: RunRecord) -> list[str]:
    lines = ["## Whom it serves worse", ""]
    match record.bias_after:
        case NotMeasured(not_measured=reason):
            return [*lines, f"Not measured: {plain(reason)}"]
        case BiasRecord() as audit:
            lines += [f"- {plain(sentence)}" for sentence in audit.sentences]
            counts = f"{number_format.counted(audit.photos, 'photo')}, {number_format.counted(audit.faces_per_photo, 'face')} each"
            lines += ["", f"Probe: {plain(audit.probe)}, {counts}."]
            measures = list(dict.fromkeys(name for group in audit.groups for name in group.metrics))
            absent = NotMeasured(not_measured="too few photos of this group")
            rows = [
                [group.group, *(str(group.metrics.get(name, absent)) for name in measures)]
                for group in audit.groups
            ]
            units = [
                f" ({formatting.unit_of(name)})" if formatting.unit_of(name) else "" for name in measures
            ]
            titles = [formatting.title_of(name) + unit for name, unit in zip(measures, units, strict=True)]
            heads = ["Group", *titles]
            return [*lines, "", *table(heads, rows)]


def _private(record: RunRecord) -> list[str]:
    last, measures = record.device_metrics[-1], device_metrics_section.measures_of(record.device_metrics)
    heads = ["Group", "Units", *(device_metrics_section.title(name) for name in measures)]
    rows = [
        [group.group, *device_metrics_section.texts(group, measures)]
        for group in device_metrics_section.ordered(last)
    ]
    lines = ["## What devices say of their own photos", ""]
    lines += [f"- {plain(text)}" for text in device_metrics_section.sentences(record)]
    lines += [
        "",
        *(f"- {plain(device_metrics_section.spent_sentence(told))}" for told in record.device_metrics),
        "",
    ]
    return lines + table(heads, rows)


def _leakage(record: RunRecord) -> list[str]:
    lines = ["## What an update gives away", ""]
    attacks = disclosures.attacks_of(record)
    if not attacks:
        return [*lines, "Not measured: no attack was run against these updates."]
    if note := disclosures.attack_note(record):
        lines += [plain(note), ""]
    for attack in attacks:
        lines.append(
            f"- {plain(formatting.named_sentence(attack))} {plain(formatting.attack_sentence(attack))}"
        )
    untested = list(dict.fromkeys(item for attack in attacks for item in attack.not_tested))
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
        *([f"- {plain(note)}"] if (note := disclosures.hash_note(record)) else []),
        f"- Run from {record.started} to {record.finished}",
        f"- Versions: {plain(versions)}",
        "",
        "Run it again:",
        "",
        *code_block(record.command),
    ]
