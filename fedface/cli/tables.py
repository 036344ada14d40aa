"""Records as tables on the terminal: a run, a comparison, a benchmark, a ranking, a sample quality."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from fedface.audits.dp_ratio_estimates import DP_METRICS
from fedface.audits.sample_quality import GroupQuality, InsufficientSamples, Quality
from fedface.cli.console import say, table_of
from fedface.measurements import table_cell
from fedface.reports import (
    device_metrics_section,
    formatting,
    headline_summary,
    html_report,
    model_card,
    model_ranking_report,
    run_record,
)
from fedface.reports.comparison_report import METRICS, TITLES, ComparisonRecord
from fedface.reports.method_report import BenchmarkRecord
from fedface.reports.model_ranking_report import RankingReport
from fedface.reports.run_record import BiasRecord, RunRecord

BENCHMARK_METRICS = ("consistency_error", "skin_difference", "lightness_shift", "same_half")


def print_run(record: RunRecord, folder: Path) -> None:
    """The headline summary and the metrics of each group, before and after."""
    for sentence in headline_summary.headline_summary(record):
        say(sentence)
    metrics = ("consistency_error", "skin_difference")
    headings = (
        "group", "photos", "consistency error before", "after", "colour difference before", "after",
    )  # fmt: skip
    rows = []
    before, after = record.bias_before, record.bias_after
    if isinstance(before, BiasRecord) and isinstance(after, BiasRecord):
        for group, count in before.report.counts.items():
            served = [audit.report.groups.get(group) for audit in (before, after)]
            cells = [table_cell(one[name]) if one else "not measured" for name in metrics for one in served]
            rows.append((group, count, *cells))
    say(table_of(headings, rows, title="Metrics by group"))
    for sentence in {attack.scores.shortened for attack in record.attacks} - {""}:
        say(f"warning: {sentence}")
    say(f"open {folder / html_report.FILE}")
    say(f"also {folder / run_record.FILE} and {folder / model_card.FILE}")


def print_comparison(record: ComparisonRecord, folder: Path) -> None:
    """One row per training method and epsilon."""
    say(record.question, style="bold")
    rows = [
        (method, level, len(runs), *(table_cell(record.over_seeds(method, level, name)) for name in METRICS))
        for method, level, runs in record.rows()
    ]
    say(table_of(["method", "epsilon", "runs", *(TITLES[metric] for metric in METRICS)], rows))
    say(
        "epsilon 0: the public model, not trained; ∞: trained without noise; every other epsilon is an upper bound, "
        "per unit, at the delta in the table's file"
    )
    say(f"open {folder / 'comparison.md'}")


def print_benchmark(record: BenchmarkRecord, path: Path) -> None:
    """One row per upsampling method."""
    say(f"{record.probe}; {record.downscale}")
    titles = map(formatting.title_of, BENCHMARK_METRICS)
    rows = []
    for method in record.methods:
        cells = [table_cell(method.bias.report.overall[name]) for name in BENCHMARK_METRICS]
        darker = table_cell(method.darker_generated)
        rows.append((method.title, *cells, darker, f"{method.seconds_per_face:.2g}"))
    say(table_of(["method", *titles, "darker faces generated", "s per face"], rows))
    say(
        f"share of darker originals: {table_cell(record.methods[0].darker_true)}; 95 % intervals over "
        f"{record.photos} photos"
    )
    say(f"open {path}")
    say(f"also {path.with_name('faces.png')} and {path.with_name('by-group.png')}")


def print_ranking(record: RankingReport, folder: Path) -> None:
    """The candidates' metrics, then the order that they allow."""
    say(record.title(), style="bold")
    titles = map(device_metrics_section.title, DP_METRICS)
    rows = [
        (candidate.when, *device_metrics_section.texts(candidate.estimates.overall))
        for candidate in record.candidates
    ]
    say(table_of(["candidate", "units", *titles], rows, title="All units together"))
    for sentence in device_metrics_section.range_limit_note(record.candidates):
        say(sentence)
    if record.undecided():
        say(f"Best first: {record.verdicts()[0]}")
    else:
        say(_orders(record))
    for candidate in record.candidates[:1]:
        say(f"each candidate: {device_metrics_section.cost(candidate)}")
    say(record.privacy_sentence())
    say(model_ranking_report.ALL_PHOTOS)
    say(f"open {folder / model_ranking_report.CHART}")
    say(f"also {folder / model_ranking_report.PAGE}")


def _orders(record: RankingReport) -> Table:
    rows = []
    for ranking in record.rankings:
        ties = "; ".join(" and ".join(pair) for pair in ranking.ties) or "none"
        order = ", ".join(ranking.order)
        if ranking.all_tied:
            order, ties = "none", "all candidates"
        rows.append((device_metrics_section.title(ranking.metric), ranking.by, order, ties))
    return table_of(("metric", "for", "order", "not distinguishable"), rows, title="Best first")


def print_quality(found: Quality, weights: str) -> None:
    """One row for all samples and one per tone group."""
    headings = (
        "group", "real", "generated", "kernel distance", "Fréchet", "floor", "precision", "recall", "coverage",
    )  # fmt: skip
    rows = [
        (group, *_quality_cells(metrics)) for group, metrics in {"all": found.overall, **found.groups}.items()
    ]
    say(table_of(headings, rows))
    say(f"features: {found.identity}")
    say(
        "These values cannot be compared with FID and KID computed on other features, such as published ones."
    )
    say(f"weights {weights}; 95 % intervals; floor: the distance between two halves of the real faces")


def _quality_cells(metrics: GroupQuality | InsufficientSamples) -> tuple[object, ...]:
    if isinstance(metrics, InsufficientSamples):
        return metrics.real, metrics.generated, metrics
    near, kernel = metrics.neighbours, metrics.kernel
    return (
        metrics.real,
        metrics.generated,
        f"{kernel.estimate:.4f} [{kernel.low:.4f}, {kernel.high:.4f}]",
        f"{metrics.frechet.plain:.3f}",
        f"{metrics.frechet.floor:.3f}",
        *(
            f"{share.estimate:.2f} [{share.low:.2f}, {share.high:.2f}]"
            for share in (near.precision, near.recall, near.coverage)
        ),
    )
