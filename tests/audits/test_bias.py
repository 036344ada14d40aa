"""Group metrics of upsamplers: published definitions, planted biases, and unbiased upsamplers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedface.audits.bias import (
    METRICS,
    BiasReport,
    confusion,
    fairness_metrics,
    measure_bias,
    tone_histogram,
)
from fedface.photos.skin_tone import ToneReading, lab_from_srgb, measure_tone, srgb_from_lab, srgb_from_monk
from fedface.randomness import Streams
from fedface.tensor_types import Images
from fedface.upsampling.upsampler import Upsampled

STREAMS = Streams(3)
MONK = torch.tensor([2.0, 4.0, 6.0, 8.0]).repeat_interleave(20)
GROUPS = [f"monk {int(tone)}" for tone in MONK]


def plain_faces(monk: Tensor, name: str) -> Images:
    """Skin-coloured images with a little noise: (n, 3, 16, 16)."""
    grain = 0.02 * torch.randn(len(monk), 3, 16, 16, generator=STREAMS.generator(name))
    return (srgb_from_monk(monk)[:, :, None, None] + grain).clamp(0, 1)


def lightened(images: Images, chosen: Tensor, amount: float) -> Images:
    """L* raised by `amount` where `chosen`."""
    lab = lab_from_srgb(images.movedim(1, -1))
    lab[chosen, ..., 0] += amount
    return srgb_from_lab(lab).movedim(-1, 1)


def answer(images: Images, converged: Tensor | None = None) -> Upsampled:
    """One generated face per photo."""
    n = len(images)
    found = torch.ones(n, 1, dtype=torch.bool) if converged is None else converged[:, None]
    spread = 1 + 0.1 * torch.rand(n, 1, generator=STREAMS.generator("consistency_error"))
    consistency_error = torch.where(found, 1e-3, 1e-2) * spread
    return Upsampled(images=images[:, None], consistency_error=consistency_error, converged=found, steps=1)


def audit(generated: Upsampled) -> BiasReport:
    return measure_bias(plain_faces(MONK, "truth"), GROUPS, generated, STREAMS.numpy("audit"))


def test_fairness_metrics_equal_the_worked_examples(shared: Path) -> None:
    vectors = json.loads((shared / "refs" / "fairness_metric_vectors.json").read_text())
    for case in vectors["cases"].values():
        found = fairness_metrics(case["confusion_rows_true_cols_recon"], "abc")
        expected = {
            "hit_rates": "RDP_hit_rate",
            "rdp_gap": "RDP_gap_max_minus_min",
            "rdp_ratio": "RDP_ratio_min_over_max",
            "rdp_chi2": "RDP_chi2",
            "rdp_chebyshev": "RDP_cheb",
            "pr_true": "PR_source",
            "pr_generated": "PR_recon",
            "pr_total_variation": "PR_TV",
            "pr_chi2": "PR_chi2_vs_uniform",
            "pr_chebyshev": "PR_cheb_vs_uniform",
            "spe": "SPE_max_abs",
        }
        for ours, theirs in expected.items():
            assert getattr(found, ours) == pytest.approx(case[theirs], abs=1e-12), ours


def test_fairness_metrics_distinguish_posterior_sampling_from_map(shared: Path) -> None:
    """Probabilities 80/20: sampling the posterior has SPE 0 and preserves the shares; MAP amplifies the majority."""
    toy = json.loads((shared / "refs" / "fairness_metric_vectors.json").read_text())["toy_80_20"]
    for way in ("posterior_sampling", "MAP"):
        found = fairness_metrics(toy[way]["joint"], ("major", "minor"))
        assert found.hit_rates == pytest.approx(toy[way]["RDP"], abs=1e-4)
        assert found.pr_generated == pytest.approx(toy[way]["PR_recon"], abs=1e-5)
        assert found.spe == pytest.approx(toy[way]["SPE"], abs=1e-5)


def test_groups_without_originals_are_left_out_of_rdp() -> None:
    table = confusion(["a", "a", "b"], ["a", "c", "b"], "abc")
    assert table == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    found = fairness_metrics(table, "abc")
    assert found.groups == ("a", "b") and found.hit_rates == (0.5, 1.0) and found.count == 3
    assert fairness_metrics([[0, 2], [3, 0]], "ab").rdp_ratio == 1.0


def test_an_upsampler_that_returns_the_originals_has_no_gap() -> None:
    """Clean negative: every shift is 0 and every rate 1."""
    report = audit(answer(plain_faces(MONK, "truth")))
    assert set(report.gaps) == set(METRICS)
    assert [name for name, gap in report.gaps.items() if gap.clear] == []
    assert report.overall.skin_difference.estimate == pytest.approx(0, abs=1e-4)
    assert report.overall.same_tone_bin.estimate == 1.0 and report.halves.spe == 0
    assert report.darker_change.estimate == 0 and report.darker_change.covers_zero
    assert "No metric differs clearly between the 4 groups" in report.sentences()[0]


def test_an_upsampler_that_is_equally_noisy_for_all_shows_no_gap() -> None:
    """Clean negative with variance: every group is lighter or darker at random."""
    shift = 5 * torch.randn(len(MONK), generator=STREAMS.generator("shift"))
    truth = plain_faces(MONK, "truth")
    lab = lab_from_srgb(truth.movedim(1, -1))
    lab[..., 0] += shift[:, None, None]
    report = audit(answer(srgb_from_lab(lab).movedim(-1, 1)))
    assert not report.gaps["lightness_shift"].clear
    assert report.overall.lightness_shift.low < shift.mean() < report.overall.lightness_shift.high


def test_an_upsampler_that_lightens_dark_faces_only_is_named_with_group_sign_and_size() -> None:
    """Planted positive: +12 L* for Monk 8 alone."""
    generated = lightened(plain_faces(MONK, "truth"), MONK == 8, 12.0)
    report = audit(answer(generated))
    gap = report.gaps["lightness_shift"]
    assert gap.clear and gap.worst == "monk 8"
    assert gap.difference.estimate == pytest.approx(12, abs=0.5)
    assert report.groups["monk 8"].lightness_shift.estimate == pytest.approx(12, abs=0.5)
    assert report.groups["monk 8"].ita_shift.low > 0 > report.groups["monk 8"].monk_shift.high
    assert report.groups["monk 2"].lightness_shift.estimate == pytest.approx(0, abs=0.1)
    assert report.gaps["skin_difference"].worst == report.gaps["monk_shift"].worst == "monk 8"
    sentence = next(text for text in report.sentences() if "lightness" in text)
    assert "monk 8" in sentence and "lighter than the originals" in sentence and "[" in sentence


def test_an_upsampler_that_lightens_all_faces_changes_the_shares_and_fails_rdp() -> None:
    report = audit(answer(plain_faces(torch.full_like(MONK, 3.0), "white")))
    assert report.darker_change.estimate == -0.5 and report.darker_change.high < 0
    assert report.halves.hit_rates == (1.0, 0.0) and report.halves.spe == 0.5
    assert report.gaps["same_half"].clear and report.gaps["same_half"].difference.estimate == -1.0
    assert any("fewer darker faces" in text for text in report.sentences())


def test_a_search_that_fails_for_one_group_is_named() -> None:
    report = audit(answer(plain_faces(MONK, "truth"), converged=MONK != 6))
    gap = report.gaps["converged"]
    assert gap.clear and gap.worst == "monk 6" and report.groups["monk 6"].converged.estimate == 0.0
    assert report.gaps["consistency_error"].clear and report.gaps["consistency_error"].worst == "monk 6"
    assert report.overall.converged.estimate == 0.75


def test_a_significant_gap_too_small_to_matter_is_not_in_the_sentences() -> None:
    """0.01 L* for one group: in the numbers, not in the text."""
    report = audit(answer(lightened(plain_faces(MONK, "truth"), MONK == 8, 0.01)))
    assert report.gaps["lightness_shift"].clear
    assert "No metric differs clearly between the 4 groups" in report.sentences()[0]


def test_several_faces_of_a_photo_count_as_one_photo() -> None:
    generated = plain_faces(MONK, "truth")[:, None].expand(-1, 5, -1, -1, -1)
    consistency_error = torch.full((80, 5), 1e-3)
    report = audit(
        Upsampled(
            images=generated, consistency_error=consistency_error, converged=consistency_error > 0, steps=1
        )
    )
    assert report.faces_per_photo == 5 and report.overall.monk_shift.count == 80
    assert report.groups["monk 2"].converged.count == 20 and report.halves.count == 400


def test_small_and_empty_groups_are_listed_and_the_report_is_strict_json() -> None:
    groups = ["one", "two", "two", *["many"] * 77]
    truth = plain_faces(MONK, "truth")
    generated = answer(truth)
    consistency_error = generated.consistency_error.clone()
    consistency_error[0] = float("inf")
    generated = Upsampled(
        images=generated.images, consistency_error=consistency_error, converged=generated.converged, steps=1
    )
    report = measure_bias(truth, groups, generated, STREAMS.numpy("few"), expected=["none", "many"])
    assert report.unmeasured == {"none": 0, "one": 1} and list(report.groups) == ["many", "two"]
    assert any("Too few photos for a reliable result: two, none, one" in text for text in report.sentences())
    plain = json.loads(json.dumps(asdict(report), allow_nan=False))
    assert plain["groups"]["two"]["consistency_error"]["count"] == 2


def test_a_known_tone_replaces_the_estimate_from_the_original() -> None:
    """Originals photographed two stops too dark: by their known tone, an exact copy is too dark."""
    truth = plain_faces(MONK, "truth")
    dark = truth * 0.5
    read = measure_tone(truth)
    known = measure_bias(dark, GROUPS, answer(dark), STREAMS.numpy("known"), true_tone=read)
    assert known.overall.lightness_shift.high < -10
    assert audit(answer(truth)).overall.lightness_shift.estimate == pytest.approx(0, abs=1e-4)


def test_the_histogram_counts_each_monk_tone() -> None:
    monk = torch.tensor([1.0, 3.0, 3.0, 7.0, 10.0, 10.0])
    found = tone_histogram(srgb_from_monk(monk)[:, :, None, None].expand(-1, 3, 16, 16))
    assert found.counts == (1, 0, 2, 0, 0, 0, 1, 0, 0, 2) and found.count == 6
    assert found.lighter.estimate == found.darker.estimate == 0.5
    assert found.shares[1].estimate == 0 and found.shares[1].high > 0
    json.dumps(asdict(found), allow_nan=False)


def test_mismatched_photos_and_faces_are_refused() -> None:
    truth = plain_faces(MONK, "truth")
    rng = np.random.Generator(np.random.PCG64(0))
    with pytest.raises(ValueError, match=r"truth must have shape \(80, 3, 16, 16\), got \(79, 3, 16, 16\)"):
        measure_bias(truth[1:], GROUPS, answer(truth), rng)
    with pytest.raises(ValueError, match="groups must name 80 photos, got 3"):
        measure_bias(truth, GROUPS[:3], answer(truth), rng)
    with pytest.raises(ValueError, match="among"):
        confusion(["x"], ["a"], "ab")
    with pytest.raises(ValueError, match="true_tone must hold 80 readings, got 1"):
        one = ToneReading(lab=torch.zeros(1, 3), ita=torch.zeros(1), monk=torch.zeros(1))
        measure_bias(truth, GROUPS, answer(truth), rng, true_tone=one)
