"""Metrics of the devices' own photos in reports: light to dark, no false zeros, one cell for suppressed groups."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from made_up import around, own_metrics, with_metrics

from fedface.audits.dp_metric_estimates import missing_metrics
from fedface.audits.dp_metrics import LocalMetricsConfig
from fedface.audits.dp_model_ranking import PairwiseComparison, Ranking
from fedface.audits.dp_ratio_estimates import DP_METRICS
from fedface.codec import dumps, loads
from fedface.measurements import Epsilon, Interval
from fedface.reports import device_metrics_section, html_report, model_card
from fedface.reports.device_metrics_record import DeviceMetricsRecord
from fedface.reports.model_ranking_report import ALL_PHOTOS, RankingReport, markdown
from fedface.reports.run_record import RunRecord

GROUPS = ["light (Monk 1-3)", "medium (Monk 4-6)", "dark (Monk 7-10)"]


def a_ranking(ties: bool) -> RankingReport:
    """A ranking of two models, which can be distinguished or not. FIXTURE: no number in it was measured."""
    reply = own_metrics("pretrain", 1.0, (300, 5, 60))
    better, worse = around(0.001, 0.0001, 365), around(0.002, 0.0001, 365)
    ranking = Ranking(
        metric="consistency_error",
        by="overall",
        order=("pretrain", "other"),
        costs={"pretrain": better, "other": worse},
        comparisons=(
            PairwiseComparison(
                better="pretrain", worse="other", difference=around(0.001, 0.002 if ties else 0.0005, 730)
            ),
        ),
    )
    return RankingReport(
        name="games",
        question="Who?",
        finished="2026-01-05T09:19:41+00:00",
        command="fedface rank-models a.yaml base 'b c.safetensors'",
        experiment={},
        candidates=(reply, replace(reply, when="other")),
        rankings=(ranking,),
        epsilon=Epsilon(lower=5.9, estimate=6.0, upper=6.0, delta=1e-4, unit="occasion"),
        noise="local",
        notes=(),
    )


def test_groups_are_ordered_light_to_dark_whether_reported_or_not() -> None:
    record = own_metrics("after", 1.0, (300, 5, 60))
    assert list(record.estimates.groups) == GROUPS
    assert list(device_metrics_section.groups_of(record)) == [*GROUPS, "all"]
    assert device_metrics_section.group_names([record]) == [*GROUPS, "all"]


def test_a_metric_at_the_end_of_its_range_is_marked() -> None:
    """Every generated face was detected, so the share is 1 or beyond it under noise; a note explains the mark."""
    reply = own_metrics("after", 1.0, (300, 300, 300), noise=0.0)
    groups = reply.estimates.reported
    assert list(groups) == GROUPS
    assert all(group.at_range_limit("detected") for group in groups.values())
    assert not any(group.at_range_limit("consistency_error") for group in groups.values())
    cells = dict(zip(["units", *DP_METRICS], device_metrics_section.texts(groups[GROUPS[0]]), strict=True))
    assert device_metrics_section.AT_LIMIT in cells["detected"] and "*" not in cells["consistency_error"]
    assert "end of its range" in device_metrics_section.range_limit_note([reply])[0]


def test_a_small_consistency_error_is_not_written_as_zero() -> None:
    """Two digits of a half width of 0.1 would leave nothing of 0.0012."""
    estimate, _ = Interval(estimate=0.0012, low=0.0, high=0.2, count=30).texts()
    assert estimate == "0.001"


@pytest.mark.usefixtures("quick_charts")
def test_a_suppressed_group_takes_one_cell(record: RunRecord, folder: Path) -> None:
    reply = with_metrics(record, own_metrics("after", 1.0, (300, 5, 60)))
    html = html_report.render(reply, folder)
    assert html.count("suppressed: below 20 units") == 1 and 'colspan="6"' in html
    row = next(line for line in model_card.render(reply).splitlines() if line.startswith("| medium"))
    assert row.count("suppressed") == 1


@pytest.mark.usefixtures("quick_charts")
def test_metrics_whose_sum_was_not_revealed_are_reported_as_missing(record: RunRecord, folder: Path) -> None:
    """With their privacy cost, in the report and the model card; those before the run are shown."""
    before = own_metrics("before", 1.0, (300, 5, 60))
    lost = replace(
        before, when="after", participants=(), estimates=missing_metrics(LocalMetricsConfig(), "x y")
    )
    run = with_metrics(record, before, lost)
    for text in (html_report.render(run, folder), model_card.render(run)):
        assert "Nothing was measured: x y." in text and "nothing was measured: x y." in text
        assert "Evaluating the model after the run: a sum of 0 devices, at epsilon 4.000" in text


def test_without_a_comparison_the_detectable_gap_is_reported(record: RunRecord) -> None:
    few = with_metrics(record, own_metrics("after", 2.5, (60, 5, 5)))
    assert "the noise alone would hide differences" in device_metrics_section.sentences(few)[1]
    unknown = replace(few, experiment={})
    assert device_metrics_section.hidden_sentence(unknown) == ""


def test_a_record_is_equal_after_a_json_round_trip() -> None:
    reply = own_metrics("after", 1.0, (300, 5, 60))
    assert loads(DeviceMetricsRecord, dumps(reply)) == reply


def test_a_ranking_states_the_privacy_loss_of_all_answers_together() -> None:
    found = a_ranking(ties=True)
    assert found.privacy_sentence().startswith("Both evaluations by a device together: epsilon 6.000 ")
    assert "forty photos of one birthday count once" in found.privacy_sentence()
    assert loads(RankingReport, dumps(found)) == found


def test_a_ranking_without_a_winner_gives_no_order() -> None:
    tied, decided = markdown(a_ranking(ties=True)), markdown(a_ranking(ties=False))
    assert "No two of the 2 models can be distinguished by any metric." in tied
    assert "best first" not in tied and "best first: pretrain, other" in decided


def test_a_rankings_page_has_its_title_and_lists_missing_groups() -> None:
    text = markdown(a_ranking(ties=True))
    assert text.startswith("# Which model serves the devices' own photos best: ranking of 2 models\n")
    assert ALL_PHOTOS in text
    assert "Not in the chart, because they are suppressed: medium (Monk 4-6)." in text
    assert "```\nfedface rank-models a.yaml base 'b c.safetensors'\n```" in text
