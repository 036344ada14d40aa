"""The few numbers at the head of a page: what it cost, who gained or lost, what travels, what an update gives away.

Called by reports.page. A defence that the run did not use has no place here.
"""

from __future__ import annotations

from fedface import number_format
from fedface.measurements import Epsilon, Interval, NotMeasured
from fedface.number_format import rounded_up
from fedface.reports import disclosures, formatting, headline_summary
from fedface.reports.run_record import NoPrivacyRecord, RunRecord


def headline_numbers(record: RunRecord) -> list[dict[str, str]]:
    """Each with a value and the text below it; what was not measured has none."""
    shown = []
    cost = formatting.spent(record)
    if isinstance(cost, Epsilon):
        text = f"epsilon at most, at delta {number_format.format_delta(cost.delta)}, per {cost.unit}"
        shown.append({"value": rounded_up(cost.upper), "text": text})
    else:
        shown.append({"value": "no bound", "text": "on what a photo's owner loses"})
    if (served := headline_summary.service_change(record)) is not None:
        text = f"served {served.verdict}: {formatting.title_of(served.measure)} {served.change}"
        shown.append({"value": served.groups, "text": formatting.with_unit(text, served.measure)})
    leading = headline_summary.leading_gap(record)
    if not isinstance(leading, NotMeasured):
        measure, before, after = leading
        if isinstance(before.difference, Interval) and isinstance(after.difference, Interval):
            was, now = abs(before.difference.estimate), abs(after.difference.estimate)
            text = f"gap between groups, {_head(measure)}"
            shown.append(
                {"value": f"{number_format.number(was)} → {number_format.number(now)}", "text": text}
            )
    if record.rounds:
        answered = sum(len(entry.answered) for entry in record.rounds)
        sent = sum(entry.bytes_up for entry in record.rounds)
        if answered:
            value = number_format.size(sent / answered)
            shown.append({"value": value, "text": "sent by one device in one round"})
    used = disclosures.attacks_of(record)
    if isinstance(record.plan, NoPrivacyRecord):  # what noise would have done is no part of what the run did
        used = tuple(attack for attack in used if attack.defense == formatting.NO_DEFENCE)
    named = [
        (attack.gallery.estimate, attack.defense) for attack in used if isinstance(attack.gallery, Interval)
    ]
    if named:
        value = " → ".join(number_format.percent(rate) for rate, _ in named)
        defences = " → ".join(defence for _, defence in named)
        text = f"of updates give away whose photo was in them, of {used[0].gallery_size}: {defences}"
        shown.append({"value": value, "text": text})
    return shown


def _head(measure: str) -> str:
    return ", ".join(part for part in (formatting.title_of(measure), formatting.unit_of(measure)) if part)
