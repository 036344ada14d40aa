"""The headline summary: a change that affects most groups comes first, and a change requires disjoint intervals."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_up import around, own_metrics, with_metrics

from fedface.audits.bias import GroupMetrics
from fedface.reports import headline_summary, model_card
from fedface.reports.headline_summary import headline_numbers
from fedface.reports.run_record import BiasRecord, RunRecord


def scaled(audit: object, factor: float, groups: int = 6) -> BiasRecord:
    """The same audit with the skin's colour difference of the first groups, and of all, times a factor."""
    assert isinstance(audit, BiasRecord)

    def times(metrics: GroupMetrics) -> GroupMetrics:
        value = metrics.skin_difference
        return replace(metrics, skin_difference=around(value.estimate * factor, 0.1, value.count))

    report = audit.report
    changed = {
        name: times(metrics) if index < groups else metrics
        for index, (name, metrics) in enumerate(report.groups.items())
    }
    overall = times(report.overall) if groups == len(report.groups) else report.overall
    return replace(audit, report=replace(report, groups=changed, overall=overall))


def test_a_gap_that_closes_because_all_are_served_worse_is_not_an_improvement(record: RunRecord) -> None:
    """7.9 over all before, three times that after; the gap sentence comes second."""
    worse = replace(record, bias_after=scaled(record.bias_before, 3.0))
    first = headline_summary.headline_summary(worse)[0]
    assert first.startswith(
        "Every group is served worse after the run: colour difference of the skin from 7.90 ["
    )
    assert "to 23.70 [23.60, 23.80] dE00 over all 240 photos" in first


def test_a_change_of_most_groups_names_the_exceptions(record: RunRecord) -> None:
    found = headline_summary.service_change(
        replace(record, bias_after=scaled(record.bias_before, 0.5, groups=5))
    )
    assert found is not None
    assert (found.verdict, found.groups) == ("better", "5 of 6 groups")
    assert "5 of 6 groups are served better" in found.sentence


def test_a_change_of_half_of_the_groups_is_not_a_change_of_most(record: RunRecord) -> None:
    half = replace(record, bias_after=scaled(record.bias_before, 3.0, groups=3))
    assert headline_summary.service_change(half) is None


def test_groups_whose_intervals_overlap_have_not_changed(record: RunRecord) -> None:
    assert headline_summary.service_change(replace(record, bias_after=record.bias_before)) is None


@pytest.mark.parametrize(
    ("after", "result"),
    [(2.9, "went from 3.05 to 2.90"), (1.0, "fell from 3.05 to 1.00"), (5.0, "rose from 3.05 to 5.00")],
)
def test_a_distance_fell_only_if_its_intervals_are_apart(
    record: RunRecord, after: float, result: str
) -> None:
    """Half widths of 0.22 about 3.05 and 2.9 overlap."""
    last = replace(record.rounds[-1], metrics={"distance": around(after, 0.22, 512)})
    changed = replace(
        record, metrics_before={"distance": around(3.05, 0.22, 512)}, rounds=(*record.rounds[:-1], last)
    )
    (sentence,) = [
        text for text in headline_summary.headline_summary(changed) if text.startswith("The distance")
    ]
    assert result in sentence
    assert ("no change is shown" in sentence) == (after == 2.9)


def test_one_round_and_one_device_are_singular(record: RunRecord) -> None:
    small = replace(record, rounds=record.rounds[-1:], devices=record.devices[:1])
    assert any("in 1 round on 1 device" in text for text in headline_summary.headline_summary(small))
    assert "1 device, 1 round: 7 updates, 1 refusal, 0 dropped" in model_card.render(small)


def test_the_summary_names_the_group_served_worse_on_the_devices_photos(record: RunRecord) -> None:
    """300 light and 60 dark photos at a tenth of the usual noise; the dark ones differ 2.5 times as much."""
    clear = with_metrics(record, own_metrics("after", 2.5, (300, 60, 60), noise=0.1))
    assert any(
        text.startswith("On the devices' own photos, dark (Monk 7-10) is served worse than light (Monk 1-3)")
        for text in headline_summary.headline_summary(clear)
    )


def test_the_summary_reports_that_noise_hides_the_gap(record: RunRecord) -> None:
    hidden = with_metrics(record, own_metrics("after", 1.0, (300, 300, 300)))
    assert any(
        "no group is shown to be served worse; a gap" in text
        for text in headline_summary.headline_summary(hidden)
    )
    few = with_metrics(record, own_metrics("after", 2.5, (60, 5, 5)))
    assert any("no groups could be compared" in text for text in headline_summary.headline_summary(few))


def test_a_headline_number_has_the_number_of_changed_groups(record: RunRecord) -> None:
    worse = replace(record, bias_after=scaled(record.bias_before, 3.0))
    assert "6 of 6 groups" in {tile["value"] for tile in headline_numbers(worse)}


def test_a_headline_number_of_an_attack_names_its_event_and_the_bound_on_any_attack(
    record: RunRecord,
) -> None:
    """What one step allows says nothing of a whole update."""
    (text,) = (number["text"] for number in headline_numbers(record) if "surely hold" in number["text"])
    assert text.startswith("of steps reveal which") and text.endswith("for any attack")
    assert "at most 100 % → 9.2 %" in text.replace("\xa0", " ")
