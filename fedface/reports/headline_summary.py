"""The short answer of a report: whom a run serves worse or better, by how much, and what that cost.

Called by reports.page, reports.card and the command line, so that all say the same. Made of the record's numbers
alone; a change is called one only where two intervals do not overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedface import number_format
from fedface.audits.bias import METRICS
from fedface.measurements import Interval, NotMeasured
from fedface.number_format import rounded_up
from fedface.reports import formatting
from fedface.reports.run_record import BiasRecord, GapRecord, NoPrivacyRecord, RunRecord

LEADING = ("skin_difference", "same_half", "same_tone_bin", "monk_shift", "ita_shift", "consistency_error")


def headline_summary(record: RunRecord) -> list[str]:
    """The short answer, in a few sentences made of the record's numbers alone; what all feel comes first."""
    served = service_change(record)
    return [
        *([served.sentence] if served is not None else []),
        _gap_answer(record),
        *(
            [record.device_metrics[-1].lead]
            if record.device_metrics and record.device_metrics[-1].lead
            else []
        ),
        *_quality_answer(record),
        _cost_answer(record),
    ]


@dataclass(frozen=True, kw_only=True)
class MetricChange:
    """A change that most groups feel alike, by the measure that the short answer speaks of."""

    verdict: Literal["worse", "better"]
    groups: str  # "6 of 6 groups"
    measure: str
    change: str  # "from 6.2 to 12.4"
    sentence: str


def service_change(record: RunRecord) -> MetricChange | None:
    """Whether most groups are served clearly worse, or better, after the run: intervals that do not overlap.

    A gap that shrinks because everybody is served as badly as the worst is no success; None says that neither holds.
    """
    measure = leading_measure(record)
    before, after = record.bias_before, record.bias_after
    if not (measure and isinstance(before, BiasRecord) and isinstance(after, BiasRecord)):
        return None
    old = {group.group: group.metrics.get(measure) for group in before.groups}
    pairs = {
        group.group: (was, now)
        for group in after.groups
        if isinstance(was := old.get(group.group), Interval)
        and isinstance(now := group.metrics.get(measure), Interval)
    }
    worse = [name for name, (was, now) in pairs.items() if _worse(was, now, measure)]
    better = [name for name, (was, now) in pairs.items() if _worse(now, was, measure)]
    verdict: Literal["worse", "better"]
    verdict, changed, other = (
        ("worse", worse, better) if len(worse) > len(better) else ("better", better, worse)
    )
    if 2 * len(changed) <= len(pairs):
        return None
    was, now = before.overall.get(measure), after.overall.get(measure)
    if isinstance(was, Interval) and isinstance(now, Interval) and _apart(was, now):
        change = f"from {number_format.number(was.estimate)} to {number_format.number(now.estimate)}"
        told = f"from {' '.join(was.texts())} to {' '.join(now.texts())}"
        where = f"{formatting.with_unit(told, measure)} over all {number_format.counted(was.count, 'photo')}"
    else:
        spans = [_span([pair[when].estimate for pair in pairs.values()]) for when in (0, 1)]
        change = f"from {spans[0]} to {spans[1]}"
        where = f"{formatting.with_unit(change, measure)}, group by group"
    if len(changed) == len(pairs):
        who = "Every group is"
    else:
        who = f"{len(changed)} of {len(pairs)} groups are"
    rest = f"; {' and '.join(other)} {'better' if verdict == 'worse' else 'worse'}" if other else ""
    return MetricChange(
        verdict=verdict,
        groups=f"{len(changed)} of {len(pairs)} groups",
        measure=measure,
        change=change,
        sentence=f"{who} served {verdict} after the run: {formatting.title_of(measure)} {where}{rest}.",
    )


def leading_measure(record: RunRecord) -> str:
    """The measure that the short answer speaks of; empty where no audit has one."""
    leading = leading_gap(record)
    if not isinstance(leading, NotMeasured):
        return leading[0]
    audits = [a for a in (record.bias_before, record.bias_after) if isinstance(a, BiasRecord)]
    known = [{name for group in audit.groups for name in group.metrics} for audit in audits]
    return next((name for name in LEADING if len(known) == 2 and name in known[0] & known[1]), "")


def _worse(one: Interval, other: Interval, measure: str) -> bool:
    """Whether `other` is clearly worse than `one`: a larger cost, a smaller rate, a shift further from 0."""
    match METRICS[measure].kind if measure in METRICS else "cost":
        case "rate":
            return other.high < one.low
        case "shift":
            furthest = max(abs(one.low), abs(one.high))
            return other.low > furthest or other.high < -furthest
        case _:
            return other.low > one.high


def _apart(one: Interval, other: Interval) -> bool:
    """Whether two intervals have nothing in common."""
    return max(one.low, other.low) > min(one.high, other.high)


def _span(values: Sequence[float]) -> str:
    low, high = number_format.number(min(values)), number_format.number(max(values))
    return low if low == high else f"{low}–{high}"


def leading_gap(record: RunRecord) -> tuple[str, GapRecord, GapRecord] | NotMeasured:
    """The measure that the short answer speaks of, with its gap before and after.

    The first of a fixed order that both audits compared, so that nobody can pick the kindest one.
    """
    match record.bias_before, record.bias_after:
        case (BiasRecord(gaps=before), BiasRecord(gaps=after)):
            for name in (*LEADING, *before):
                if name in before and name in after:
                    return name, before[name], after[name]
            return NotMeasured(not_measured="no two groups had enough photos to be compared")
        case (NotMeasured() as missing, _) | (_, NotMeasured() as missing):
            return missing
    return NotMeasured(not_measured="there was no audit")


def _gap_answer(record: RunRecord) -> str:
    leading = leading_gap(record)
    if isinstance(leading, NotMeasured):
        return f"Whom the result serves worse was not measured: {leading.not_measured}."
    measure, before, after = leading
    title = formatting.title_of(measure)
    match before.difference, after.difference:
        case (Interval() as old, Interval() as new):
            old, new = _upward(old), _upward(new)
            was, now = old.estimate, new.estimate
            change = formatting.with_unit(
                f"from {number_format.number(was)} to {number_format.number(now)}", measure
            )
            start = f"The gap between the worst and the best served group in {title}"
            if _apart(old, new):
                return f"{start} {'shrank' if now < was else 'grew'} {change}."
            return f"{start} went {change}, but the intervals overlap: no change is shown."
        case (NotMeasured(not_measured=reason), _) | (_, NotMeasured(not_measured=reason)):
            return f"The gap between groups in {title} was not measured: {reason}."
    return f"The gap between groups in {title} was not measured."


def _upward(gap: Interval) -> Interval:
    """A gap as a size: mirrored where worse means less, so that two gaps can be compared."""
    if gap.estimate >= 0:
        return gap
    return Interval(estimate=-gap.estimate, low=-gap.high, high=-gap.low, count=gap.count)


def _quality_answer(record: RunRecord) -> list[str]:
    before = record.metrics_before.get("distance")
    after = record.rounds[-1].metrics.get("distance") if record.rounds else None
    if not isinstance(before, Interval) or not isinstance(after, Interval):
        return []
    apart = _apart(before, after)
    verb = "went" if not apart else "fell" if after.estimate < before.estimate else "rose"
    change = f"{verb} from {number_format.number(before.estimate)} to {number_format.number(after.estimate)}"
    where = f"in {number_format.counted(len(record.rounds), 'round')} on {number_format.counted(len(record.devices), 'device')}"
    doubt = "" if apart else ", but the intervals overlap: no change is shown"
    return [f"The distance of samples to faces like the devices' {change} {where}{doubt}."]


def _cost_answer(record: RunRecord) -> str:
    if isinstance(record.plan, NoPrivacyRecord):
        return f"It makes no privacy promise: {record.plan.no_privacy}"
    cost = formatting.spent(record)
    if isinstance(cost, NotMeasured):
        return f"What it cost in privacy was not measured: {cost.not_measured}."
    return (
        f"It cost each {cost.unit} at most epsilon {rounded_up(cost.upper)} at delta {number_format.format_delta(cost.delta)} "
        f"({cost.bounds()}), of {number_format.constant(record.plan.target_epsilon)} promised."
    )
