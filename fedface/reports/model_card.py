"""The model card of a run, in Markdown: intended use, training, privacy, metrics by group, leakage and limits.

Source: Mitchell et al. 2019 (arXiv:1810.03993). Everything that a device or a YAML file wrote is escaped, because
Markdown allows HTML.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedface import number_format
from fedface.atomic_io import replace_text
from fedface.audits.bias import METRICS
from fedface.audits.dp_ratio_estimates import DP_METRICS
from fedface.audits.gradient_inversion import NOT_TESTED, THREAT_MODEL
from fedface.measurements import NotMeasured
from fedface.privacy.accounting import ADJACENCY
from fedface.privacy.privacy_target import PrivacyTarget
from fedface.privacy_units import describe_unit
from fedface.reports import device_metrics_section, disclosures, formatting, headline_summary
from fedface.reports.markdown import code_block, plain, table
from fedface.reports.run_record import BiasRecord, RunRecord

FILE = "model-card.md"
NO_LIMITS = "The limits of this run were not documented; interpret its numbers with care."


def render(record: RunRecord) -> str:
    """The model card as Markdown text."""
    sections = [
        _head(record),
        _use(record),
        _training(record),
        _privacy(record),
        _bias(record),
        *([_device_metrics(record)] if record.device_metrics else []),
        _leakage(record),
        _limits(record),
        _provenance(record),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def write(record: RunRecord, folder: Path) -> Path:
    """Render the card into the run's folder and return its path."""
    path = folder / FILE
    replace_text(path, render(record))
    return path


def escaped_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; cells are escaped here."""
    return table([plain(head) for head in heads], [[plain(cell) for cell in row] for row in rows])


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
        "Research on improving face generators and upsamplers with photos that stay on their devices, and on the",
        "privacy loss, the cost and the effect on different groups. A face that these weights generate from a",
        "low-resolution photo is one of many consistent with it, not the person in it.",
        "",
        "Not for identifying people, not as evidence, not for decisions about people.",
    ]


def _training(record: RunRecord) -> list[str]:
    rounds = len(record.rounds)
    updates = sum(len(entry.participants) for entry in record.rounds)
    refused = sum(len(entry.refusals) for entry in record.rounds)
    dropped = sum(len(entry.dropped) for entry in record.rounds)
    counts = f"{number_format.counted(updates, 'update')}, {number_format.counted(refused, 'refusal')}"
    replies = f"{counts}, {dropped} dropped"
    size = f"{number_format.counted(len(record.devices), 'device')}, {number_format.counted(rounds, 'round')}"
    lines = ["## Training", "", f"{size}: {replies}.", ""]
    known = [[device.id, device.description] for device in record.devices]
    lines += escaped_table(["Device", "Publicly known"], known)
    return [
        *lines,
        "",
        "### Withdrawal",
        "",
        *(f"- {plain(text)}" for text in disclosures.withdrawal_notes(record)),
    ]


def _privacy(record: RunRecord) -> list[str]:
    plan, dp = record.plan, record.plan.dp_parameters
    lines = ["## Privacy", "", plain(formatting.privacy_guarantee(plan))]
    if not isinstance(plan.privacy, PrivacyTarget):
        return lines
    schedule = plan.schedule
    steps = (
        f"{number_format.counted(schedule.rounds, 'round')} of "
        f"{number_format.counted(schedule.steps_per_round, 'step')}"
    )
    trusted = {
        "local": "only the device itself, which clips gradients and adds the noise.",
        "central": "the server. It receives each device's update without noise and adds the noise to the sum.",
        "distributed": f"no server. Of the devices in each sum, {dp.honest_devices} must add their share of the noise "
        "and keep it from the server, which sees only the sum.",
    }[dp.noise]
    if dp.unit == "library":
        mechanism = [
            f"- Trusted: {trusted}",
            f"- Noise multiplier {number_format.constant(plan.noise_multiplier)}; each device's update is clipped to "
            f"L2 norm {number_format.constant(plan.update_clip_norm)}; {steps}, every device in each round; "
            f"adjacency: {ADJACENCY}",
        ]
    else:
        mechanism = [
            f"- Trusted: {trusted}",
            f"- Noise multiplier {number_format.constant(plan.noise_multiplier)}, clip norm "
            f"{number_format.constant(schedule.clip_norm)}, sampling rate "
            f"{number_format.constant(schedule.sampling_rate)}, {steps}; adjacency: {ADJACENCY}",
        ]
    return [
        *lines,
        "",
        f"- Unit: {plain(describe_unit(dp.unit))}",
        f"- Planned: {plain(str(record.planned_epsilon))}",
        f"- Spent: {plain(str(formatting.spent(record)))}",
        *mechanism,
    ]


def _bias(record: RunRecord) -> list[str]:
    lines = ["## Metrics by group", ""]
    match record.bias_after:
        case NotMeasured(not_measured=reason):
            return [*lines, f"Not measured: {plain(reason)}"]
        case BiasRecord(report=report, probe=probe):
            lines += [f"- {plain(sentence)}" for sentence in report.sentences()]
            photos = number_format.counted(report.photos, "photo")
            faces = number_format.counted(report.faces_per_photo, "face")
            lines += ["", f"Probe: {plain(probe)}, {photos}, {faces} each."]
            absent = ["not measured: too few photos of this group"] * len(METRICS)
            rows = []
            for name in report.counts:
                found = report.groups.get(name)
                rows.append([name, *([str(found[metric]) for metric in METRICS] if found else absent)])
            heads = [
                f"{formatting.title_of(name)} ({formatting.unit_of(name)})" if formatting.unit_of(name)
                else formatting.title_of(name)
                for name in METRICS
            ]  # fmt: skip
            return [*lines, "", *escaped_table(["Group", *heads], rows)]


def _device_metrics(record: RunRecord) -> list[str]:
    heads = ["Group", "Units", *(device_metrics_section.title(name) for name in DP_METRICS)]
    groups = device_metrics_section.groups_of(record.device_metrics[-1])
    rows = [[name, *device_metrics_section.texts(group)] for name, group in groups.items()]
    lines = ["## Metrics from the devices' own photos", ""]
    lines += [f"- {plain(text)}" for text in device_metrics_section.sentences(record)]
    lines += [
        "",
        *(f"- {plain(device_metrics_section.cost_sentence(one))}" for one in record.device_metrics),
        "",
    ]
    return lines + escaped_table(heads, rows)


def _leakage(record: RunRecord) -> list[str]:
    lines = ["## Leakage from an update", ""]
    attacks = disclosures.applicable_attacks(record)
    if not attacks:
        return [*lines, "Not measured: no attack was run against these updates."]
    if note := disclosures.attack_note(record):
        lines += [plain(note), ""]
    for attack in attacks:
        identified = formatting.identification_sentence(attack.identification, attack.scores.defense)
        lines.append(f"- {plain(identified)} {plain(formatting.inversion_sentence(attack.scores))}")
    if record.plan.dp_parameters.is_private:
        ceilings = formatting.ceilings_sentence(record.plan, attacks[0].identification.candidates)
        lines.append(f"- {plain(ceilings)}")
    return [*lines, "", plain(THREAT_MODEL), "", f"Not tested: {plain('; '.join(NOT_TESTED))}."]


def _limits(record: RunRecord) -> list[str]:
    notes = record.notes or (NO_LIMITS,)
    return ["## Limitations", "", *(f"- {plain(note)}" for note in notes)]


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
