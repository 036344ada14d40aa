"""The head of a report: a summary of which groups a run serves worse or better and its privacy loss, and a few numbers.

A change is stated as one only where two intervals do not overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedface import number_format
from fedface.audits.bias import METRICS
from fedface.audits.gradient_inversion import NoDefense
from fedface.audits.group_metrics import Gap
from fedface.measurements import Epsilon, Interval, NotMeasured
from fedface.privacy.privacy_target import NoPrivacy, PrivacyTarget
from fedface.reports import disclosures, formatting
from fedface.reports.run_record import BiasRecord, RunRecord

LEADING = ("skin_difference", "same_half", "same_tone_bin", "monk_shift", "ita_shift", "consistency_error")


def headline_summary(record: RunRecord) -> list[str]:
    """A few sentences, a change that affects most groups first."""
    change = service_change(record)
    return [
        *([change.sentence] if change is not None else []),
        _gap_answer(record),
        *([record.device_metrics[-1].estimates.headline()] if record.device_metrics else []),
        *_quality_answer(record),
        _cost_answer(record),
    ]


def headline_numbers(record: RunRecord) -> list[dict[str, str]]:
    """Each with a value and the text below it; what was not measured is left out."""
    shown = []
    cost = formatting.spent(record)
    if isinstance(cost, Epsilon):
        text = f"epsilon at most, at delta {number_format.format_delta(cost.delta)}, per {cost.unit}"
        shown.append({"value": number_format.rounded_up(cost.upper), "text": text})
    else:
        shown.append({"value": "no bound", "text": "on the privacy loss"})
    if (change := service_change(record)) is not None:
        text = f"served {change.verdict}: {formatting.title_of(change.metric)} {change.change}"
        shown.append({"value": change.groups, "text": formatting.with_unit(text, change.metric)})
    leading = leading_gap(record)
    if not isinstance(leading, NotMeasured):
        metric, before, after = leading
        gaps = [size_of(gap) for gap in (before, after)]
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


@dataclass(frozen=True, kw_only=True)
class MetricChange:
    """A change in the leading metric that affects most groups in the same direction."""

    verdict: Literal["worse", "better"]
    groups: str  # "6 of 6 groups"
    metric: str
    change: str  # "from 6.2 to 12.4"
    sentence: str


def service_change(record: RunRecord) -> MetricChange | None:
    """Whether most groups are served clearly worse, or better, after the run: intervals that do not overlap.

    A gap that shrinks because every group is served as badly as the worst is not an improvement. None: neither holds.
    """
    metric = leading_metric(record)
    if not (
        metric and isinstance(record.bias_before, BiasRecord) and isinstance(record.bias_after, BiasRecord)
    ):
        return None
    before, after = record.bias_before.report, record.bias_after.report
    pairs = {
        name: (before.groups[name][metric], group[metric])
        for name, group in after.groups.items()
        if name in before.groups
    }
    worse = [name for name, (was, now) in pairs.items() if _worse(was, now, metric)]
    better = [name for name, (was, now) in pairs.items() if _worse(now, was, metric)]
    verdict: Literal["worse", "better"]
    verdict, changed, other = (
        ("worse", worse, better) if len(worse) > len(better) else ("better", better, worse)
    )
    if 2 * len(changed) <= len(pairs):
        return None
    was, now = before.overall[metric], after.overall[metric]
    if not was.overlaps(now):
        change = f"from {number_format.number(was.estimate)} to {number_format.number(now.estimate)}"
        values = f"from {' '.join(was.texts())} to {' '.join(now.texts())}"
        where = f"{formatting.with_unit(values, metric)} over all {number_format.counted(was.count, 'photo')}"
    else:
        spans = [_span([pair[when].estimate for pair in pairs.values()]) for when in (0, 1)]
        change = f"from {spans[0]} to {spans[1]}"
        where = f"{formatting.with_unit(change, metric)}, group by group"
    if len(changed) == len(pairs):
        who = "Every group is"
    else:
        who = f"{len(changed)} of {len(pairs)} groups are"
    rest = f"; {' and '.join(other)} {'better' if verdict == 'worse' else 'worse'}" if other else ""
    return MetricChange(
        verdict=verdict,
        groups=f"{len(changed)} of {len(pairs)} groups",
        metric=metric,
        change=change,
        sentence=f"{who} served {verdict} after the run: {formatting.title_of(metric)} {where}{rest}.",
    )


def leading_metric(record: RunRecord) -> str:
    """The metric that the summary reports; empty where an audit is missing."""
    leading = leading_gap(record)
    if not isinstance(leading, NotMeasured):
        return leading[0]
    both = isinstance(record.bias_before, BiasRecord) and isinstance(record.bias_after, BiasRecord)
    return LEADING[0] if both else ""


def _worse(one: Interval, other: Interval, metric: str) -> bool:
    """Whether `other` is clearly worse than `one`: a larger cost, a smaller rate, a shift further from 0."""
    match METRICS[metric].kind:
        case "rate":
            return other.high < one.low
        case "shift":
            furthest = max(abs(one.low), abs(one.high))
            return other.low > furthest or other.high < -furthest
        case "cost":
            return other.low > one.high


def _span(values: Sequence[float]) -> str:
    low, high = number_format.number(min(values)), number_format.number(max(values))
    return low if low == high else f"{low}–{high}"


def leading_gap(record: RunRecord) -> tuple[str, Gap, Gap] | NotMeasured:
    """The first metric of a fixed order whose gap both audits measured, with its gap before and after."""
    match record.bias_before, record.bias_after:
        case (BiasRecord(report=before), BiasRecord(report=after)):
            for name in (*LEADING, *before.gaps):
                if name in before.gaps and name in after.gaps:
                    return name, before.gaps[name], after.gaps[name]
            return NotMeasured(not_measured="no two groups had enough photos to be compared")
        case (NotMeasured() as missing, _) | (_, NotMeasured() as missing):
            return missing
    return NotMeasured(not_measured="there was no audit")


def size_of(gap: Gap) -> Interval:
    """How far apart the worst and the best served group are, whichever sign worse has for this metric."""
    return gap.difference if gap.difference.estimate >= 0 else gap.difference.mirrored()


def _gap_answer(record: RunRecord) -> str:
    leading = leading_gap(record)
    if isinstance(leading, NotMeasured):
        return f"The gap between groups was not measured: {leading.not_measured}."
    metric, before, after = leading
    old, new = size_of(before), size_of(after)
    change = f"from {number_format.number(old.estimate)} to {number_format.number(new.estimate)}"
    change = f"{formatting.with_unit(change, metric)} ({formatting.intervals(old, new)})"
    start = f"The gap between the worst and the best served group in {formatting.title_of(metric)}"
    if not old.overlaps(new):
        return f"{start} {'shrank' if new.estimate < old.estimate else 'grew'} {change}."
    return f"{start} went {change}, but the intervals overlap: no change is shown."


def _quality_answer(record: RunRecord) -> list[str]:
    before = record.metrics_before.get("distance")
    after = record.rounds[-1].metrics.get("distance") if record.rounds else None
    if not isinstance(before, Interval) or not isinstance(after, Interval):
        return []
    unclear = before.overlaps(after)
    verb = "went" if unclear else "fell" if after.estimate < before.estimate else "rose"
    change = f"{verb} from {number_format.number(before.estimate)} to {number_format.number(after.estimate)}"
    change = f"{change} ({formatting.intervals(before, after)})"
    where = (
        f"in {number_format.counted(len(record.rounds), 'round')} on "
        f"{number_format.counted(len(record.devices), 'device')}"
    )
    doubt = ", but the intervals overlap: no change is shown" if unclear else ""
    return [f"The distance of samples to faces like the devices' {change} {where}{doubt}."]


def _cost_answer(record: RunRecord) -> str:
    target = record.plan.privacy
    if not isinstance(target, PrivacyTarget):
        return formatting.privacy_guarantee(record.plan)
    cost = formatting.spent(record)
    if isinstance(cost, NotMeasured):
        return f"The privacy loss was not measured: {cost.not_measured}."
    return (
        f"The privacy loss of one {cost.unit} is at most epsilon {number_format.rounded_up(cost.upper)} at delta "
        f"{number_format.format_delta(cost.delta)} ({cost.bounds()}), within the guaranteed "
        f"{number_format.constant(target.epsilon)}."
    )
