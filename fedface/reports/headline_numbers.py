"""The few numbers at the head of a report: privacy loss, service by group, traffic and leakage."""

from __future__ import annotations

from fedface import number_format
from fedface.audits.gradient_inversion import NoDefense
from fedface.measurements import Epsilon, NotMeasured
from fedface.privacy.privacy_target import NoPrivacy
from fedface.reports import disclosures, formatting, headline_summary
from fedface.reports.run_record import RunRecord


def headline_numbers(record: RunRecord) -> list[dict[str, str]]:
    """Each with a value and the text below it; what was not measured is left out."""
    shown = []
    cost = formatting.spent(record)
    if isinstance(cost, Epsilon):
        text = f"epsilon at most, at delta {number_format.format_delta(cost.delta)}, per {cost.unit}"
        shown.append({"value": number_format.rounded_up(cost.upper), "text": text})
    else:
        shown.append({"value": "no bound", "text": "on the privacy loss"})
    if (change := headline_summary.service_change(record)) is not None:
        text = f"served {change.verdict}: {formatting.title_of(change.metric)} {change.change}"
        shown.append({"value": change.groups, "text": formatting.with_unit(text, change.metric)})
    leading = headline_summary.leading_gap(record)
    if not isinstance(leading, NotMeasured):
        metric, before, after = leading
        gaps = [headline_summary.size_of(gap) for gap in (before, after)]
        was, now = (number_format.number(gap.estimate) for gap in gaps)
        title = ", ".join(part for part in (formatting.title_of(metric), formatting.unit_of(metric)) if part)
        shown.append(
            {"value": f"{was} → {now}", "text": f"gap between groups, {title}; {formatting.intervals(*gaps)}"}
        )
    updates = sum(len(entry.participants) for entry in record.rounds)
    if updates:
        sent = sum(entry.bytes_up for entry in record.rounds)
        shown.append({"value": number_format.size(sent / updates), "text": "sent by one device in one round"})
    attacks = disclosures.applicable_attacks(record)
    if isinstance(record.plan.privacy, NoPrivacy):  # a defense that the run did not use has no place here
        attacks = tuple(attack for attack in attacks if isinstance(attack.scores.defense, NoDefense))
    if attacks:
        value = " → ".join(number_format.percent(attack.identification.rate.estimate) for attack in attacks)
        defenses = " → ".join(formatting.defense_label(attack.scores.defense) for attack in attacks)
        rates = [attack.identification.rate for attack in attacks]
        spans = " → ".join(formatting.rate_interval(rate) for rate in rates)
        among = f"of steps reveal which of {attacks[0].identification.candidates} photos they surely hold"
        bounds = " → ".join(number_format.percent(attack.identification.bound) for attack in attacks)
        text = f"{among}: {defenses}; {spans}, n = {rates[0].count}; at most {bounds} for any attack"
        shown.append({"value": value, "text": text})
    return shown
