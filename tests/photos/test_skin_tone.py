"""Skin tone from pixels: published numbers are reproduced, and the known tone of synthetic faces is recovered."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pytest import approx

from fedface.photos.skin_tone import (
    MONK_SWATCHES,
    TONE_BINS,
    delta_e,
    ita_degrees,
    lab_from_srgb,
    measure_tone,
    monk_from_lab,
    srgb_from_lab,
    srgb_from_monk,
    srgb_to_lab,
    tone_bin,
)
from fedface.synthetic.faces import NORMALS, ToneMix, faces_from_normals, neutral_light, render, sample_faces

EVEN = ToneMix(light_fraction=0.5)


def test_white_black_and_grey_have_their_defined_lab_values() -> None:
    """D65 white is (100, 0, 0); equal channels have no chroma; sRGB 119 is L* 50 within rounding."""
    lab = lab_from_srgb(torch.tensor([[1.0] * 3, [0.0] * 3, [119 / 255] * 3]))
    assert lab.flatten().tolist() == approx([100, 0, 0, 0, 0, 0, 50.03, 0, 0], abs=0.03)


def test_lab_returns_to_the_same_srgb() -> None:
    """The two conversions are inverse inside the gamut."""
    colours = torch.rand(500, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(srgb_from_lab(lab_from_srgb(colours)), colours, atol=1e-4)


def test_lab_of_a_picture_is_lab_of_its_pixels() -> None:
    """Only the place of the channels differs."""
    pictures = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(srgb_to_lab(pictures)[1, :, 2, 3], lab_from_srgb(pictures[1, :, 2, 3]), atol=1e-4)


def test_the_monk_swatches_have_the_reference_lab_ita_and_bin(shared: Path) -> None:
    """Computed elsewhere from the published hex values."""
    reference = json.loads((shared / "refs" / "mst_cielab_ita.json").read_text())
    lab = lab_from_srgb(MONK_SWATCHES)
    ita = ita_degrees(lab)
    assert lab.flatten().tolist() == approx(
        [row[key] for row in reference for key in ("L", "a", "b")], abs=0.02
    )
    assert ita.tolist() == approx([row["ITA"] for row in reference], abs=0.1)
    assert tone_bin(ita) == [row["ita_class"] for row in reference]


def test_ita_is_45_degrees_where_lightness_above_50_equals_b() -> None:
    """atan2(L* - 50, b*)."""
    lab = torch.tensor([[60.0, 3.0, 10.0], [40.0, 3.0, 10.0], [50.0, 0.0, 5.0]])
    assert ita_degrees(lab).tolist() == approx([45, -45, 0], abs=1e-4)


def test_an_angle_on_an_edge_belongs_to_the_darker_bin() -> None:
    """The published definition says above 55, above 41, and so on."""
    edges = torch.tensor([edge for _, edge in TONE_BINS[:-1]])
    names = [name for name, _ in TONE_BINS]
    assert tone_bin(edges + 0.01) == names[:-1]
    assert tone_bin(edges) == names[1:]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((50.0, 2.6772, -79.7751), (50.0, 0.0, -82.7485), 2.0425),
        ((50.0, 3.1571, -77.2803), (50.0, 0.0, -82.7485), 2.8615),
        ((50.0, 0.0, 0.0), (50.0, -1.0, 2.0), 2.3669),
        ((50.0, 2.49, -0.001), (50.0, -2.49, 0.0009), 7.1792),
        ((50.0, 2.5, 0.0), (73.0, 25.0, -18.0), 27.1492),
        ((50.0, 2.5, 0.0), (58.0, 24.0, 15.0), 19.4535),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_ciede2000_gives_the_published_differences(
    first: tuple[float, ...], second: tuple[float, ...], expected: float
) -> None:
    """Sharma, Wu & Dalal (2005), table 1; both directions."""
    a, b = torch.tensor([first], dtype=torch.float64), torch.tensor([second], dtype=torch.float64)
    assert float(delta_e(a, b)) == approx(expected, abs=1e-4)
    assert float(delta_e(b, a)) == approx(expected, abs=1e-4)


def test_the_monk_value_of_a_swatch_is_its_number_and_between_swatches_its_place() -> None:
    """The nearest point of the polyline through a point on it is the point itself."""
    assert monk_from_lab(lab_from_srgb(MONK_SWATCHES)).tolist() == approx(list(range(1, 11)), abs=1e-3)
    tones = torch.linspace(1, 10, 181)
    assert torch.allclose(monk_from_lab(lab_from_srgb(srgb_from_monk(tones))), tones, atol=0.02)


def test_a_uniform_image_has_the_tone_of_its_colour() -> None:
    """Every patch has the same colour, at any size, also in an expanded view."""
    for size in (16, 32, 100):
        pictures = MONK_SWATCHES[[2, 7], :, None, None].expand(2, 3, size, size)
        assert measure_tone(pictures).monk.tolist() == approx([3, 8], abs=1e-3)


@pytest.mark.parametrize("size", [32, 64])
def test_under_neutral_light_the_estimate_recovers_the_true_tone(size: int) -> None:
    """Synthetic faces of any shape, hair and pose: mean error 0.25 Monk units, mean difference below dE00 4. Largest
    among Monk 1 to 4, whose swatches are close together; below 0.15 for the dark half.
    """
    faces = sample_faces(300, EVEN, torch.Generator().manual_seed(2))
    reading = measure_tone(render(neutral_light(faces), size))
    error = (reading.monk - faces.tone).abs()
    assert float(error.mean()) < 0.25
    assert float(error[faces.tone > 5.5].mean()) < 0.15
    truth = lab_from_srgb(srgb_from_monk(faces.tone))
    assert float(delta_e(reading.lab, truth).mean()) < 4
    assert reading.ita.shape == reading.monk.shape == (300,)


def test_under_neutral_light_the_estimate_rises_with_the_true_tone() -> None:
    """One face in 19 tones: each step of half a Monk unit is a step in the same direction."""
    tones = torch.linspace(1, 10, 19)
    faces = replace(neutral_light(faces_from_normals(torch.zeros(19, NORMALS), EVEN)), tone=tones)
    reading = measure_tone(render(faces, 64))
    assert bool((reading.monk.diff() > 0).all())
    assert bool((reading.ita.diff() < 0).all())


def test_two_stops_less_light_are_estimated_as_darker_skin() -> None:
    """The planted failure: ITA includes exposure, so an uncontrolled photo does not determine tone."""
    faces = neutral_light(sample_faces(50, EVEN, torch.Generator().manual_seed(3)))
    bright = measure_tone(render(faces, 64))
    dim = measure_tone(render(replace(faces, exposure=faces.exposure - 2), 64))
    assert bool((dim.ita < bright.ita).all())
    assert float((dim.monk - bright.monk).mean()) > 0.5
