"""Sample quality metrics: closed forms, slow reference implementations, and generators with known faults."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedface.audits import feature_distances
from fedface.audits.feature_distances import Moments, face_features, frechet_distance, kernel_distance
from fedface.audits.feature_extractors import (
    ColourFeatures,
    FeatureIdentity,
    TorchScriptFeatures,
    open_features,
)
from fedface.audits.sample_quality import (
    TONE_GROUPS,
    GroupedFeatures,
    GroupQuality,
    InsufficientSamples,
    ManifoldMetrics,
    compare_quality,
    compare_streams,
    equal_coverage,
    grouped_features,
    manifold_metrics,
    measure_manifold,
    quality,
    tone_groups,
)
from fedface.measurements import Interval
from fedface.photos.labelled_faces import read_face_folder
from fedface.photos.skin_tone import srgb_from_monk
from fedface.randomness import Streams
from fedface.synthetic.faces import ToneMix, render, sample_faces

STREAMS = Streams(41)
THIS = FeatureIdentity(name="test", sha256="")


def points(count: int, width: int, name: str) -> Tensor:
    """Standard normal points (count, width)."""
    return torch.randn(count, width, generator=STREAMS.generator(name), dtype=torch.float64)


def modes(counts: tuple[int, ...], name: str) -> Tensor:
    """Clusters 20 apart along the first axis, so many points in each, in random order."""
    parts = [points(count, 4, f"{name}/{i}") + 20.0 * i * torch.eye(4)[0] for i, count in enumerate(counts)]
    return torch.cat(parts)[torch.randperm(sum(counts), generator=STREAMS.generator(f"{name}/order"))]


def faces(count: int, light_fraction: float, name: str) -> Tensor:
    """Synthetic faces (count, 3, 16, 16)."""
    return render(sample_faces(count, ToneMix(light_fraction=light_fraction), STREAMS.generator(name)), 16)


def slow_metrics(real: Tensor, generated: Tensor, k: int) -> tuple[float, float, float, float]:
    """Precision, recall, density and coverage by their definitions."""

    def reach(rows: Tensor) -> list[float]:
        return [
            sorted(float((x - y).norm()) for j, y in enumerate(rows) if j != i)[k - 1]
            for i, x in enumerate(rows)
        ]

    reach_real, reach_generated = reach(real), reach(generated)
    inside = [[float((x - y).norm()) <= r for x, r in zip(real, reach_real, strict=True)] for y in generated]
    precision = np.mean([any(row) for row in inside])
    coverage = np.mean([any(row[i] for row in inside) for i in range(len(real))])
    recall = np.mean(
        [
            any(float((x - y).norm()) <= r for y, r in zip(generated, reach_generated, strict=True))
            for x in real
        ]
    )
    return float(precision), float(recall), float(np.sum(inside)) / (k * len(generated)), float(coverage)


def test_precision_recall_density_and_coverage_equal_their_definitions_by_loops() -> None:
    real, generated = points(23, 3, "real"), points(17, 3, "made") * 1.3 + 0.4
    assert manifold_metrics(real, generated, k=3) == pytest.approx(
        slow_metrics(real, generated, 3), rel=1e-12
    )


def test_metrics_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distance tables are computed in blocks to bound memory."""
    real, generated = points(60, 3, "real"), points(45, 3, "made") + 0.3
    whole = manifold_metrics(real, generated, k=2), kernel_distance(real, generated)
    monkeypatch.setattr(feature_distances, "_TABLE", 50)
    assert feature_distances.rows_at_once(60) == 1
    assert manifold_metrics(real, generated, k=2) == whole[0]
    assert kernel_distance(real, generated) == pytest.approx(whole[1], rel=1e-9)


def test_a_set_compared_with_itself_is_perfect() -> None:
    """Every face lies in its own ball, and in those of the k faces that it is among the nearest of."""
    x = points(80, 5, "self")
    precision, recall, density, coverage = manifold_metrics(x, x, k=3)
    assert (precision, recall, coverage) == (1.0, 1.0, 1.0)
    assert density == pytest.approx((1 + 3) / 3)


def test_disjoint_sets_have_no_overlap() -> None:
    assert manifold_metrics(points(60, 5, "a"), points(60, 5, "b") + 100, k=3) == (0.0, 0.0, 0.0, 0.0)


def test_equal_sources_have_density_one_and_the_coverage_that_ranks_predict() -> None:
    """Expectations over 60 pairs of sets; by ranks, whatever the distribution and its dimension."""
    rng = STREAMS.generator("ranks")
    runs = np.array(
        [
            manifold_metrics(torch.randn(40, 3, generator=rng), torch.randn(60, 3, generator=rng), k=3)[2:]
            for _ in range(60)
        ]
    )
    error = runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
    expected = np.array([1.0, equal_coverage(40, 60, k=3)])
    assert (np.abs(runs.mean(axis=0) - expected) < 3 * error).all()


def test_the_expected_coverage_of_one_neighbour_has_a_closed_form() -> None:
    """m of the n - 1 + m others are generated; the nearest is one of them with probability m / (n + m - 1)."""
    assert equal_coverage(40, 60, k=1) == pytest.approx(60 / 99)


def measured(real: Tensor, generated: Tensor) -> ManifoldMetrics:
    """At one draw of all points, k = 3."""
    return measure_manifold(real, generated, k=3, span=min(len(real), len(generated)))


def test_a_missing_mode_lowers_recall_and_coverage_and_not_precision() -> None:
    """A third of the real points lie where nothing is generated."""
    both = measured(modes((200, 100), "real"), modes((200, 100), "made"))
    one = measured(modes((200, 100), "real"), modes((300,), "one"))
    assert one.recall.high < 0.75 < both.recall.low and one.coverage.high < 0.75 < both.coverage.low
    assert one.precision.estimate == pytest.approx(both.precision.estimate, abs=0.05)


def test_noise_lowers_precision_and_density_more_than_recall() -> None:
    real, clean = modes((150, 150), "real"), modes((150, 150), "clean")
    noisy = clean + 1.5 * points(300, 4, "noise")
    before, after = measured(real, clean), measured(real, noisy)
    assert after.precision.high < before.precision.low and after.density.high < before.density.low
    assert after.recall.estimate > 0.8


def test_intervals_of_precision_cover_the_expected_value() -> None:
    """Known by simulation; conservative 95 % intervals miss at most 3 of 30."""
    rng = STREAMS.generator("coverage")

    def draw_pair() -> tuple[Tensor, Tensor]:
        return torch.randn(60, 3, generator=rng), 1.5 * torch.randn(60, 3, generator=rng)

    expected = np.mean([manifold_metrics(*draw_pair(), k=3) for _ in range(200)], axis=0)
    missed = np.zeros(4)
    for _ in range(30):
        found = measured(*draw_pair())
        intervals = (found.precision, found.recall, found.density, found.coverage)
        missed += [not i.low <= value <= i.high for i, value in zip(intervals, expected, strict=True)]
    assert (missed <= 3).all()


def test_merged_moments_are_those_of_all_rows_even_far_from_the_origin() -> None:
    """Batches of 1, 7 and 32 rows, a million away from zero, where a sum of squares would lose all digits."""
    x = points(40, 3, "rows") + 1e6
    parts = [Moments.of(part) for part in (x[:1], x[1:8], x[8:])]
    merged, whole = parts[0].merge(parts[1]).merge(parts[2]), Moments.of(x)
    torch.testing.assert_close(merged.covariance, torch.cov(x.T), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-14, atol=0)
    rest = merged.without(parts[1])
    torch.testing.assert_close(rest.covariance, torch.cov(torch.cat([x[:1], x[8:]]).T), rtol=1e-6, atol=1e-9)


def test_streams_give_the_metrics_of_the_whole_sets() -> None:
    """The Frechet distance of all faces, and the mean kernel distance of the paired batches."""
    real, generated = faces(90, 0.5, "real"), faces(70, 0.5, "made")
    a, b = face_features(real), face_features(generated)
    found = compare_streams(iter(real.split(30)), iter(generated.split(30)), ColourFeatures())
    blocks = [kernel_distance(x, y) for x, y in zip(a.split(30), b.split(30), strict=True)]
    assert found.frechet == pytest.approx(frechet_distance(a, b), rel=1e-6, abs=1e-5)
    assert found.kernel.estimate == pytest.approx(np.mean(blocks), rel=1e-9)
    assert (found.real, found.generated, found.kernel.count) == (90, 70, 70)


def test_a_stream_of_one_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two batches, got 1 pairs"):
        compare_streams([faces(10, 0.5, "x")], [faces(10, 0.5, "y")], ColourFeatures())


def test_tone_groups_are_two_steps_of_the_monk_scale_each() -> None:
    """Pictures of one colour each; 8.6 rounds to 9."""
    tones = torch.tensor([5.0, 6.0, 7.0, 8.0, 10.0, 8.6])
    images = srgb_from_monk(tones).view(-1, 3, 1, 1).expand(-1, 3, 32, 32)
    expected = ("Monk 5-6", "Monk 5-6", "Monk 7-8", "Monk 7-8", "Monk 9-10", "Monk 9-10")
    assert tone_groups(images) == expected
    assert set(expected) < set(TONE_GROUPS)


def grouped(counts: dict[str, int], name: str, shift: dict[str, float]) -> GroupedFeatures:
    """Normal points in so many groups, each shifted along the first axis."""
    rows = [
        points(count, 4, f"{name}/{g}") + shift.get(g, 0.0) * torch.eye(4)[0] for g, count in counts.items()
    ]
    groups = tuple(g for g, count in counts.items() for _ in range(count))
    return GroupedFeatures(features=torch.cat(rows), groups=groups, identity=THIS)


def test_a_badly_generated_group_is_detected_and_the_others_are_not() -> None:
    """Planted: generated dark faces lie 3 away from real ones; clean: light ones."""
    counts = {"light": 120, "dark": 90}
    real, generated = grouped(counts, "real", {}), grouped(counts, "made", {"dark": 3.0})
    found = compare_quality(real, generated, STREAMS.numpy("order")).groups
    light, dark = found["light"], found["dark"]
    assert isinstance(light, GroupQuality) and isinstance(dark, GroupQuality)
    assert isinstance(light.frechet.limit, Interval) and isinstance(dark.frechet.limit, Interval)
    assert light.kernel.covers_zero and light.frechet.limit.covers_zero
    assert dark.kernel.low > 0 and dark.frechet.limit.low > 0
    assert dark.frechet.plain > 3 * dark.frechet.floor and light.frechet.plain < 3 * light.frechet.floor
    assert dark.neighbours.precision.high < light.neighbours.precision.low
    assert light.neighbours.span == dark.neighbours.span == 90


def test_a_group_with_too_few_faces_is_a_value_with_the_required_count() -> None:
    real = grouped({"a": 60, "b": 12}, "real", {})
    generated = grouped({"a": 50, "c": 45}, "made", {})
    groups = compare_quality(real, generated, STREAMS.numpy("order")).groups
    assert list(groups) == ["a", "b", "c"] and isinstance(groups["a"], GroupQuality)
    assert groups["b"] == InsufficientSamples(real=12, generated=0, fewest=40)
    assert str(groups["c"]) == "not measured: needs 40 faces a side, has 0 real and 45 generated"


def test_darkened_faces_are_detected_from_pixels_and_equal_ones_are_not() -> None:
    """From pixels, with groups estimated from pixels: clean negative and planted positive."""
    real, same, dark = faces(300, 0.5, "real"), faces(300, 0.5, "same"), faces(300, 0.5, "other") * 0.6
    groups = ["all"] * 300
    clean = quality(real, groups, same, groups, ColourFeatures(), STREAMS.numpy("clean")).overall
    planted = quality(real, groups, dark, groups, ColourFeatures(), STREAMS.numpy("planted")).overall
    assert isinstance(clean.frechet.limit, Interval) and isinstance(planted.frechet.limit, Interval)
    assert clean.kernel.covers_zero and clean.frechet.limit.covers_zero
    assert planted.kernel.low > 0 and planted.frechet.limit.low > 0
    assert (
        clean.neighbours.coverage.low < clean.neighbours.coverage_of_equals < clean.neighbours.coverage.high
    )
    assert planted.neighbours.coverage.high < clean.neighbours.coverage.low


def test_the_extrapolation_needs_one_and_a_half_times_as_many_faces_as_features() -> None:
    """With 132 features that is 198; below it the distance is not measured."""
    images, groups = faces(197, 0.5, "few"), ["all"] * 197
    limit = quality(
        images, groups, images, groups, ColourFeatures(), STREAMS.numpy("x")
    ).overall.frechet.limit
    assert limit == InsufficientSamples(real=197, generated=197, fewest=198)


def test_on_real_photos_only_the_degraded_groups_are_detected(
    shared: Path,
) -> None:
    """FairFace, one half against the other: no group differs; then one is blurred and one has five people, and only
    those change.
    """
    probe = read_face_folder(shared / "data/faces/fairface_eval128", size=32, per_group=110)
    order = torch.randperm(len(probe.images), generator=STREAMS.generator("halves"))
    images, groups = probe.images[order], tuple(probe.groups[i] for i in order.tolist())
    half = len(images) // 2
    extractor = open_features(ColourFeatures())
    real = grouped_features(images[:half], groups[:half], extractor)
    generated = grouped_features(images[half:], groups[half:], extractor)
    spoiled = images[half:].clone()
    blurred, few = (
        torch.tensor([g == name for g in generated.groups]).nonzero().flatten() for name in ("Black", "White")
    )
    spoiled[blurred] = (
        torch.nn.functional.avg_pool2d(spoiled[blurred], 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    )
    spoiled[few] = spoiled[few[torch.arange(len(few)) % 5]]
    spoiled[few] += 0.01 * torch.randn(spoiled[few].shape, generator=STREAMS.generator("camera"))
    clean = compare_quality(real, generated, STREAMS.numpy("order")).groups
    after = grouped_features(spoiled, generated.groups, extractor)
    planted = dict(compare_quality(real, after, STREAMS.numpy("order")).groups)
    assert all(isinstance(found, GroupQuality) and found.kernel.covers_zero for found in clean.values())
    black, white = planted.pop("Black"), planted.pop("White")
    assert isinstance(black, GroupQuality) and black.kernel.low > 0
    assert isinstance(white, GroupQuality) and white.neighbours.recall.high < 0.1
    assert all(found == clean[name] for name, found in planted.items())


class Corners(torch.nn.Module):
    """Means of four quarters of each channel: 12 numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def test_features_of_different_networks_are_never_compared(tmp_path: Path) -> None:
    """The result names the file by digest, and two sets of different identity are refused."""
    torch.jit.save(torch.jit.script(Corners()), str(tmp_path / "corners.pt"))
    source = TorchScriptFeatures(
        path=tmp_path / "corners.pt", size=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )
    images, groups = faces(50, 0.5, "faces"), ["all"] * 50
    found = quality(images, groups, images, groups, source, STREAMS.numpy("x"))
    assert len(found.identity.sha256) == 64 and found.overall.neighbours.precision.estimate == 1.0
    one = grouped({"a": 50}, "one", {})
    other = GroupedFeatures(features=one.features, groups=one.groups, identity=found.identity)
    with pytest.raises(ValueError, match="features differ and cannot be compared"):
        compare_quality(one, other, STREAMS.numpy("x"))


@pytest.mark.parametrize(
    ("count", "k", "fewest", "words"),
    [
        (39, 3, 40, "at least 40 faces, got 39 real and 39 generated"),
        (50, 0, 40, "k must lie in"),
        (50, 11, 40, "k must lie in"),
        (50, 3, 10, "fewest must be >= 40"),
    ],
)
def test_too_few_faces_and_numbers_out_of_bounds_are_refused(
    count: int, k: int, fewest: int, words: str
) -> None:
    sets = grouped({"a": count}, "real", {})
    with pytest.raises(ValueError, match=words):
        compare_quality(sets, sets, STREAMS.numpy("x"), k=k, fewest=fewest)
