"""What devices say of their own photos in print: light to dark, no false zero, what is not told in one cell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from made_up import own_figures, with_figures

from fedface.codec import dumps, loads
from fedface.measurements import Epsilon, Interval
from fedface.reports import device_metrics_section, html_report, model_card
from fedface.reports.device_metrics_record import DeviceMetricsRecord
from fedface.reports.model_ranking_report import ALL_ASKED, RankingRecord, RankingReport, markdown
from fedface.reports.record_builders import light_to_dark
from fedface.reports.run_record import RunRecord

GROUPS = ["light (Monk 1-3)", "medium (Monk 4-6)", "dark (Monk 7-10)"]


def games(ties: bool, evaluation: bool = True) -> RankingReport:
    """A tournament of two models, which are told apart or not. FIXTURE: no number in it was measured."""
    told = own_figures("pretrain", 1.0, (300, 5, 60))
    ranking = RankingRecord(
        measure="consistency_error",
        by="overall",
        order=("pretrain", "other"),
        ties=(("pretrain", "other"),) if ties else (),
        sentences=("By consistency error, best first: base, other.",),
    )
    return RankingReport(
        name="games",
        question="Who?",
        finished="2026-01-05T09:19:41+00:00",
        command="fedface rank-models a.yaml base 'b c.safetensors'",
        experiment={"evaluation": {"sampling_rate": 1.0}} if evaluation else {},
        candidates=(told, replace(told, when="other")),
        rankings=(ranking,),
    )


def test_groups_stand_light_to_dark_whether_told_or_not() -> None:
    assert light_to_dark([GROUPS[2], GROUPS[0], GROUPS[1]]) == GROUPS
    assert light_to_dark(["b", "a"]) == ["b", "a"]
    told = own_figures("after", 1.0, (300, 5, 60))
    assert [group.group for group in told.groups] == GROUPS
    mixed = replace(told, groups=(told.groups[2], told.groups[0], told.groups[1]))
    assert [group.group for group in device_metrics_section.ordered(mixed)] == [*GROUPS, "all"]
    assert [row["group"] for row in device_metrics_section.rows([mixed])] == [*GROUPS, "all"]


def test_a_figure_at_the_end_of_its_range_is_marked_and_no_perfect_zero() -> None:
    """Every made face was found, so the share is 1 or beyond it under noise; the sentence says what the mark means."""
    told = own_figures("after", 1.0, (300, 300, 300), noise=0.0)
    assert all("detected" in group.at_end for group in told.groups)
    assert not any("consistency_error" in group.at_end for group in told.groups)
    cells = device_metrics_section.texts(told.groups[0], ["consistency_error", "detected"])
    assert device_metrics_section.AT_END in cells[2] and "*" not in cells[1]
    assert "end of its range" in device_metrics_section.end_sentence([told])[0]


def test_a_small_consistency_error_is_not_written_as_zero() -> None:
    """Two digits of a half width of 0.1 would leave nothing of 0.0012."""
    estimate, _ = Interval(estimate=0.0012, low=0.0, high=0.2, count=30).texts()
    assert estimate == "0.001"


def test_a_group_that_is_not_told_takes_one_cell(record: RunRecord, folder: Path) -> None:
    told = with_figures(record, own_figures("after", 1.0, (300, 5, 60)))
    html = html_report.render(told, folder)
    assert html.count("not told: below 20 units") == 1 and 'colspan="6"' in html
    row = next(line for line in model_card.render(told).splitlines() if line.startswith("| medium"))
    assert row.count("not told") == 1


def test_nothing_to_compare_says_what_noise_would_have_hidden(record: RunRecord) -> None:
    few = with_figures(record, own_figures("after", 2.5, (60, 5, 5)))
    assert "noise alone would still have hidden a difference" in device_metrics_section.sentences(few)[1]
    unknown = replace(few, experiment={})
    assert device_metrics_section.hidden_sentence(unknown) == ""


def test_what_was_told_before_a_field_existed_is_still_read() -> None:
    told = own_figures("after", 1.0, (300, 5, 60))
    assert loads(DeviceMetricsRecord, dumps(told)) == told


def test_a_tournament_prices_all_answers_together() -> None:
    """Two answers under noise 1 cost what one costs under 1 / sqrt 2, more than one and less than two of them."""
    found = games(ties=True).together
    assert isinstance(found, Epsilon)
    assert (found.delta, found.unit) == (1e-4, "occasion")
    assert games(ties=True).price_sentence().startswith("Both answers of a device together: epsilon ")
    assert "forty photos of one birthday count once" in games(ties=True).price_sentence()
    assert "not measured" in games(ties=True, evaluation=False).price_sentence()
    assert loads(RankingReport, dumps(games(ties=True))) == games(ties=True)


def test_a_tournament_without_a_winner_gives_no_order() -> None:
    tied, decided = markdown(games(ties=True)), markdown(games(ties=False))
    assert "No two of the 2 models can be told apart by any measure." in tied
    assert "best first" not in tied and "best first: base, other" in decided


def test_a_tournaments_page_has_its_title_all_asked_and_groups_that_are_missing() -> None:
    text = markdown(games(ties=True))
    assert text.startswith("# Which model serves the devices' own photos best: tournament of 2 models\n")
    assert ALL_ASKED in text
    assert "Not in the picture, because nothing is told of them: medium (Monk 4-6)." in text
    assert "```\nfedface rank-models a.yaml base 'b c.safetensors'\n```" in text
