"""Metric vectors of photos on a device: bounded L2 norm, equal weight of units, and the way from pixels to a report."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_metrics import CLIP, CONFIG, DARK, LIGHT, even, members, read, sampled, total_of
from torch import Tensor

from fedface.audits.dp_metrics import (
    BudgetShares,
    LocalMetricsConfig,
    PhotoMetrics,
    average_within_unit,
    decode_sums,
    measure_photos,
    metric_vectors,
    ranges,
)
from fedface.config import dump, parse
from fedface.photos.skin_tone import lab_from_srgb, measure_tone, srgb_from_lab, srgb_from_monk
from fedface.privacy.mechanism import ClippedSum, GaussianSum
from fedface.randomness import SecretNoise, Streams
from fedface.synthetic.faces import render_people
from fedface.tensor_types import Images, Vector
from fedface.training.dp_sgd import SampledMechanism, private_sum, private_sum_of

STREAMS = Streams(11)


NUMBERS = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(
        st.tuples(NUMBERS, NUMBERS, NUMBERS, st.booleans(), st.integers(0, 8)), min_size=1, max_size=8
    ),
    clip_norm=st.floats(1e-6, 1e6),
)
def test_every_vector_has_at_most_the_clip_norm_and_not_much_less(
    rows: list[tuple[float, float, float, bool, int]], clip_norm: float
) -> None:
    consistency_error, skin, shift, found, cells = (list(column) for column in zip(*rows, strict=True))
    cell = torch.tensor(cells)
    photos = PhotoMetrics(
        group=cell // 3,
        output_group=cell % 3,
        consistency_error=torch.tensor(consistency_error),
        skin_difference=torch.tensor(skin),
        lightness_shift=torch.tensor(shift),
        detected=torch.tensor(found),
    )
    lengths = metric_vectors(photos, CONFIG, clip_norm=clip_norm).double().norm(dim=1) / clip_norm
    assert float(lengths.max()) <= 1 + 1e-6
    assert float(lengths.min()) >= math.sqrt(1 - 0.45 / 4) - 1e-6


def test_a_vector_depends_only_on_its_photo_to_the_last_bit() -> None:
    original = render_people(12, 0.5, 32, STREAMS.child("alone"))
    generated = (0.9 * original + 0.05).clamp(0, 1)
    consistency_error, found = torch.linspace(0, 0.01, 12), torch.arange(12) % 2 == 0
    together = metric_vectors(
        measure_photos(original, generated, consistency_error, found, CONFIG), CONFIG, clip_norm=1.0
    )
    for i in range(12):
        one = slice(i, i + 1)
        alone = measure_photos(original[one], generated[one], consistency_error[one], found[one], CONFIG)
        assert torch.equal(metric_vectors(alone, CONFIG, clip_norm=1.0)[0], together[i])
    empty = measure_photos(original[:0], generated[:0], consistency_error[:0], found[:0], CONFIG)
    assert metric_vectors(empty, CONFIG, clip_norm=1.0).shape == (0, CONFIG.width) == (0, 30)


def test_groups_use_the_nearest_monk_tone_and_failed_photos_count_as_worst() -> None:
    monk = torch.tensor([1.0, 3.4, 3.6, 6.4, 6.6, 10.0])
    faces = srgb_from_monk(monk)[:, :, None, None].expand(-1, 3, 16, 16).clone()
    generated = faces.clone()
    generated[0] = float("nan")
    consistency_error = torch.full((6,), 0.001)
    consistency_error[1] = float("inf")
    photos = measure_photos(faces, generated, consistency_error, torch.ones(6, dtype=torch.bool), CONFIG)
    assert photos.group.tolist() == [0, 0, 1, 1, 2, 2] and photos.output_group.tolist() == [2, 0, 1, 1, 2, 2]
    assert torch.isfinite(metric_vectors(photos, CONFIG, clip_norm=1.0)).all()
    exact = replace(CONFIG, min_group_size=1)
    found = read(total_of(photos, exact), config=exact).groups[LIGHT]
    assert found.estimate("consistency_error").estimate == pytest.approx((0.001 + 0.02) / 2, rel=1e-5)


def sent(rows: Tensor, units: Tensor, *, share: bool) -> Vector:
    """What a device without DP sends: the sums of units or, with sampling, their means of 16 photos each."""

    def sampled_rows(positions: Tensor) -> Tensor:
        return average_within_unit(rows[positions], units[positions]) if share else rows[positions]

    return private_sum_of(
        sampled_rows,
        rows.shape[1],
        units,
        SampledMechanism(ClippedSum(clip_norm=CLIP), 1.0, STREAMS.generator("coins")),
    )


@pytest.mark.parametrize(("share", "most"), [(True, 1.0), (False, 1.15)])
def test_an_occasion_of_forty_photos_counts_as_one_unit(share: bool, most: float) -> None:
    """Exactly one in the mean; summed and clipped it may exceed one, but not the clip norm."""
    photos = sampled(200, STREAMS.numpy("occasion"))
    party = members(photos, torch.nonzero(photos.group == 0)[:40, 0])
    rows = metric_vectors(party, CONFIG, clip_norm=CLIP)
    total = sent(rows, torch.zeros(40, dtype=torch.int64), share=share)
    assert float(total.norm()) <= CLIP * (1 + 1e-6)
    sums = decode_sums(total, CONFIG, clip_norm=CLIP)
    count = float(sums.table.sum())
    assert 1.0 - 1e-6 <= count <= most + 1e-6
    low, high = CONFIG.skin_difference
    mean = low + (high - low) * (float(sums.first["skin_difference"].sum()) / count + 1.0) / 2.0
    of_sixteen = float(party.skin_difference.std()) / 4.0  # the standard error of those that were sampled
    assert mean == pytest.approx(float(party.skin_difference.mean()), abs=3.0 * of_sixteen)


def test_means_over_units_are_not_means_over_photos() -> None:
    """Fifteen good photos of one occasion and a bad one of another: half bad, in any order."""
    party = members(even(16), torch.arange(48) >= 32)
    worst = replace(party, detected=torch.arange(16) != 5)
    units = (torch.arange(16) == 5).long()
    exact = replace(CONFIG, min_group_size=1)
    rows = metric_vectors(worst, CONFIG, clip_norm=CLIP)
    assert read(rows.sum(0), config=exact).groups[DARK].estimate("detected").estimate == pytest.approx(
        15 / 16
    )
    by_unit = read(sent(rows, units, share=True), config=exact).groups[DARK].estimate("detected")
    assert by_unit.estimate == pytest.approx(0.5, abs=1e-6) and by_unit.count == 2
    assert torch.equal(average_within_unit(rows, 3 * units + 7), average_within_unit(rows, units))
    assert torch.equal(average_within_unit(rows, torch.arange(16)), rows)


def lightened(images: Images, amount: float) -> Images:
    lab = lab_from_srgb(images.movedim(1, -1))
    lab[..., 0] += amount
    return srgb_from_lab(lab).movedim(-1, 1)


def test_lightening_on_three_devices_is_estimated_from_pixels() -> None:
    """From pixels to a sentence, through the private sum with secret noise: 8 L* for skin that does not saturate."""
    config = replace(CONFIG, tone_upper_bounds=(5, 10))
    original = render_people(600, 0.5, 32, STREAMS.child("people"))
    original = original[measure_tone(original).lab[:, 0] < 85]
    generated = lightened(original, 8.0)
    found = torch.ones(len(original), dtype=torch.bool)
    photos = measure_photos(original, generated, torch.full((len(original),), 0.001), found, config)
    rows = metric_vectors(photos, config, clip_norm=CLIP)
    mechanism = GaussianSum(clip_norm=CLIP, sigma=0.5)
    parts = [
        private_sum(rows[device::3], SampledMechanism(mechanism, 1.0, SecretNoise())) for device in range(3)
    ]
    assert all((part.abs() <= ranges(config, clip_norm=CLIP)).all() for part in parts)
    report = read(torch.stack(parts).sum(0), sigma=0.5, devices=3, config=config)
    assert report.overall is not None
    shift, plain = report.overall.estimate("lightness_shift"), float(photos.lightness_shift.mean())
    assert abs(shift.estimate - plain) < 1.0 and plain == pytest.approx(8.0, abs=0.5)
    assert shift.low > 6 and shift.high < 10
    assert report.overall.estimate("skin_difference").low > 3
    lighter, darker = config.groups
    assert (lighter, darker) == ("lighter (Monk 1-5)", "darker (Monk 6-10)")
    assert report.shares[darker].change.high < 0
    assert any(f"fewer faces measured as {darker}" in text for text in report.sentences())


def test_groups_have_names_and_the_config_survives_yaml() -> None:
    assert CONFIG.groups == ("light (Monk 1-3)", "medium (Monk 4-6)", "dark (Monk 7-10)")
    assert LocalMetricsConfig(tone_upper_bounds=(1, 2, 5, 10)).groups == (
        "Monk 1",
        "Monk 2",
        "Monk 3-5",
        "Monk 6-10",
    )
    shares = BudgetShares(
        table=0.2, consistency_error=0.2, skin_difference=0.2, lightness_shift=0.2, detected=0.2
    )
    config = LocalMetricsConfig(tone_upper_bounds=(5, 10), consistency_error=(0.0, 0.1), shares=shares)
    assert parse(dump(config), LocalMetricsConfig, name="here") == config


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tone_upper_bounds": (3, 6)}, "tone_upper_bounds must be Monk tones 1 to 10"),
        ({"tone_upper_bounds": (6, 3, 10)}, "rising"),
        ({"consistency_error": (0.1, 0.1)}, "consistency_error must be two rising finite numbers"),
        ({"lightness_shift": (0.0, math.inf)}, "lightness_shift must be two"),
        ({"min_group_size": 0}, r"min_group_size must lie in \[1"),
        ({"max_units": 0}, "max_units"),
    ],
)
def test_settings_out_of_bounds_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **wrong)


def test_mismatched_shares_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shares must be 1 together, got 1.1"):
        BudgetShares(table=0.5)
    with pytest.raises(ValueError, match=r"consistency_error must lie in \(0, 1\)"):
        BudgetShares(consistency_error=0.0)
    with pytest.raises(ValueError, match=r"detected must have shape \(300,\), got \(1,\)"):
        replace(even(), detected=torch.ones(1, dtype=torch.bool))
    faces = torch.zeros(2, 3, 16, 16)
    with pytest.raises(ValueError, match="generated must have shape"):
        measure_photos(faces, faces[1:], torch.zeros(2), torch.ones(2, dtype=torch.bool), CONFIG)
