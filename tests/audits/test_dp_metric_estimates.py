"""Estimates from noised metrics: plain means, coverage of intervals, planted gaps, invalid totals, rankings."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from synthetic_metrics import (
    CLIP,
    CONFIG,
    DARK,
    FREQUENT,
    GENERATED,
    LIGHT,
    MEDIUM,
    even,
    members,
    read,
    release,
    sampled,
    total_of,
    truths,
)

from fedface.audits.dp_metric_estimates import GroupEstimates, minimum_detectable_gap
from fedface.audits.dp_metrics import RANGED_METRICS
from fedface.audits.dp_model_ranking import Ranking, rank_overall, rank_worst_group
from fedface.audits.dp_ratio_estimates import DP_METRICS, DPRatioEstimate, difference_between
from fedface.errors import AggregationError, FederationError
from fedface.measurements import NotMeasured, rate_interval
from fedface.randomness import Streams

STREAMS = Streams(11)


def test_without_noise_the_metrics_are_plain_means_for_any_clip_norm() -> None:
    photos = sampled(3000, STREAMS.numpy("plain"))
    found = read(total_of(photos))
    assert list(found.groups) == list(CONFIG.groups) and found.suppressed == ()
    chosen = {name: photos.group == i for i, name in enumerate(CONFIG.groups)}
    chosen["all"] = torch.ones(3000, dtype=torch.bool)
    assert isinstance(found.overall, GroupEstimates)
    for name, metrics in {**found.reported, "all": found.overall}.items():
        part = members(photos, chosen[name])
        assert metrics.count.estimate == pytest.approx(len(part.group), rel=1e-6)
        stored = (part.group == part.output_group).double()
        for measure in DP_METRICS:
            plain = stored if measure == "same_group" else getattr(part, measure).double()
            assert metrics.estimate(measure).estimate == pytest.approx(
                float(plain.mean()), rel=1e-5, abs=1e-5
            ), measure
    for i, name in enumerate(CONFIG.groups):
        true, built = (float((which == i).double().mean()) for which in (photos.group, photos.output_group))
        shares = found.shares[name]
        assert shares.original.estimate == pytest.approx(true, abs=1e-6)
        assert shares.generated.estimate == pytest.approx(built, abs=1e-6)
        assert shares.change.estimate == pytest.approx(built - true, abs=1e-6)


def test_without_noise_intervals_are_wilson_or_normal_with_the_sample_variance() -> None:
    """The sample variance is released with the metrics."""
    photos = sampled(3000, STREAMS.numpy("spread"))
    group = read(total_of(photos)).groups[DARK]
    part = members(photos, photos.group == 2)
    n = len(part.group)
    for measure, hits in (("detected", part.detected), ("same_group", part.output_group == 2)):
        wilson, ours = rate_interval(int(hits.sum()), n), group.estimate(measure)
        assert (ours.low, ours.high) == pytest.approx((wilson.low, wilson.high), abs=1e-5)
    for measure in RANGED_METRICS:
        metric, half = group.estimate(measure), 1.959964 * float(getattr(part, measure).std()) / math.sqrt(n)
        assert metric.high - metric.estimate == pytest.approx(half, rel=2e-3)
        assert metric.estimate - metric.low == pytest.approx(half, rel=2e-3)


@pytest.mark.parametrize(("photos", "sigma", "devices"), [(3000, 0.7, 1), (2000, 3.7, 4)])
def test_intervals_have_their_nominal_coverage(photos: int, sigma: float, devices: int) -> None:
    """400 releases with new photos and new noise, with little noise and with noise that dominates the width."""
    rng = STREAMS.numpy(f"coverage {sigma}")
    known = truths()
    hits: dict[tuple[str, str], list[bool]] = {}
    for _ in range(400):
        sampled_now = sampled(photos, rng)
        found = release(sampled_now, sigma, devices, rng)
        assert found.overall is not None
        for name, metrics in {**found.groups, "all": found.overall}.items():
            for measure in DP_METRICS:
                metric = metrics.estimate(measure)
                hits.setdefault((name, measure), []).append(metric.low <= known[name, measure] <= metric.high)
        for i, name in enumerate(found.groups):
            count, change = found.reported[name].count, found.shares[name].change
            counted = int((sampled_now.group == i).sum())
            hits.setdefault((name, "count"), []).append(count.low <= counted <= count.high)
            moved = float((FREQUENT @ GENERATED)[i] - FREQUENT[i])
            hits.setdefault((name, "change"), []).append(change.low <= moved <= change.high)
    assert all(len(values) == 400 for values in hits.values()) and len(hits) == 4 * 5 + 3 * 2
    rates = {key: float(np.mean(values)) for key, values in hits.items()}
    assert 0.90 <= min(rates.values()) and max(rates.values()) <= 0.99, rates
    assert 0.94 <= np.mean(list(rates.values())) <= 0.97


def test_the_sum_of_devices_is_one_device_with_all_their_photos() -> None:
    photos = sampled(900, STREAMS.numpy("devices"))
    parts = [members(photos, torch.arange(900) % 3 == device) for device in range(3)]
    split = read(torch.stack([total_of(part) for part in parts]).sum(0), devices=3)
    whole = read(total_of(photos))
    assert split.overall is not None and whole.overall is not None
    for measure in DP_METRICS:
        for one, other in [
            (split.overall, whole.overall),
            *zip(split.groups.values(), whole.groups.values(), strict=True),
        ]:
            mine, theirs = one.estimate(measure), other.estimate(measure)
            assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), rel=1e-6, abs=1e-9)


def test_a_planted_gap_is_found_with_its_groups_and_size() -> None:
    rng = STREAMS.numpy("planted")
    photos = sampled(4000, rng)
    found = release(photos, 1.4, 2, rng)
    gap = found.gaps["lightness_shift"]
    assert gap.clear and (gap.worst, gap.best) == (DARK, LIGHT)
    known = truths()
    expected = known[DARK, "lightness_shift"] - known[LIGHT, "lightness_shift"]
    assert gap.difference.low < expected < gap.difference.high
    assert found.gaps["detected"].clear and found.gaps["detected"].difference.estimate < 0
    sentences = found.sentences()
    shift = next(text for text in sentences if "lightness" in text)
    assert (
        shift.startswith(f"{DARK} is served worse") and "lighter than the originals" in shift and "[" in shift
    )
    fewer = next(text for text in sentences if "There are fewer faces" in text)
    assert DARK in fewer
    assert "include the noise and the choice of photos" in sentences[-1]


def test_equal_groups_rarely_have_a_gap() -> None:
    """Clean negative: of 300 releases about 5 % find a gap, corrected for the choice of groups."""
    rng = STREAMS.numpy("negative")
    photos, clear = sampled(2000, rng), 0
    for _ in range(300):
        again = replace(photos, group=torch.from_numpy(rng.permutation(photos.group.numpy())))
        clear += release(again, 2.0, 1, rng).gaps["lightness_shift"].clear
    assert clear <= 24
    quiet = read(total_of(even()))
    assert quiet.sentences()[0] == "No metric differs clearly between the 3 reported groups."
    assert "would not show: consistency error" in quiet.sentences()[1]


def test_the_smallest_detectable_gap_is_reported_as_predicted() -> None:
    """Values near the end of a range, where the noise of the count has its full effect."""
    config = replace(CONFIG, expected_units=15_000)
    low, high = config.skin_difference
    near = even(
        10_000, skin_difference=0.99 * low + 0.01 * high, consistency_error=0.01 * config.consistency_error[1]
    )
    seen = read(total_of(near), sigma=5.0, devices=2)
    ahead = minimum_detectable_gap(config, noise_multiplier=5.0, devices=2)
    assert set(ahead) == set(DP_METRICS)
    for measure in ("skin_difference", "consistency_error"):
        whole, noise = seen.hidden[measure]
        assert noise <= whole and noise == pytest.approx(ahead[measure], rel=0.03)
    z, groups = 2.393980, 3  # 95 % for three pairs
    error = math.hypot(1 / math.sqrt(0.15), math.sqrt(groups / 0.4)) * 5.0 * math.sqrt(2) / 10_000
    assert ahead["skin_difference"] == pytest.approx(z * math.sqrt(2) * error * (high - low) / 2, rel=1e-5)
    assert math.isinf(minimum_detectable_gap(CONFIG, noise_multiplier=500.0, devices=1)["consistency_error"])


def test_a_small_group_is_suppressed_completely() -> None:
    photos = even()
    few = members(photos, (photos.group < 2) | (torch.arange(300) >= 285))
    found = read(total_of(few))
    assert found.suppressed == (DARK,) and list(found.reported) == list(found.shares) == [LIGHT, MEDIUM]
    assert found.min_count == 20 and isinstance(found.overall, GroupEstimates)
    assert found.overall.count.estimate == pytest.approx(215, rel=1e-6)
    assert any(
        f"Suppressed: {DARK}; their noised counts are below 20 units" in text for text in found.sentences()
    )
    assert all(DARK not in text for text in found.sentences() if "Suppressed" not in text)


def test_noise_raises_the_minimum_count_so_that_empty_groups_are_suppressed() -> None:
    """99 of 100 empty groups are suppressed, for any `min_group_size`."""
    loose = replace(CONFIG, min_group_size=1)
    rng, reported = STREAMS.numpy("empty"), 0
    for _ in range(300):
        noise = torch.from_numpy(3.0 * CLIP * 2.0 * rng.standard_normal(CONFIG.width))
        found = read(noise, sigma=3.0, devices=4, config=loose)
        reported += len(found.reported)
        assert found.min_count == pytest.approx(1 + 1.959964 * 6 * math.sqrt(3 / 0.4), rel=1e-5)
    assert reported / 900 <= 0.04  # one side of 95 %
    empty = read(torch.zeros(CONFIG.width))
    assert isinstance(empty.overall, NotMeasured) and empty.reported == {} == empty.gaps
    assert "No two groups have enough units" in empty.sentences()[0]


def test_an_impossible_total_is_refused() -> None:
    honest = total_of(even())
    with pytest.raises(AggregationError, match=r"the metrics are 30 numbers, got shape \(29,\)"):
        read(honest[1:])
    broken = honest.clone()
    broken[3] = float("nan")
    with pytest.raises(AggregationError, match="must be finite"):
        read(broken)
    negative = honest.clone()
    negative[0] = -200 * CLIP
    with pytest.raises(AggregationError, match="a count is far below zero"):
        read(negative, sigma=1.0)
    for at, fault in (
        (9, "a mean of consistency_error"),
        (12, "a spread of consistency_error"),
        (29, "a mean of detected"),
    ):
        outside = honest.clone()
        outside[at] = 90 * CLIP
        with pytest.raises(AggregationError, match=fault):
            read(outside, sigma=1.0)
    with pytest.raises(ValueError, match="devices must be >= 1"):
        read(honest, devices=0)
    read(honest - 3 * CLIP, sigma=1.0)  # noise may make a count negative


def test_a_mean_outside_its_range_has_an_interval_of_the_same_width() -> None:
    mean = DPRatioEstimate(
        above=120.0, below=100.0, noise=(25.0, 0, 0), photos=(0, 0, 0), ends=(-1, 1), unit=2.0, zero=3.0
    )
    found = mean.interval()
    assert found.estimate == found.high == 5.0
    assert found.low == pytest.approx(5.0 - 2.0 * 1.959964 * 5 / 100, rel=1e-6)
    lost = replace(mean, below=1.0, noise=(25.0, 0.0, 25.0)).interval()
    assert (lost.low, lost.high) == (1.0, 5.0)


def ranking(better: float, rng: np.random.Generator, *, by_group: bool = False) -> Ranking:
    """Three models evaluated on the same photos: two equal, one with smaller skin differences (in dE00)."""
    photos = sampled(3000, rng)
    good = replace(photos, skin_difference=photos.skin_difference - better)
    asked = {"first": photos, "second": photos, "good": good}
    metrics = {name: release(part, 1.4, 1, rng) for name, part in asked.items()}
    return (rank_worst_group if by_group else rank_overall)(metrics, "skin_difference")


@pytest.mark.parametrize("by_group", [False, True])
def test_a_better_model_is_ranked_first_and_equal_ones_are_not_ordered(by_group: bool) -> None:
    found = ranking(3.0, STREAMS.numpy("ranking"), by_group=by_group)
    assert found.order[0] == "good" and len(found.comparisons) == 3
    assert found.ties == (found.order[1:],)
    assert all(duel.difference.low < 3.0 < duel.difference.high for duel in found.comparisons if duel.apart)
    sentences = found.sentences()
    assert "best first: good" in sentences[0] and any("cannot be distinguished" in text for text in sentences)


@pytest.mark.parametrize("by_group", [False, True])
def test_equal_models_are_rarely_ordered(by_group: bool) -> None:
    rng = STREAMS.numpy("equals")
    wrong = sum(len(ranking(0.0, rng, by_group=by_group).ties) < 3 for _ in range(100))
    assert wrong <= 8


def test_cost_of_every_metric_is_larger_for_worse_service() -> None:
    mean = read(total_of(even(lightness_shift=-4.0))).reported[DARK]
    assert DP_METRICS["lightness_shift"].cost(mean.estimate("lightness_shift")).estimate == pytest.approx(
        4.0, rel=1e-5
    )
    assert DP_METRICS["detected"].cost(mean.estimate("detected")).estimate == pytest.approx(-1.0)
    one, other = rate_interval(48, 50), rate_interval(40, 50)
    gap = difference_between(one, other)  # Newcombe (1998), method 10: square and add
    assert gap.low == pytest.approx(0.16 - math.hypot(0.96 - one.low, other.high - 0.8))
    assert gap.high == pytest.approx(0.16 + math.hypot(one.high - 0.96, 0.8 - other.low))


def test_rankings_without_metrics_are_refused() -> None:
    full, empty = read(total_of(even())), read(torch.zeros(CONFIG.width))
    with pytest.raises(ValueError, match="two models, got 1"):
        rank_overall({"one": full}, "consistency_error")
    with pytest.raises(ValueError, match="metric must be one of consistency_error"):
        rank_overall({"one": full, "two": full}, "beauty")
    with pytest.raises(FederationError, match="too few units for a metric of two"):
        rank_overall({"one": full, "two": empty}, "consistency_error")
    with pytest.raises(FederationError, match="no tone group"):
        rank_worst_group({"one": full, "two": empty}, "consistency_error")
